// How active chunks come out of rows and go back: transposed, so that rows are lanes.
// A tile is the chunks of a few seeds in up to MOST rows, as blocks [seed][block][feature].
#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

namespace kasmina {

constexpr int MOST = 128;     // rows of a tile: with its neighbours it fits a core's own cache
constexpr int WIDEST = 64;    // features of a chunk, at most: plan.py
constexpr int COLUMNS = 64;   // features of a tile, about: whole cache lines where seeds lie together
constexpr int WIDE = PARTS == 1 ? 8 : PARTS == 2 ? 4 : 2;  // sums that registers hold
constexpr int64_t TASKS = 32; // about so many, whatever the threads: sums do not depend on these

static inline int64_t blocks_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

// What a bank is, and how its rows and seeds are shared out; numbers only, read from `sizes`.
struct Bank {
  int64_t rows, features, offset, first_seed, count, active, places, slots, capacity, c, h;
  int64_t act, bias, residual, threads;
  int64_t seeds_of_a_tile, batches, parts, rows_of_a_part;

  explicit Bank(const int64_t* n)
      : rows(n[0]), features(n[1]), offset(n[2]), first_seed(n[3]), count(n[4]), active(n[5]),
        places(n[6]), slots(n[7]), capacity(n[8]), c(n[9]), h(n[10]), act(n[11]), bias(n[12]),
        residual(n[13]), threads(n[14]) {
    seeds_of_a_tile = std::max<int64_t>(1, COLUMNS / c);
    batches = (active + seeds_of_a_tile - 1) / seeds_of_a_tile;
    int64_t tiles = (rows + MOST - 1) / MOST;
    int64_t wanted = std::max<int64_t>(1, std::min(tiles, TASKS / std::max<int64_t>(1, batches)));
    rows_of_a_part = std::max<int64_t>(1, (tiles + wanted - 1) / wanted) * MOST;
    parts = (rows + rows_of_a_part - 1) / rows_of_a_part;
  }

  int64_t width() const { return 2 * c * (h ? h : 1) + (bias ? h + c : 0); }

  // Threads are not worth waking for less than about 20 us of work.
  int team(int64_t products) const {
    int64_t work = rows * active * c * (h ? h : 1) * products;
    return work < 400000 ? 1 : (int)std::min(threads, std::max<int64_t>(1, parts * batches));
  }
};

// One seed of a tile.
struct Member {
  int64_t at, place, seed, slot, column;
};

static inline int members(const Bank& bank, int64_t batch, const int64_t* order,
                          const int64_t* seeds, Member* found) {
  int many = 0;
  int64_t last = std::min(bank.active, (batch + 1) * bank.seeds_of_a_tile);
  for (int64_t at = batch * bank.seeds_of_a_tile; at < last; at++) {
    int64_t place = order[at];
    if (place < 0) continue;  // padding
    int64_t seed = seeds[place];
    found[many++] = {at, place, seed, place / bank.places, bank.offset + seed * bank.c};
  }
  return many;
}

// Neighbouring rows often are a power of two apart, in one set of a cache: four at a time stay.
static void gather(const float* from, const Bank& bank, int64_t row, int64_t rows,
                   const Member* member, int many, Block* tile) {
  int64_t blocks = blocks_of(rows), c = bank.c, stride = bank.features;
  if (rows % ROWS)
    for (int m = 0; m < many; m++)
      memset((void*)(tile + (m * blocks + blocks - 1) * c), 0, c * sizeof(Block));
  for (int64_t r = 0; r < rows; r += 4) {
    for (int m = 0; m < many; m++) {
      const float* source = from + (row + r) * stride + member[m].column;
      float* to = (float*)(tile + (m * blocks + r / ROWS) * c) + r % ROWS;
      int64_t i = 0, some = std::min<int64_t>(4, rows - r);
      if (some == 4)
        for (; i + 4 <= c; i += 4) {
          Four p = load4(source + i), q = load4(source + stride + i);
          Four s = load4(source + 2 * stride + i), t = load4(source + 3 * stride + i);
          transpose4(p, q, s, t);
          store4(to + i * ROWS, p);
          store4(to + (i + 1) * ROWS, q);
          store4(to + (i + 2) * ROWS, s);
          store4(to + (i + 3) * ROWS, t);
        }
      for (; i < c; i++)
        for (int64_t k = 0; k < some; k++) to[i * ROWS + k] = source[k * stride + i];
    }
  }
}

static void scatter(float* into, const Bank& bank, int64_t row, int64_t rows,
                    const Member* member, const bool* changed, int many, const Block* tile) {
  int64_t blocks = blocks_of(rows), c = bank.c, stride = bank.features;
  for (int64_t r = 0; r < rows; r += 4) {
    for (int m = 0; m < many; m++) {
      if (!changed[m]) continue;
      float* to = into + (row + r) * stride + member[m].column;
      const float* source = (const float*)(tile + (m * blocks + r / ROWS) * c) + r % ROWS;
      int64_t i = 0, some = std::min<int64_t>(4, rows - r);
      if (some == 4)
        for (; i + 4 <= c; i += 4) {
          Four p = load4(source + i * ROWS), q = load4(source + (i + 1) * ROWS);
          Four s = load4(source + (i + 2) * ROWS), t = load4(source + (i + 3) * ROWS);
          transpose4(p, q, s, t);
          store4(to + i, p);
          store4(to + stride + i, q);
          store4(to + 2 * stride + i, s);
          store4(to + 3 * stride + i, t);
        }
      for (; i < c; i++)
        for (int64_t k = 0; k < some; k++) to[k * stride + i] = source[i * ROWS + k];
    }
  }
}

// out[n] = bias[n] + sum over k of w[n * sn + k * sk] * x[k]
template <int N>
static inline void product(Block* out, const float* w, int64_t sn, int64_t sk, const Block* x,
                           int64_t depth, const float* bias) {
  Block sums[N];
  for (int n = 0; n < N; n++) sums[n] = bias ? splat(bias[n]) : splat(0.0f);
  for (int64_t k = 0; k < depth; k++)
    for (int n = 0; n < N; n++) sums[n] = sums[n] + w[n * sn + k * sk] * x[k];
  for (int n = 0; n < N; n++) out[n] = sums[n];
}

static void products(Block* out, int64_t many, const float* w, int64_t sn, int64_t sk,
                     const Block* x, int64_t depth, const float* bias) {
  int64_t n = 0;
  auto next = [&](auto take) {
    constexpr int N = decltype(take)::value;
    product<N>(out + n, w + n * sn, sn, sk, x, depth, bias ? bias + n : nullptr);
    n += N;
  };
  while (n + WIDE <= many) next(std::integral_constant<int, WIDE>());
  if (n + WIDE / 2 <= many) next(std::integral_constant<int, WIDE / 2>());
  while (n < many) next(std::integral_constant<int, 1>());
}

static inline bool sound(const float* numbers, int64_t many) {
  int32_t ill = 0;
  for (int64_t i = 0; i < many; i++) {
    int32_t bits;
    memcpy(&bits, numbers + i, 4);
    ill |= (bits & 0x7f800000) == 0x7f800000;
  }
  return !ill;
}

// A blueprint's numbers at one slot: weight, bias, weight, bias, or scale and shift.
struct Blueprint {
  const float *w1, *b1, *w2, *b2;
  bool sane;

  Blueprint(const Bank& bank, const float* const* params, int64_t slot) {
    int64_t many = bank.c * (bank.h ? bank.h : 1);
    w1 = params[0] + slot * many;
    b1 = bank.bias ? params[1] + slot * bank.h : nullptr;
    w2 = params[bank.bias ? 2 : 1] + slot * many;
    b2 = bank.bias ? params[3] + slot * bank.c : nullptr;
    sane = sound(w1, many) && sound(w2, many);
    if (bank.bias) sane = sane && sound(b1, bank.h) && sound(b2, bank.c);
  }

  // f, of one block of rows; `hidden` is what went into the second product.
  void run(const Bank& bank, const Block* z, Block* hidden, Block* f) const {
    if (!bank.h) {
      for (int64_t i = 0; i < bank.c; i++) f[i] = w1[i] * z[i] + splat(w2[i]);
      return;
    }
    products(hidden, bank.h, w1, bank.c, 1, z, bank.c, b1);
    if (bank.act)
      for (int64_t j = 0; j < bank.h; j++) hidden[j] = choose(hidden[j] < 0.0f, splat(0.0f), hidden[j]);
    products(f, bank.c, w2, bank.h, 1, hidden, bank.h, b2);
    if (bank.residual)
      for (int64_t i = 0; i < bank.c; i++) f[i] = f[i] + z[i];
  }
};

}  // namespace kasmina
