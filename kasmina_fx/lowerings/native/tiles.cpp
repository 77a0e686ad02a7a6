// The blend of one bank, and its backward; the meaning is that of ../triton/two_layer.py.
// Work falls into tasks by its shape alone, and every task's sums are added in a fixed order:
// the same bits, however many threads there are.
namespace kasmina {

// What is known of the slots of active seeds. Threads share it out.
static void find_known(Known* known, const Bank& bank, const int64_t* order,
                       const float* const* params) {
#pragma omp for schedule(static)
  for (int64_t at = 0; at < bank.active; at++) {
    known[at].sane = false;
    if (order[at] >= 0) known[at] = Blueprint(bank, params, order[at] / bank.places).known(bank);
  }
}

static void forward(float* out, float* kept, float* told, const float* before,
                    const int64_t* order, const int64_t* seeds, const float* alpha,
                    const int64_t* roles, const float* const* params, const Bank& bank) {
  int64_t c = bank.c, together = bank.together;
  std::vector<float> said(told ? bank.parts * bank.active * 3 : 0);
  std::unique_ptr<Known[]> known(new Known[bank.active]);
#pragma omp parallel num_threads(bank.team(2))
  {
    int64_t most = bank.seeds_of_a_tile;
    std::unique_ptr<Block[]> tile(new Block[most * (MOST / ROWS) * c]);
    std::unique_ptr<Block[]> room(new Block[Inside::numbers(bank, together) + together * c]);
    Block* f = room.get();
    Inside in(bank, together, f + together * c);
    std::vector<Member> member(most);
    std::unique_ptr<bool[]> blends(new bool[most]);
    find_known(known.get(), bank, order, params);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < bank.parts * bank.batches; task++) {
      int64_t part = task / bank.batches;
      int many = members(bank, task % bank.batches, order, seeds, member.data());
      int64_t end = std::min(bank.rows, (part + 1) * bank.rows_of_a_part);
      for (int64_t row = part * bank.rows_of_a_part; row < end; row += MOST) {
        int64_t rows = std::min<int64_t>(MOST, end - row), blocks = blocks_of(rows);
        gather(out, bank, row, rows, member.data(), many, tile.get());
        for (int m = 0; m < many; m++) {
          const Member& me = member[m];
          Blueprint blueprint(bank, params, me.slot);
          Block* mine = tile.get() + m * blocks * c;
          if (kept)
            for (int64_t b = 0; b < blocks; b++)
              memcpy(kept + ((row / ROWS + b) * bank.active + me.at) * c * ROWS, mine + b * c,
                     c * sizeof(Block));
          bool runs = known[me.at].sane;
          blends[m] = runs && roles[bank.first_seed + me.seed] == 2;
          float a = alpha[bank.first_seed + me.seed];
          Block squares = splat(0.0f);
          Mask wrong = all(!runs), unsound = all(false);
          for (int64_t b = 0; b < blocks; b += together) {
            int64_t some = std::min(together, blocks - b);
            Block* z = mine + b * c;
            if (runs) blueprint.run(bank, z, some, in, f);
            for (int64_t k = 0; k < some; k++) {
              Mask here = first(rows - (b + k) * ROWS);
              for (int64_t e = k * c; e < (k + 1) * c; e++) {
                if (told) unsound = unsound | (here & ~finite(z[e]));
                if (!runs) continue;
                // Where f is not finite, neither is what comes of it.
                Block delta = f[e] - z[e], grown = z[e] + a * delta;
                if (told) {
                  Mask counts = finite(delta);
                  squares = squares + only(here & counts, delta * delta);
                  wrong = wrong | (here & ~counts);
                }
                z[e] = choose(finite(grown), grown, z[e]);
              }
            }
          }
          if (told) {
            float* mean = said.data() + (part * bank.active + me.at) * 3;
            mean[0] += sum(squares);
            mean[1] += any(wrong);
            mean[2] += any(unsound);
          }
        }
        scatter(out, bank, row, rows, member.data(), blends.get(), many, tile.get());
      }
    }
  }
  if (!told) return;
  int64_t n = bank.count;
  for (int64_t seed = 0; seed < n; seed++)
    for (int line = 0; line < 3; line++)
      told[line * n + seed] = before ? before[line * n + seed] : (line == 1 ? -1.0f : 0.0f);
  for (int64_t at = 0; at < bank.active; at++) {
    if (order[at] < 0 || !bank.rows) continue;
    float squares = 0, wrong = 0, unsound = 0;
    for (int64_t part = 0; part < bank.parts; part++) {
      const float* mean = said.data() + (part * bank.active + at) * 3;
      squares += mean[0], wrong += mean[1], unsound += mean[2];
    }
    int64_t seed = seeds[order[at]];
    float loss = squares / (1.0f * bank.rows * c), a = alpha[bank.first_seed + seed];
    told[seed] = wrong > 0 && unsound == 0;
    told[n + seed] = wrong == 0 ? loss : -1.0f;
    told[2 * n + seed] = wrong == 0 && roles[bank.first_seed + seed] == 2 ? a * a * loss : 0.0f;
  }
}

static void backward(float* dy, float* blame, float* const* grads, const float* kept,
                     const int64_t* order, const int64_t* seeds, const int64_t* modes,
                     const float* alpha, const int64_t* roles, float scale,
                     const float* const* params, const Bank& bank) {
  int64_t c = bank.c, together = bank.together;
  Gradients sums(bank, grads);
  std::unique_ptr<Known[]> known(new Known[bank.active]);
  float weight = 2.0f * scale / (1.0f * bank.rows * c);  // of the mean of squared errors
#pragma omp parallel num_threads(bank.team(5))
  {
    int64_t most = bank.seeds_of_a_tile, deep = MOST / ROWS, own = (2 * deep + 2 * together) * c;
    std::unique_ptr<Block[]> tile(new Block[most * deep * c]);
    std::unique_ptr<Block[]> room(new Block[own + Inside::numbers(bank, deep)]);
    std::unique_ptr<Block[]> flat(new Block[MOST * blocks_of(std::max(c, bank.h))]);
    Block *before = room.get(), *sent = before + deep * c, *f = sent + deep * c, *dx = f + together * c;
    Inside in(bank, deep, room.get() + own);
    std::vector<Member> member(most);
    std::unique_ptr<bool[]> blends(new bool[most]);
    std::unique_ptr<Mask[]> blended(new Mask[together * c]);
    sums.clear();
    find_known(known.get(), bank, order, params);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < bank.parts * bank.batches; task++) {
      int64_t part = task / bank.batches;
      int many = members(bank, task % bank.batches, order, seeds, member.data());
      int64_t end = std::min(bank.rows, (part + 1) * bank.rows_of_a_part);
      for (int64_t row = part * bank.rows_of_a_part; row < end; row += MOST) {
        int64_t rows = std::min<int64_t>(MOST, end - row), blocks = blocks_of(rows);
        gather(dy, bank, row, rows, member.data(), many, tile.get());
        for (int m = 0; m < many; m++) {
          const Member& me = member[m];
          Blueprint blueprint(bank, params, me.slot);
          int64_t mode = modes[me.place];
          float a = alpha[bank.first_seed + me.seed];
          blends[m] = known[me.at].sane && roles[bank.first_seed + me.seed] == 2;
          if (!blends[m] && (mode != 2 || !known[me.at].sane)) continue;  // no gradient enters it
          bool usual = blends[m] && mode != 2 && a >= 0 && a <= 1 && c * bank.h >= LONG;
          Mask refused = all(false), unsound = all(false);
          in.begin(bank);
          for (int64_t b = 0; b < blocks; b += together) {
            int64_t some = std::min(together, blocks - b);
            Block *z = before + b * c, *dz = tile.get() + (m * blocks + b) * c, *df = sent + b * c;
            for (int64_t k = 0; k < some; k++) {
              int64_t block = row / ROWS + b + k;
              memcpy((void*)(z + k * c), kept + (block * bank.active + me.at) * c * ROWS,
                     c * sizeof(Block));
            }
            Inside inside = in.from(bank, b);
            blueprint.begin(bank, z, some, inside);
            bool plain = usual && blueprint.bounded(bank, known[me.at], z, some, inside);
            if (!plain) blueprint.end(bank, z, some, inside, f);
            for (int64_t k = 0; k < some; k++) {
              Mask here = first(rows - (b + k) * ROWS);
              for (int64_t e = k * c; plain && e < (k + 1) * c; e++) {
                blended[e] = all(true);
                df[e] = only(here & finite(dz[e]), a * dz[e]);
              }
              for (int64_t e = k * c; !plain && e < (k + 1) * c; e++) {
                Block delta = f[e] - z[e];
                blended[e] = finite(z[e] + a * delta) & all(blends[m]);
                Block error = weight * only(finite(delta) & all(mode == 2), delta);
                df[e] = only(here, choose(blended[e] & finite(dz[e]), a * dz[e], error));
              }
            }
            blueprint.back(bank, df, some, inside, dx);
            for (int64_t k = 0; k < some; k++) {
              Mask here = first(rows - (b + k) * ROWS);
              for (int64_t e = k * c; e < (k + 1) * c; e++) {
                Mask fine = finite(dx[e]);
                refused = refused | (here & ~fine);
                unsound = unsound | (here & ~finite(z[e]));
                Block direct = choose(blended[e], dz[e] - a * dz[e], dz[e]);
                dz[e] = choose(fine & all(blends[m]), direct + dx[e], direct);
              }
            }
          }
          int64_t number = sums.number(part, me.place);
          sums.refused[number] |= any(refused);
          sums.unsound[number] |= any(unsound);
          if (mode == 0) continue;
          float* to[STACKS];
          sums.begin(part, me.place, to);
          Blueprint::add(bank, to, before, sent, blocks, in, (float*)flat.get());
        }
        scatter(dy, bank, row, rows, member.data(), blends.get(), many, tile.get());
      }
    }
  }
  sums.finish(blame, seeds, scale);
}

}  // namespace kasmina

extern "C" void kasmina_forward(const int64_t* sizes, float* out, float* kept, float* told,
                                const float* before, const int64_t* order, const int64_t* seeds,
                                const float* alpha, const int64_t* roles,
                                const float* const* params) {
  kasmina::forward(out, kept, told, before, order, seeds, alpha, roles, params,
                   kasmina::Bank(sizes, false));
}

extern "C" void kasmina_backward(const int64_t* sizes, float* dy, float* blame, const float* kept,
                                 const int64_t* order, const int64_t* seeds, const int64_t* modes,
                                 const float* alpha, const int64_t* roles, const float* loss_scale,
                                 const float* const* params, float* const* grads) {
  kasmina::backward(dy, blame, grads, kept, order, seeds, modes, alpha, roles, *loss_scale, params,
                    kasmina::Bank(sizes, true));
}
