// The blend of one bank, and its backward; the meaning is that of ../triton/two_layer.py.
// Work falls into tasks by its shape alone, and every task's sums are added in a fixed order:
// the same bits, however many threads there are.
namespace kasmina {

static void forward(float* out, float* kept, float* told, const float* before,
                    const int64_t* order, const int64_t* seeds, const float* alpha,
                    const int64_t* roles, const float* const* params, const Bank& bank) {
  int64_t c = bank.c, total = blocks_of(bank.rows);
  std::vector<float> said(told ? bank.parts * bank.active * 3 : 0);
#pragma omp parallel num_threads(bank.team(2))
  {
    int64_t most = bank.seeds_of_a_tile;
    std::unique_ptr<Block[]> tile(new Block[most * (MOST / ROWS) * c]), buffer(new Block[bank.h + c]);
    std::vector<Member> member(most);
    std::unique_ptr<bool[]> blends(new bool[most]);
    Block *hidden = buffer.get(), *f = hidden + bank.h;
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
          blends[m] = blueprint.sane && roles[bank.first_seed + me.seed] == 2;
          float a = alpha[bank.first_seed + me.seed];
          Block squares = splat(0.0f);
          Mask wrong = all(!blueprint.sane), unsound = all(false);
          for (int64_t b = 0; b < blocks; b++) {
            Block* z = mine + b * c;
            Mask here = first(rows - b * ROWS);
            if (blueprint.sane) blueprint.run(bank, z, hidden, f);
            for (int64_t i = 0; i < c; i++) {
              if (told) unsound = unsound | (here & ~finite(z[i]));
              if (!blueprint.sane) continue;
              // Where f is not finite, neither is what comes of it.
              Block delta = f[i] - z[i], grown = z[i] + a * delta;
              if (told) {
                Mask counts = finite(delta);
                squares = squares + only(here & counts, delta * delta);
                wrong = wrong | (here & ~counts);
              }
              z[i] = choose(finite(grown), grown, z[i]);
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
    if (order[at] < 0) continue;
    float squares = 0, wrong = 0, unsound = 0;
    for (int64_t part = 0; part < bank.parts; part++) {
      const float* mean = said.data() + (part * bank.active + at) * 3;
      squares += mean[0], wrong += mean[1], unsound += mean[2];
    }
    int64_t seed = seeds[order[at]];
    float loss = squares / (1.0f * bank.rows * c), a = alpha[bank.first_seed + seed];
    told[seed] = wrong > 0 && unsound == 0;
    bool ran = wrong == 0 && bank.rows > 0;  // of an empty batch nothing is known
    told[n + seed] = ran ? loss : -1.0f;
    told[2 * n + seed] = ran && roles[bank.first_seed + seed] == 2 ? a * a * loss : 0.0f;
  }
}

// sums[m * N + n] += sum over blocks and rows of a[b * M + m] * x[b * N + n]
static void outer(float* sums, const Block* a, int64_t M, const Block* x, int64_t N, int64_t blocks) {
  constexpr int HIGH = PARTS == 1 ? 4 : 1;
  for (int64_t m = 0; m < M; m += HIGH)
    for (int64_t n = 0; n < N; n += 4) {
      const Block *left[HIGH], *right[4];  // beyond the last one: the last one again, and not written
      for (int i = 0; i < HIGH; i++) left[i] = a + std::min(m + i, M - 1);
      for (int j = 0; j < 4; j++) right[j] = x + std::min(n + j, N - 1);
      Block found[HIGH][4] = {};
      for (int64_t b = 0; b < blocks; b++)
        for (int i = 0; i < HIGH; i++)
          for (int j = 0; j < 4; j++) found[i][j] = found[i][j] + left[i][b * M] * right[j][b * N];
      for (int64_t i = 0; i < std::min<int64_t>(HIGH, M - m); i++) {
        Four four = sum4(found[i]);
        float* to = sums + (m + i) * N + n;
        if (n + 4 <= N)
          store4(to, load4(to) + four);
        else
          for (int64_t j = 0; j < N - n; j++) to[j] += four[j];
      }
    }
}

static void down(float* sums, const Block* a, int64_t M, int64_t blocks) {
  for (int64_t m = 0; m < M; m += 4) {
    Block found[4] = {};
    for (int64_t b = 0; b < blocks; b++)
      for (int i = 0; i < 4; i++) found[i] = found[i] + a[b * M + std::min(m + i, M - 1)];
    Four four = sum4(found);
    for (int64_t i = 0; i < std::min<int64_t>(4, M - m); i++) sums[m + i] += four[i];
  }
}

// Sums of parts become the gradients of stacks; all of a slot's, or none. Where nothing learns there
// are no sums, only `flags`: what was refused, and whether the host was to blame.
static void finish(float* blame, float* const* grads, const float* sums, const float* flags,
                   const int64_t* seeds, const int64_t* modes, float scale, const Bank& bank) {
  int64_t c = bank.c, h = bank.h, width = bank.width(), everyone = bank.slots * bank.places;
  int64_t product = c * (h ? h : 1);
  int64_t many[4] = {product, bank.bias ? h : product, product, c};
  int stacks = bank.bias ? 4 : 2;
  memset(blame, 0, bank.count * sizeof(float));
#pragma omp parallel for num_threads(bank.team(1)) schedule(static)
  for (int64_t slot = 0; slot < bank.capacity; slot++) {
    std::vector<float> found;
    float refused = 0, unsound = 0;
    for (int64_t k = 0; k < (slot < bank.slots ? bank.places : 0); k++) {
      int64_t place = slot * bank.places + k;
      if (seeds[place] < 0) continue;
      if (modes[place] && found.empty()) found.resize(width);
      for (int64_t part = 0; part < bank.parts; part++) {
        int64_t at = part * everyone + place;
        refused += flags[2 * at], unsound += flags[2 * at + 1];
        for (int64_t e = 0; modes[place] && e < width; e++) found[e] += sums[at * width + e];
      }
    }
    bool fault = !sound(found.data(), found.size()), learns = !found.empty() && !fault;
    const float* from = found.data();
    for (int p = 0; p < stacks; from += many[p++])
      if (learns)
        memcpy(grads[p] + slot * many[p], from, many[p] * sizeof(float));
      else
        memset(grads[p] + slot * many[p], 0, many[p] * sizeof(float));
    // An overflow in the backward of a scaled loss is how a GradScaler finds its scale.
    bool mine = unsound == 0 && scale == 1 && (refused > 0 || fault);
    for (int64_t k = 0; k < (slot < bank.slots ? bank.places : 0); k++) {
      int64_t seed = seeds[slot * bank.places + k];
      if (seed >= 0) blame[seed] = mine;
    }
  }
}

static void backward(float* dy, float* blame, float* const* grads, const float* kept,
                     const int64_t* order, const int64_t* seeds, const int64_t* modes,
                     const float* alpha, const int64_t* roles, float scale,
                     const float* const* params, const Bank& bank) {
  int64_t c = bank.c, h = bank.h, width = bank.width();
  int64_t everyone = bank.slots * bank.places;
  // Of places that learn, zeroed where they are first added to.
  std::unique_ptr<float[]> sums(new float[bank.parts * everyone * width]);
  std::unique_ptr<float[]> flags(new float[bank.parts * everyone * 2]());
  float weight = 2.0f * scale / (1.0f * bank.rows * c);  // of the mean of squared errors
#pragma omp parallel num_threads(bank.team(5))
  {
    int64_t most = bank.seeds_of_a_tile, deep = MOST / ROWS;
    std::unique_ptr<Block[]> tile(new Block[most * deep * c]), buffer(new Block[deep * (2 * c + 2 * h) + 2 * c]);
    Block *before = buffer.get(), *sent = before + deep * c, *hidden = sent + deep * c;
    Block *inner = hidden + deep * h, *f = inner + deep * h, *dx = f + c;
    std::vector<Member> member(most);
    std::unique_ptr<bool[]> blends(new bool[most]);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < bank.parts * bank.batches; task++) {
      int64_t part = task / bank.batches;
      int many = members(bank, task % bank.batches, order, seeds, member.data());
      int64_t end = std::min(bank.rows, (part + 1) * bank.rows_of_a_part);
      for (int m = 0; m < many; m++)
        if (modes[member[m].place])
          memset(sums.get() + (part * everyone + member[m].place) * width, 0, width * sizeof(float));
      for (int64_t row = part * bank.rows_of_a_part; row < end; row += MOST) {
        int64_t rows = std::min<int64_t>(MOST, end - row), blocks = blocks_of(rows);
        gather(dy, bank, row, rows, member.data(), many, tile.get());
        for (int m = 0; m < many; m++) {
          const Member& me = member[m];
          Blueprint blueprint(bank, params, me.slot);
          int64_t mode = modes[me.place];
          float a = alpha[bank.first_seed + me.seed];
          blends[m] = blueprint.sane && roles[bank.first_seed + me.seed] == 2;
          if (!blueprint.sane || (!blends[m] && mode != 2)) continue;  // no gradient enters it
          Mask refused = all(false), unsound = all(false);
          for (int64_t b = 0; b < blocks; b++) {
            Block *z = before + b * c, *dz = tile.get() + (m * blocks + b) * c;
            Block *df = sent + b * c, *x = hidden + b * h, *dh = inner + b * h;
            memcpy((void*)z, kept + ((row / ROWS + b) * bank.active + me.at) * c * ROWS, c * sizeof(Block));
            Mask here = first(rows - b * ROWS);
            blueprint.run(bank, z, x, f);
            Mask blended[WIDEST];
            for (int64_t i = 0; i < c; i++) {
              Block delta = f[i] - z[i];
              blended[i] = finite(z[i] + a * delta) & all(blends[m]);
              Block error = weight * only(finite(delta) & all(mode == 2), delta);
              df[i] = only(here, choose(blended[i] & finite(dz[i]), a * dz[i], error));
            }
            if (h) {
              products(dh, h, blueprint.w2, 1, h, df, c, nullptr);
              if (bank.act)
                for (int64_t j = 0; j < h; j++) dh[j] = only(x[j] > 0.0f, dh[j]);
              products(dx, c, blueprint.w1, 1, c, dh, h, nullptr);
            }
            for (int64_t i = 0; i < c; i++) {
              if (!h) dx[i] = blueprint.w1[i] * df[i];
              if (bank.residual) dx[i] = dx[i] + df[i];
              Mask fine = finite(dx[i]);
              refused = refused | (here & ~fine);
              unsound = unsound | (here & ~finite(z[i]));
              Block direct = choose(blended[i], dz[i] - a * dz[i], dz[i]);
              dz[i] = choose(fine & all(blends[m]), direct + dx[i], direct);
            }
          }
          int64_t at = part * everyone + me.place;
          flags[2 * at] += any(refused);
          flags[2 * at + 1] += any(unsound);
          if (mode == 0) continue;
          float* mine = sums.get() + at * width;
          if (!h) {
            for (int64_t b = 0; b < blocks; b++)
              for (int64_t i = 0; i < c; i++) before[b * c + i] = before[b * c + i] * sent[b * c + i];
            down(mine, before, c, blocks);
            down(mine + c, sent, c, blocks);
            continue;
          }
          outer(mine, inner, h, before, c, blocks);
          float* behind = mine + h * c + (bank.bias ? h : 0);
          outer(behind, sent, c, hidden, h, blocks);
          if (bank.bias) {
            down(mine + h * c, inner, h, blocks);
            down(behind + h * c, sent, c, blocks);
          }
        }
        scatter(dy, bank, row, rows, member.data(), blends.get(), many, tile.get());
      }
    }
  }
  finish(blame, grads, sums.get(), flags.get(), seeds, modes, scale, bank);
}

}  // namespace kasmina

extern "C" void kasmina_forward(const int64_t* sizes, float* out, float* kept, float* told,
                                const float* before, const int64_t* order, const int64_t* seeds,
                                const float* alpha, const int64_t* roles, const float* p1,
                                const float* p2, const float* p3, const float* p4) {
  const float* params[4] = {p1, p2, p3, p4};
  kasmina::forward(out, kept, told, before, order, seeds, alpha, roles, params, kasmina::Bank(sizes));
}

extern "C" void kasmina_backward(const int64_t* sizes, float* dy, float* blame, const float* kept,
                                 const int64_t* order, const int64_t* seeds, const int64_t* modes,
                                 const float* alpha, const int64_t* roles, const float* loss_scale,
                                 const float* p1, const float* p2, const float* p3, const float* p4,
                                 float* d1, float* d2, float* d3, float* d4) {
  const float* params[4] = {p1, p2, p3, p4};
  float* grads[4] = {d1, d2, d3, d4};
  kasmina::backward(dy, blame, grads, kept, order, seeds, modes, alpha, roles, *loss_scale, params,
                    kasmina::Bank(sizes));
}
