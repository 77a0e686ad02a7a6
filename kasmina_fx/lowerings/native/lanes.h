// Sixteen rows at once: a block holds one feature of 16 rows, as one or several vector registers.
// Written in the vector extensions that GCC and Clang share, so that one source serves every CPU.
#include <cstdint>
#include <cstring>

#if defined(KASMINA_LANES)  // a test's choice
#elif defined(__AVX512F__)
#define KASMINA_LANES 16
#elif defined(__AVX__)
#define KASMINA_LANES 8
#else
#define KASMINA_LANES 4
#endif

namespace kasmina {

constexpr int ROWS = 16;  // of a block; tiles.py lays out `kept` by it
constexpr int PARTS = ROWS / KASMINA_LANES;

typedef float Lanes __attribute__((vector_size(4 * KASMINA_LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * KASMINA_LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourBits __attribute__((vector_size(16)));

// All bits of a lane are set, or none.
struct Mask {
  Bits p[PARTS];
};

struct Block {
  Lanes p[PARTS];
};

static inline Block splat(float x) {
  Block r;
  for (int i = 0; i < PARTS; i++) r.p[i] = x - (Lanes){};
  return r;
}

#define KASMINA_EACH(Type, expression)                    \
  Type r;                                                  \
  for (int i = 0; i < PARTS; i++) r.p[i] = (expression);   \
  return r;

static inline Block operator+(const Block& a, const Block& b) {
  KASMINA_EACH(Block, a.p[i] + b.p[i])
}
static inline Block operator-(const Block& a, const Block& b) {
  KASMINA_EACH(Block, a.p[i] - b.p[i])
}
static inline Block operator*(const Block& a, const Block& b) {
  KASMINA_EACH(Block, a.p[i] * b.p[i])
}
static inline Block operator*(float a, const Block& b) {
  KASMINA_EACH(Block, a * b.p[i])
}
static inline Mask operator&(const Mask& a, const Mask& b) {
  KASMINA_EACH(Mask, a.p[i] & b.p[i])
}
static inline Mask operator|(const Mask& a, const Mask& b) {
  KASMINA_EACH(Mask, a.p[i] | b.p[i])
}
static inline Mask operator~(const Mask& a) {
  KASMINA_EACH(Mask, ~a.p[i])
}
static inline Mask operator<(const Block& a, float b) {
  KASMINA_EACH(Mask, a.p[i] < b)
}
static inline Mask operator>(const Block& a, float b) {
  KASMINA_EACH(Mask, a.p[i] > b)
}

// By the exponent, which no flag of the compiler may reason away.
static inline Mask finite(const Block& a) {
  KASMINA_EACH(Mask, ((Bits)a.p[i] & 0x7f800000) != 0x7f800000)
}

// Moves bits, whatever they are: NaN and -0 come through.
static inline Block choose(const Mask& m, const Block& a, const Block& b) {
  KASMINA_EACH(Block, (Lanes)((m.p[i] & (Bits)a.p[i]) | (~m.p[i] & (Bits)b.p[i])))
}

static inline Block only(const Mask& m, const Block& a) {
  KASMINA_EACH(Block, (Lanes)(m.p[i] & (Bits)a.p[i]))
}

static inline Mask all(bool yes) {
  KASMINA_EACH(Mask, (Bits){} - (yes ? 1 : 0))
}

// The first `count` rows of a block.
static inline Mask first(int64_t count) {
  if (count >= ROWS) return all(true);
  int32_t m[ROWS];
  for (int i = 0; i < ROWS; i++) m[i] = i < count ? -1 : 0;
  Mask r;
  memcpy(&r, m, sizeof r);
  return r;
}

static inline bool any(const Mask& m) {
  int32_t v[ROWS], found = 0;
  memcpy(v, &m, sizeof v);
  for (int i = 0; i < ROWS; i++) found |= v[i];
  return found != 0;
}

static inline Four load4(const float* from) {
  Four r;
  memcpy(&r, from, sizeof r);
  return r;
}

static inline void store4(float* to, const Four& a) { memcpy(to, &a, sizeof a); }

#if defined(__clang__)
#define KASMINA_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define KASMINA_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (FourBits){i, j, k, l})
#endif

static inline void transpose4(Four& a, Four& b, Four& c, Four& d) {
  Four ab = KASMINA_PICK(a, b, 0, 4, 1, 5), cd = KASMINA_PICK(c, d, 0, 4, 1, 5);
  Four AB = KASMINA_PICK(a, b, 2, 6, 3, 7), CD = KASMINA_PICK(c, d, 2, 6, 3, 7);
  a = KASMINA_PICK(ab, cd, 0, 1, 4, 5);
  b = KASMINA_PICK(ab, cd, 2, 3, 6, 7);
  c = KASMINA_PICK(AB, CD, 0, 1, 4, 5);
  d = KASMINA_PICK(AB, CD, 2, 3, 6, 7);
}

// Four sums of a block's rows, always in the same order.
static inline Four sum4(const Block* blocks) {
  Four s[4];
  for (int i = 0; i < 4; i++) {
    float v[ROWS];
    memcpy(v, &blocks[i], sizeof v);
    s[i] = (load4(v) + load4(v + 8)) + (load4(v + 4) + load4(v + 12));
  }
  transpose4(s[0], s[1], s[2], s[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// The larger magnitude of each lane, NaN above all.
static inline Block larger(const Block& a, const Block& b) {
  Block r;
  for (int i = 0; i < PARTS; i++) {
    Bits left = (Bits)a.p[i] & 0x7fffffff, right = (Bits)b.p[i] & 0x7fffffff;
    Bits mine = left > right;
    r.p[i] = (Lanes)((mine & left) | (~mine & right));
  }
  return r;
}

static inline float largest(const Block& block) {
  int32_t v[ROWS], top = 0;
  memcpy(v, &block, sizeof v);
  for (int i = 0; i < ROWS; i++) top = (v[i] & 0x7fffffff) > top ? v[i] & 0x7fffffff : top;
  float r;
  memcpy(&r, &top, 4);
  return r;
}

static inline float sum(const Block& block) {
  Block four[4] = {block, {}, {}, {}};
  return sum4(four)[0];
}

}  // namespace kasmina
