// Products of a blueprint's weights with blocks of rows, and the sums that are gradients of weights.
#include <algorithm>
#include <cstddef>
#include <type_traits>

namespace kasmina {

constexpr int WIDE = PARTS == 1 ? 8 : PARTS == 2 ? 4 : 2;  // sums that registers hold, of a block
constexpr int BESIDE = PARTS == 1 ? 2 : 1;  // blocks that are multiplied at a time
constexpr int NARROW = 8;    // features, too few to be lanes
constexpr int64_t FAR = 256;  // numbers from one row of weights to the next
constexpr int64_t DEEP = 64;  // rows of such weights at a time

// out[b][n] += sum over k of w[n * sn + k * sk] * x[b][k], of B blocks. Those of `out` have `many`
// features, those of x have `wide`. The first sums start from the bias.
template <int N, int B>
static inline void product(Block* out, int64_t many, const float* w, int64_t sn, int64_t sk,
                           const Block* x, int64_t wide, int64_t depth, bool first,
                           const float* bias) {
  Block sums[N][B];
  for (int n = 0; n < N; n++)
    for (int b = 0; b < B; b++)
      sums[n][b] = !first ? out[b * many + n] : bias ? splat(bias[n]) : splat(0.0f);
  for (int64_t k = 0; k < depth; k++) {
    Block each[B];
    for (int b = 0; b < B; b++) each[b] = x[b * wide + k];
    for (int n = 0; n < N; n++) {
      float weight = w[n * sn + k * sk];
      for (int b = 0; b < B; b++) sums[n][b] = sums[n][b] + weight * each[b];
    }
  }
  for (int n = 0; n < N; n++)
    for (int b = 0; b < B; b++) out[b * many + n] = sums[n][b];
}

// out[b][n] = bias[n] + sum over k of w[n * sn + k * sk] * x[b][k]
static void products(Block* out, int64_t many, const float* w, int64_t sn, int64_t sk,
                     const Block* x, int64_t depth, int64_t blocks, const float* bias) {
  // Rows of weights that lie pages apart: some at a time, in columns that stay in a cache.
  bool far = sn == 1 && sk >= FAR && blocks > BESIDE;
  int64_t step = far ? DEEP : std::max<int64_t>(1, depth);
  float near[DEEP * WIDE];
  for (int64_t k = 0, n = 0; k < std::max<int64_t>(1, depth); k += step, n = 0) {
    int64_t deep = std::min(step, depth - k);
    auto next = [&](auto take) {
      constexpr int N = decltype(take)::value;
      const float *from = w + n * sn + k * sk, *add = bias ? bias + n : nullptr;
      for (int64_t i = 0; far && i < deep; i++) memcpy(near + i * N, from + i * sk, N * sizeof(float));
      if (far) from = near;
      int64_t b = 0, apart = far ? N : sk;
      for (; b + BESIDE <= blocks; b += BESIDE)
        product<N, BESIDE>(out + b * many + n, many, from, sn, apart, x + b * depth + k, depth, deep,
                           k == 0, add);
      for (; b < blocks; b++)
        product<N, 1>(out + b * many + n, many, from, sn, apart, x + b * depth + k, depth, deep,
                      k == 0, add);
      n += N;
    };
    while (n + WIDE <= many) next(std::integral_constant<int, WIDE>());
    if (n + WIDE / 2 <= many) next(std::integral_constant<int, WIDE / 2>());
    while (n < many) next(std::integral_constant<int, 1>());
  }
}

// Features as lanes: panels of up to BESIDE * ROWS features of all rows, padded with zeros to whole
// blocks' widths.
constexpr int64_t PANEL = BESIDE * ROWS;

static void laid_flat(float* flat, const Block* x, int64_t N, int64_t blocks) {
  for (int64_t n = 0; n < N; n += PANEL) {
    int64_t width = std::min<int64_t>(PANEL, (N - n + ROWS - 1) / ROWS * ROWS);
    int64_t many = std::min(width, N - n);
    for (int64_t r = 0; r < blocks * ROWS; r += 4, flat += 4 * width) {
      const float* from = (const float*)(x + r / ROWS * N + n) + r % ROWS;
      int64_t i = 0;
      for (; i + 4 <= many; i += 4) {
        Four a = load4(from + i * ROWS), b = load4(from + (i + 1) * ROWS);
        Four c = load4(from + (i + 2) * ROWS), d = load4(from + (i + 3) * ROWS);
        transpose4(a, b, c, d);
        store4(flat + i, a), store4(flat + width + i, b);
        store4(flat + 2 * width + i, c), store4(flat + 3 * width + i, d);
      }
      for (; i < width; i++)
        for (int k = 0; k < 4; k++) flat[k * width + i] = i < many ? from[i * ROWS + k] : 0.0f;
    }
  }
}

// Of HIGH features of `a` and a panel V blocks wide, of whose last one `last` features are there.
template <int HIGH, int V>
static inline void outer_flat(float* sums, const Block* a, int64_t M, const float* flat, int64_t N,
                              int64_t last, int64_t blocks) {
  Block found[HIGH][V] = {};
  for (int64_t b = 0; b < blocks; b++) {
    const float* left = (const float*)(a + b * M);
    for (int r = 0; r < ROWS; r++, flat += V * ROWS) {
      Block right[V];
      for (int j = 0; j < V; j++) memcpy((void*)&right[j], flat + j * ROWS, sizeof(Block));
      for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < V; j++) found[i][j] = found[i][j] + left[i * ROWS + r] * right[j];
    }
  }
  for (int i = 0; i < HIGH; i++)
    for (int j = 0; j < V; j++) {
      float* to = sums + i * N + j * ROWS;
      int64_t bytes = j < V - 1 ? sizeof(Block) : last * sizeof(float);
      Block before = {};
      memcpy((void*)&before, to, bytes);
      before = before + found[i][j];
      memcpy((void*)to, &before, bytes);
    }
}

// Of few features N, whose products are summed with rows as lanes.
static void outer_narrow(float* sums, const Block* a, int64_t M, const Block* x, int64_t N,
                         int64_t blocks) {
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

// sums[m * N + n] += sum over blocks and rows of a[b * M + m] * x[b * N + n]; `room` is for x.
static void outer(float* sums, const Block* a, int64_t M, const Block* x, int64_t N, int64_t blocks,
                  float* room) {
  if (N <= NARROW) return outer_narrow(sums, a, M, x, N, blocks);
  laid_flat(room, x, N, blocks);
  int64_t m = 0;
  auto next = [&](auto take) {
    constexpr int HIGH = decltype(take)::value;
    const float* panel = room;
    for (int64_t n = 0; n < N; n += PANEL, panel += PANEL * ROWS * blocks) {
      int64_t left = N - n, last = std::min<int64_t>(PANEL, left) - (BESIDE - 1) * ROWS;
      float* to = sums + m * N + n;
      if (last > 0)
        outer_flat<HIGH, BESIDE>(to, a + m, M, panel, N, last, blocks);
      else
        outer_flat<HIGH, 1>(to, a + m, M, panel, N, left, blocks);
    }
    m += HIGH;
  };
  while (m + WIDE <= M) next(std::integral_constant<int, WIDE>());
  if (m + WIDE / 2 <= M) next(std::integral_constant<int, WIDE / 2>());
  while (m < M) next(std::integral_constant<int, 1>());
}

// sums[m] += sum over blocks and rows of a[b * M + m]
static void down(float* sums, const Block* a, int64_t M, int64_t blocks) {
  for (int64_t m = 0; m < M; m += 4) {
    Block found[4] = {};
    for (int64_t b = 0; b < blocks; b++)
      for (int i = 0; i < 4; i++) found[i] = found[i] + a[b * M + std::min(m + i, M - 1)];
    Four four = sum4(found);
    for (int64_t i = 0; i < std::min<int64_t>(4, M - m); i++) sums[m + i] += four[i];
  }
}

}  // namespace kasmina
