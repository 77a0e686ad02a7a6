// One step's statistics of an output, merged where they are kept: ../triton/notes.py, `observe`.
// Here features are lanes: one pass over rows, four vectors beside each other.
#include <cmath>

namespace kasmina {

constexpr int64_t SLAB = 1024;  // rows whose sums are kept in float32

// What is summed up of a feature, around the first element of its chunk.
struct Sums {
  double first, second, near;
  float low, high;
};

// N vectors of neighbouring features, of which the last may have only `last` lanes.
template <int N>
static void slab(const float* y, int64_t features, const float* start, int64_t from, int64_t to,
                 int64_t step, int64_t rest, int64_t seen, int last, Sums* sums) {
  Lanes s1[N] = {}, s2[N] = {}, low[N], high[N], origin[N] = {};
  Bits near[N] = {};
  for (int n = 0; n < N; n++) {
    low[n] = INFINITY - (Lanes){}, high[n] = -INFINITY - (Lanes){};
    memcpy(&origin[n], start + n * KASMINA_LANES, (n == N - 1 ? last : KASMINA_LANES) * 4);
  }
  for (int64_t number = from; number < to; number++) {
    const float* row = y + (number * step + number * rest / seen + number % step) * features;
    for (int n = 0; n < N; n++) {
      Lanes z = origin[n];
      if (N > 1 || last == KASMINA_LANES)
        memcpy(&z, row + n * KASMINA_LANES, sizeof z);
      else
        memcpy(&z, row, last * 4);
      Lanes q = z - origin[n];
      s1[n] += q;
      s2[n] += q * q;
      low[n] = z < low[n] ? z : low[n];
      high[n] = z > high[n] ? z : high[n];
      near[n] -= (Lanes)((Bits)z & 0x7fffffff) < 1e-6f;
    }
  }
  for (int n = 0; n < N; n++)
    for (int i = 0; i < (n == N - 1 ? last : KASMINA_LANES); i++) {
      Sums& mine = sums[n * KASMINA_LANES + i];
      mine.first += s1[n][i], mine.second += s2[n][i], mine.near += near[n][i];
      mine.low = std::min(mine.low, low[n][i]), mine.high = std::max(mine.high, high[n][i]);
    }
}

struct Run {
  int64_t features, offset, first_seed, count, seeds, rows, seen, c, threads;
};

// Merge by the pairwise update of Chan, Golub and LeVeque; lines as in physical/statistics.py.
static void merge(float* t, const float* told, int64_t stride, const Sums& step, double elements,
                  float begin) {
  float step_mean = step.first / elements;
  float spread = step.second - step.first * (step.first / elements);
  if (spread < 0) spread = 0;
  float phase = t[8 * stride];
  bool fits = std::abs(begin + spread) < INFINITY;
  if (phase == 0 && fits) {
    float before = t[0];
    if (before == 0) t[3 * stride] = begin;
    float total = before + (float)elements, delta = (begin - t[3 * stride]) + step_mean - t[stride];
    float shift = delta * ((float)elements / total);
    t[0] = total;
    t[stride] += shift;
    t[2 * stride] += spread + delta * shift * before;
    t[4 * stride] = before == 0 ? step.low : std::min(t[4 * stride], step.low);
    t[5 * stride] = before == 0 ? step.high : std::max(t[5 * stride], step.high);
    t[6 * stride] += step.near;
  } else if (phase == 0) {
    t[7 * stride] += 1;
  }
  t[8 * stride] = phase + 1 >= t[9 * stride] ? 0.0f : phase + 1;
  if (!told) return;
  t[10 * stride] += told[0];
  float loss = told[stride];
  if (!(loss >= 0 && loss < INFINITY)) return;
  float weight = t[11 * stride] == 0 ? 1.0f : 0.1f;
  t[11 * stride] += 1;
  t[12 * stride] += weight * (loss - t[12 * stride]);
  t[13 * stride] += weight * (told[2 * stride] - t[13 * stride]);
}

static void observe(float* telemetry, const float* y, const float* notes, const Run& run) {
  constexpr int TOGETHER = 4 * KASMINA_LANES;
  int64_t c = run.c, step = run.rows / run.seen, rest = run.rows % run.seen;
  int64_t group = std::max<int64_t>(1, 2 * TOGETHER / c);  // seeds of a task
  int64_t groups = (run.count + group - 1) / group, slabs = (run.seen + SLAB - 1) / SLAB;
  int64_t wanted = std::max<int64_t>(1, std::min(slabs, TASKS / groups));
  int64_t rows_of_a_part = (slabs + wanted - 1) / wanted * SLAB;
  int64_t parts = (run.seen + rows_of_a_part - 1) / rows_of_a_part, width = run.count * c;
  std::vector<Sums> sums(parts * width, Sums{0, 0, 0, INFINITY, -INFINITY});
  std::vector<float> start(width);
  for (int64_t f = 0; f < width; f++) start[f] = y[run.offset + f / c * c];
  bool small = run.seen * width < 200000;
#pragma omp parallel for num_threads(small ? 1 : std::min(run.threads, parts * groups)) schedule(static)
  for (int64_t task = 0; task < parts * groups; task++) {
    int64_t part = task / groups, end = std::min(run.seen, (part + 1) * rows_of_a_part);
    int64_t begin = task % groups * group * c, stop = std::min(width, begin + group * c);
    for (int64_t row = part * rows_of_a_part; row < end; row += SLAB) {
      int64_t f = begin, last = std::min(end, row + SLAB);
      auto next = [&](auto take, int lanes) {
        constexpr int N = decltype(take)::value;
        slab<N>(y + run.offset + f, run.features, start.data() + f, row, last, step, rest, run.seen,
                lanes, sums.data() + part * width + f);
        f += (N - 1) * KASMINA_LANES + lanes;
      };
      while (f + TOGETHER <= stop) next(std::integral_constant<int, 4>(), KASMINA_LANES);
      while (f < stop)
        next(std::integral_constant<int, 1>(), std::min<int64_t>(KASMINA_LANES, stop - f));
    }
  }
  for (int64_t seed = 0; seed < run.count; seed++) {
    Sums total{0, 0, 0, INFINITY, -INFINITY};
    for (int64_t part = 0; part < parts; part++)
      for (int64_t f = seed * c; f < (seed + 1) * c; f++) {
        const Sums& mine = sums[part * width + f];
        total.first += mine.first, total.second += mine.second, total.near += mine.near;
        total.low = std::min(total.low, mine.low), total.high = std::max(total.high, mine.high);
      }
    int64_t at = run.first_seed + seed;
    merge(telemetry + at, notes ? notes + at : nullptr, run.seeds, total, 1.0 * run.seen * c,
          start[seed * c]);
  }
}

}  // namespace kasmina

extern "C" void kasmina_observe(const int64_t* n, float* telemetry, const float* y,
                                const float* notes) {
  kasmina::observe(telemetry, y, notes, {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]});
}
