// The gradients of a bank's blueprints, summed: of each part of the rows and each place by itself,
// added in a fixed order. Those of the first part and of a slot's first place are the gradients
// themselves, which saves a bank of large weights a copy or two of them.
namespace kasmina {

struct Gradients {
  const Bank& bank;
  float* const* grads;
  std::unique_ptr<float[]> others;  // not written before it is begun
  std::vector<char> begun, refused, unsound;

  Gradients(const Bank& bank, float* const* grads)
      : bank(bank), grads(grads), begun(bank.parts * bank.everyone()), refused(begun), unsound(begun) {
    int64_t many = (int64_t)begun.size() - (bank.places == 1 ? bank.slots : 0);
    others.reset(new float[many * bank.width]);
  }

  int64_t number(int64_t part, int64_t place) const { return part * bank.everyone() + place; }

  // Where sums are, stack by stack, and whether they are in the gradients.
  bool find(int64_t part, int64_t place, float** to) const {
    bool first = part == 0 && place % bank.places == 0;
    int64_t all = number(part, place) - (bank.places == 1 ? bank.slots : 0);
    float* next = first ? nullptr : others.get() + all * bank.width;
    for (int i = 0; i < bank.stacks; i++) {
      to[i] = first ? grads[i] + place / bank.places * bank.numbers[i] : next;
      next = first ? nullptr : next + bank.numbers[i];
    }
    return first;
  }

  // Before the first sums of a part; threads that begin the gradients have made them zeros.
  void begin(int64_t part, int64_t place, float** to) {
    char& mine = begun[number(part, place)];
    if (!find(part, place, to) && !mine) std::fill(to[0], to[0] + bank.width, 0.0f);
    mine = 1;
  }

  // Threads share it out.
  void clear() {
#pragma omp for schedule(static)
    for (int64_t slot = 0; slot < bank.capacity; slot++)
      for (int i = 0; i < bank.stacks; i++)
        memset(grads[i] + slot * bank.numbers[i], 0, bank.numbers[i] * sizeof(float));
  }

  // Adds what is not yet in the gradients; a slot's are all finite, or all zero.
  void finish(float* blame, const int64_t* seeds, float scale) const {
    memset(blame, 0, bank.count * sizeof(float));
#pragma omp parallel for num_threads(bank.team(1)) schedule(static)
    for (int64_t slot = 0; slot < bank.slots; slot++) {
      float *mine[STACKS], *from[STACKS];
      bool no = false, bad = false, fault = false;
      find(0, slot * bank.places, mine);
      for (int64_t k = 0; k < bank.places; k++) {
        int64_t place = slot * bank.places + k;
        for (int64_t part = 0; part < bank.parts; part++) {
          no = no || refused[number(part, place)], bad = bad || unsound[number(part, place)];
          if (!begun[number(part, place)] || find(part, place, from)) continue;
          for (int i = 0; i < bank.stacks; i++)
            for (int64_t e = 0; e < bank.numbers[i]; e++) mine[i][e] += from[i][e];
        }
      }
      for (int i = 0; i < bank.stacks; i++) fault = fault || !sound(mine[i], bank.numbers[i]);
      for (int i = 0; fault && i < bank.stacks; i++)
        std::fill(mine[i], mine[i] + bank.numbers[i], 0.0f);
      // An overflow in the backward of a scaled loss is how a GradScaler finds its scale.
      bool own = !bad && scale == 1 && (no || fault);
      for (int64_t k = 0; k < bank.places; k++) {
        int64_t seed = seeds[slot * bank.places + k];
        if (seed >= 0) blame[seed] = own;
      }
    }
  }
};

}  // namespace kasmina
