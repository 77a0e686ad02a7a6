// How active chunks come out of rows and go back: transposed, so that rows are lanes.
// A tile is the chunks of a few seeds in up to MOST rows, as blocks [seed][block][feature].
#include <memory>
#include <vector>

namespace kasmina {

constexpr int MOST = 128;     // rows of a tile: with its neighbours it fits a core's own cache
constexpr int COLUMNS = 64;   // features of a tile, about: whole cache lines where seeds lie together
constexpr int64_t TASKS = 32; // about so many, whatever the threads: sums do not depend on these
constexpr int64_t SUMS = 1 << 24;  // numbers that all parts have together, about
constexpr int STACKS = 6;     // that a blueprint has, at most

static inline int64_t blocks_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

// What a bank is, and how its rows and seeds are shared out; numbers only, read from `sizes`.
struct Bank {
  int64_t rows, features, offset, first_seed, count, active, places, slots, capacity, c, h;
  int64_t act, bias, residual, norm, threads;
  int64_t seeds_of_a_tile, batches, parts, rows_of_a_part;
  int64_t together;  // blocks that go through a blueprint at a time: all, where weights are large
  int stacks = 0;
  int64_t numbers[STACKS];  // that a slot has in each stack
  int64_t width = 0;        // in all of them

  // With `sums` every part of the rows has sums of its own, which may be large.
  Bank(const int64_t* n, bool sums)
      : rows(n[0]), features(n[1]), offset(n[2]), first_seed(n[3]), count(n[4]), active(n[5]),
        places(n[6]), slots(n[7]), capacity(n[8]), c(n[9]), h(n[10]), act(n[11]), bias(n[12]),
        residual(n[13]), norm(n[14]), threads(n[15]) {
    auto stack = [&](bool there, int64_t many) {
      if (there) numbers[stacks++] = many, width += many;
    };
    stack(scaled(), c), stack(scaled(), c);
    stack(h, h * c), stack(h && bias, h), stack(h, c * h), stack(h && bias, c);
    seeds_of_a_tile = std::max<int64_t>(1, COLUMNS / c);
    batches = (active + seeds_of_a_tile - 1) / seeds_of_a_tile;
    together = c > COLUMNS ? MOST / ROWS : BESIDE;
    int64_t tiles = (rows + MOST - 1) / MOST;
    int64_t wanted = std::min(tiles, TASKS / std::max<int64_t>(1, batches));
    if (sums) wanted = std::min(wanted, SUMS / std::max<int64_t>(1, slots * places * width));
    wanted = std::max<int64_t>(1, wanted);
    rows_of_a_part = std::max<int64_t>(1, (tiles + wanted - 1) / wanted) * MOST;
    parts = std::max<int64_t>(1, (rows + rows_of_a_part - 1) / rows_of_a_part);
  }

  // Whether a scale and a shift for each feature come first; without products they are all.
  bool scaled() const { return norm || !h; }

  int64_t everyone() const { return slots * places; }

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

}  // namespace kasmina
