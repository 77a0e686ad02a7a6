// What blueprints compute of single numbers, a block of rows at a time.
#include <cmath>

namespace kasmina {

// exp(x) of what is not positive, to 2 units in the last place; 0 below -86. The polynomial is that
// of Cephes (Moshier, expf).
static inline Lanes exponential(const Lanes& x) {
  const float up = 12582912.0f;  // added, it rounds to whole numbers
  Lanes shifted = x * 1.44269504f + up, n = shifted - up;
  Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Bits exponent = ((Bits)shifted - (Bits)(up + (Lanes){})) << 23;
  return (Lanes)(~(x < -86.0f) & ((Bits)p + exponent));  // a NaN is not below
}

// The normal distribution at x, and exp(-x * x / 2). Mills' ratio is a polynomial of
// 1 / (1 + 0.35 |x|), the form of Hastings' approximations (Abramowitz and Stegun 7.1.26), fitted
// so that the relative error is 3e-7 at both ends.
static inline void normal(const Lanes& x, Lanes& below, Lanes& bell) {
  bell = exponential(-0.5f * x * x);
  Lanes size = (Lanes)((Bits)x & 0x7fffffff), k = 1.0f / (1.0f + 0.35f * size);
  Lanes q = -0.02914457395672798f * k + 0.14396561682224274f;
  q = q * k - 0.2557027041912079f;
  q = q * k + 0.15916204452514648f;
  q = q * k - 0.02310214377939701f;
  q = q * k + 0.10550499707460403f;
  q = q * k + 0.1198335736989975f;
  q = q * k + 0.13986177742481232f;
  q = q * k + 0.13962140679359436f;
  Lanes tail = bell * (q * k);
  Bits left = x < 0.0f;
  below = (Lanes)((left & (Bits)tail) | (~left & (Bits)(1.0f - tail)));
}

// GELU of x in its place, and its slope there.
static inline Block gelu(Block& x) {
  Block slope;
  for (int i = 0; i < PARTS; i++) {
    Lanes below, bell, z = x.p[i];
    normal(z, below, bell);
    x.p[i] = z * below;
    slope.p[i] = below + 0.3989422804f * z * bell;
  }
  return slope;
}

// 1 / sqrt(x), and NaN where x is not finite.
static inline Block inverse_root(const Block& x) {
  float v[ROWS];
  memcpy(v, &x, sizeof v);
  for (int i = 0; i < ROWS; i++) v[i] = 1.0f / std::sqrt(v[i]);
  Block r;
  memcpy((void*)&r, v, sizeof v);
  return choose(finite(x), r, splat(NAN));
}

}  // namespace kasmina
