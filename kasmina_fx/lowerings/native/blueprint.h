// What a blueprint computes, and the gradients of its numbers:
//   affine      z * scale + shift
//   others      act(n W1 + b1) W2 + b2 [+ z], where n is z, or for a bottleneck its LayerNorm
namespace kasmina {

constexpr int RELU = 1, GELU = 2;
constexpr int64_t LONG = 512;  // weights of a product that takes longer than to find it can be left

// The largest magnitude, NaN or infinite where one is.
static inline float largest(const float* numbers, int64_t many) {
  int32_t top = 0;
  for (int64_t i = 0; i < many; i++) {
    int32_t bits;
    memcpy(&bits, numbers + i, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float r;
  memcpy(&r, &top, 4);
  return r;
}

static inline bool sound(const float* numbers, int64_t many) {
  float top = largest(numbers, many);
  int32_t bits;
  memcpy(&bits, &top, 4);
  return bits < 0x7f800000;
}

// What is known of a slot before its rows are read.
struct Known {
  bool sane;              // all its numbers are finite
  float steepest, added;  // the largest sum of weights that a hidden number meets, and bias
};

// Room for what a blueprint makes on its way. The first three, [block][feature], a backward needs
// of all blocks of a tile; the others are of blocks that go through together.
struct Inside {
  Block *normed, *hidden, *inner;  // what enters the products, and the gradient between them
  Block *scaled, *slope, *inverse; // z less its mean, by its deviation; of the GELU; 1 / deviation
  Block *scales, *shifts;          // gradients of these, sums of a tile

  static int64_t numbers(const Bank& bank, int64_t deep) {
    int64_t few = bank.norm ? bank.c * (deep + bank.together + 2) + bank.together : 0;
    return few + bank.h * (2 * deep + bank.together);
  }

  Inside(const Bank& bank, int64_t deep, Block* room) {
    auto next = [&](int64_t many) {
      Block* mine = room;
      room += many;
      return mine;
    };
    int64_t c = bank.norm ? bank.c : 0;
    normed = next(deep * c), scaled = next(bank.together * c), scales = next(c), shifts = next(c);
    inverse = next(c ? bank.together : 0);
    hidden = next(deep * bank.h), inner = next(deep * bank.h), slope = next(bank.together * bank.h);
  }

  void begin(const Bank& bank) const {
    for (int64_t i = 0; bank.norm && i < bank.c; i++) scales[i] = shifts[i] = splat(0.0f);
  }

  // The same room, from a block on.
  Inside from(const Bank& bank, int64_t block) const {
    Inside r = *this;
    if (bank.norm) r.normed += block * bank.c;
    r.hidden += block * bank.h, r.inner += block * bank.h;
    return r;
  }
};

// A blueprint's numbers at one slot.
struct Blueprint {
  const float *scale, *shift, *w1, *b1, *w2, *b2;
  const float* each[STACKS];

  Blueprint(const Bank& bank, const float* const* params, int64_t slot) {
    for (int i = 0; i < bank.stacks; i++) each[i] = params[i] + slot * bank.numbers[i];
    const float* const* next = each;
    auto take = [&](bool there) { return there ? *next++ : nullptr; };
    scale = take(bank.scaled()), shift = take(bank.scaled());
    w1 = take(bank.h), b1 = take(bank.h && bank.bias);
    w2 = take(bank.h), b2 = take(bank.h && bank.bias);
  }

  Known known(const Bank& bank) const {
    Known r = {true, 0, 0};
    for (int i = 0; i < bank.stacks; i++) r.sane = r.sane && sound(each[i], bank.numbers[i]);
    if (w2) r.steepest = bank.h * largest(w2, bank.h * bank.c);
    if (b2) r.added = largest(b2, bank.c);
    return r;
  }

  // Whether no element of f or of a blend can be but finite: then f need not be known to say so.
  bool bounded(const Bank& bank, const Known& known, const Block* z, int64_t blocks,
               const Inside& in) const {
    Block chunk = splat(0.0f), hidden = splat(0.0f);
    for (int64_t i = 0; i < blocks * bank.c; i++) chunk = larger(chunk, z[i]);
    for (int64_t j = 0; j < blocks * bank.h; j++) hidden = larger(hidden, in.hidden[j]);
    return known.steepest * largest(hidden) + known.added + 3 * largest(chunk) < 1e38f;
  }

  // f, of some blocks of rows.
  void run(const Bank& bank, const Block* z, int64_t blocks, const Inside& in, Block* f) const {
    begin(bank, z, blocks, in);
    end(bank, z, blocks, in, f);
  }

  // The hidden layer.
  void begin(const Bank& bank, const Block* z, int64_t blocks, const Inside& in) const {
    int64_t c = bank.c, h = bank.h;
    if (bank.norm)
      for (int64_t b = 0; b < blocks; b++) normalise(c, z + b * c, in, b);
    if (h) products(in.hidden, h, w1, c, 1, bank.norm ? in.normed : z, c, blocks, b1);
    for (int64_t j = 0; j < blocks * h; j++) {
      Block& u = in.hidden[j];
      if (bank.act == RELU) u = choose(u < 0.0f, splat(0.0f), u);
      if (bank.act == GELU) in.slope[j] = gelu(u);
    }
  }

  // What comes of it.
  void end(const Bank& bank, const Block* z, int64_t blocks, const Inside& in, Block* f) const {
    int64_t c = bank.c, h = bank.h;
    if (!h) {
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = 0; i < c; i++) f[b * c + i] = scale[i] * z[b * c + i] + splat(shift[i]);
      return;
    }
    products(f, c, w2, h, 1, in.hidden, h, blocks, b2);
    if (bank.residual)
      for (int64_t i = 0; i < blocks * c; i++) f[i] = f[i] + z[i];
  }

  // A LayerNorm in two passes. Each number is divided before it is added: sums stay in range. NaN
  // where the variance is not finite; plain operators are NaN there or 0, as sums fall.
  void normalise(int64_t c, const Block* z, const Inside& in, int64_t b) const {
    Block mean = splat(0.0f), spread = splat(0.0f), *scaled = in.scaled + b * c;
    for (int64_t i = 0; i < c; i++) mean = mean + (1.0f / c) * z[i];
    for (int64_t i = 0; i < c; i++) scaled[i] = z[i] - mean;
    for (int64_t i = 0; i < c; i++) spread = spread + (1.0f / c) * scaled[i] * scaled[i];
    Block inverse = in.inverse[b] = inverse_root(spread + splat(1e-5f));
    for (int64_t i = 0; i < c; i++) {
      scaled[i] = scaled[i] * inverse;
      in.normed[b * c + i] = scale[i] * scaled[i] + splat(shift[i]);
    }
  }

  // dx, the gradient of the blueprint's input, of blocks that ran just before.
  void back(const Bank& bank, const Block* df, int64_t blocks, const Inside& in, Block* dx) const {
    int64_t c = bank.c, h = bank.h;
    if (h) {
      products(in.inner, h, w2, 1, h, df, c, blocks, nullptr);
      for (int64_t j = 0; j < blocks * h; j++) {
        Block& dh = in.inner[j];
        if (bank.act == RELU) dh = only(in.hidden[j] > 0.0f, dh);
        if (bank.act == GELU) dh = dh * in.slope[j];
      }
      products(dx, c, w1, 1, c, in.inner, h, blocks, nullptr);
    }
    for (int64_t b = 0; b < blocks; b++) {
      if (!h)
        for (int64_t i = 0; i < c; i++) dx[b * c + i] = scale[i] * df[b * c + i];
      if (bank.norm) unnormalise(c, dx + b * c, in, b);
    }
    if (bank.residual)
      for (int64_t i = 0; i < blocks * c; i++) dx[i] = dx[i] + df[i];
  }

  void unnormalise(int64_t c, Block* dx, const Inside& in, int64_t b) const {
    Block mean = splat(0.0f), along = splat(0.0f), *scaled = in.scaled + b * c;
    for (int64_t i = 0; i < c; i++) {
      in.scales[i] = in.scales[i] + dx[i] * scaled[i];
      in.shifts[i] = in.shifts[i] + dx[i];
      dx[i] = scale[i] * dx[i];
      mean = mean + (1.0f / c) * dx[i];
      along = along + (1.0f / c) * dx[i] * scaled[i];
    }
    for (int64_t i = 0; i < c; i++) dx[i] = in.inverse[b] * (dx[i] - mean - along * scaled[i]);
  }

  // Adds what a tile's rows are for the gradients to sums, stack by stack; z is written over.
  static void add(const Bank& bank, float* const* to, Block* z, const Block* df, int64_t blocks,
                  const Inside& in, float* room) {
    int64_t c = bank.c, h = bank.h;
    if (!h) {
      for (int64_t i = 0; i < blocks * c; i++) z[i] = z[i] * df[i];
      down(to[0], z, c, blocks);
      down(to[1], df, c, blocks);
      return;
    }
    if (bank.norm) {
      down(*to++, in.scales, c, 1);
      down(*to++, in.shifts, c, 1);
    }
    outer(*to++, in.inner, h, bank.norm ? in.normed : z, c, blocks, room);
    if (bank.bias) down(*to++, in.inner, h, blocks);
    outer(*to++, df, c, in.hidden, h, blocks, room);
    if (bank.bias) down(*to++, df, c, blocks);
  }
};

}  // namespace kasmina
