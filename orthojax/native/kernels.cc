// Compiled twice: with 8 lanes for AVX2 and FMA, and with 16 for AVX-512. No standard header is
// included, so that no inline function of theirs is compiled for an instruction set by chance.

#include "kernels.h"

namespace orthojax {
namespace {

constexpr long L = ORTHOJAX_LANES;

typedef float Vec __attribute__((vector_size(L * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec zero() { return Vec{} ; }
inline long least(long a, long b) { return a < b ? a : b; }
inline long most(long a, long b) { return a > b ? a : b; }

// out[p][0 .. V*L) = sum over taps and c of in[tap][p * in_step + c] * w[tap][c * w_step + ...].
struct Product {
  const float* in[kMaxTaps];
  const float* weights[kMaxTaps];
  long taps, depth, in_step, weight_step, out_step;
  float* out;
};

// For pixels p to p + P * blocks, and vectors v to v + V * L.
template <int V, int P>
void multiply(const Product& product, long p, long v, long blocks) {
  const long step = product.in_step, weight_step = product.weight_step, depth = product.depth;
  const long out_step = product.out_step, taps = product.taps;
  float* out = product.out + p * out_step + v;
  for (long block = 0; block < blocks; ++block, p += P) {
    Vec sum[P][V];
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) sum[i][j] = zero();
    for (long tap = 0; tap < taps; ++tap) {
      const float* in = product.in[tap] + p * step;
      const float* weights = product.weights[tap] + v;
      for (long c = 0; c < depth; ++c) {
        Vec w[V];
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) w[j] = load(weights + j * L);
#pragma GCC unroll 24
        for (int i = 0; i < P; ++i) {
          const float x = in[i * step];
#pragma GCC unroll 2
          for (int j = 0; j < V; ++j) sum[i][j] += x * w[j];
        }
        ++in;
        weights += weight_step;
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < P; ++i, out += out_step)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) store(out + j * L, sum[i][j]);
  }
}

typedef void (*Multiply)(const Product&, long, long, long);

#if ORTHOJAX_LANES == 8  // 16 registers
constexpr long kMostOfOne = 12, kMostOfTwo = 6;
#else  // 32 registers
constexpr long kMostOfOne = 24, kMostOfTwo = 12;
#endif

template <int V, int P>
struct Table {
  static Multiply at(long p) { return p == P ? multiply<V, P> : Table<V, P - 1>::at(p); }
};
template <int V>
struct Table<V, 0> {
  static Multiply at(long) { return nullptr; }
};

// All pixels, in the fewest blocks of nearly equal size.
template <int V, int Most>
void multiply_all(const Product& product, long count, long v) {
  if (count < 1) return;
  const long blocks = (count + Most - 1) / Most, size = count / blocks, larger = count % blocks;
  if (larger) Table<V, Most>::at(size + 1)(product, 0, v, larger);
  Table<V, Most>::at(size)(product, larger * (size + 1), v, blocks - larger);
}

// All of `width` output channels, for `count` pixels.
void multiply_block(const Product& product, long count, long width) {
  long v = 0;
  for (; v + 2 * L <= width; v += 2 * L) multiply_all<2, kMostOfTwo>(product, count, v);
  if (v < width) multiply_all<1, kMostOfOne>(product, count, v);
}

void gather_images(const Gather& g, const float* in, const float* weights, float* out, long first,
                   long last) {
  const long in_size = g.in_rows * g.in_columns * g.in_channels;
  const long out_size = g.out_rows * g.out_columns * g.out_channels;
  Product product;
  product.depth = g.in_channels;
  product.in_step = in_size;
  product.weight_step = g.out_channels;
  product.out_step = out_size;
  for (long index = 0; index < g.phases; ++index) {
    const Phase& phase = g.phase[index];
    for (long i = 0; i < phase.rows; ++i)
      for (long j = 0; j < phase.columns; ++j) {
        long taps = 0;
        for (long t = 0; t < phase.count; ++t) {
          const long row = i * g.in_step + phase.taps[t].row;
          const long column = j * g.in_step + phase.taps[t].column;
          if (row < 0 || row >= g.in_rows || column < 0 || column >= g.in_columns) continue;
          product.in[taps] =
              in + first * in_size + (row * g.in_columns + column) * g.in_channels;
          product.weights[taps++] =
              weights + phase.taps[t].weight * g.in_channels * g.out_channels;
        }
        product.taps = taps;
        const long row = i * g.out_step + phase.row, column = j * g.out_step + phase.column;
        product.out = out + first * out_size + (row * g.out_columns + column) * g.out_channels;
        multiply_block(product, last - first, g.out_channels);
      }
  }
}

void copy(const float* from, float* to, long count) {
  long c = 0;
  for (; c + L <= count; c += L) store(to + c, load(from + c));
  for (; c < count; ++c) to[c] = from[c];
}

void clear(float* to, long count) {
  for (long c = 0; c < count; ++c) to[c] = 0;
}

void gather_rows(const Gather& g, const float* in, const float* weights, float* out, long image,
                 long first, long last, float* scratch) {
  long top = 0, bottom = 0, left = 0, right = 0, columns = 0;
  for (long index = 0; index < g.phases; ++index) {
    const Phase& phase = g.phase[index];
    columns = most(columns, phase.columns);
    for (long t = 0; t < phase.count; ++t) {
      top = least(top, phase.taps[t].row), bottom = most(bottom, phase.taps[t].row);
      left = least(left, phase.taps[t].column), right = most(right, phase.taps[t].column);
    }
  }
  const long channels = g.in_channels;
  const float* base = in + image * g.in_rows * g.in_columns * channels;
  const long begin = first * g.in_step + top, end = (last - 1) * g.in_step + bottom + 1;
  const long width = (columns - 1) * g.in_step + right + 1 - left;
  long pitch = g.in_columns * channels;
  if (begin >= 0 && end <= g.in_rows && left >= 0 && width <= g.in_columns) {
    base += begin * pitch;
  } else {
    const long padded = width * channels;
    for (long row = begin; row < end; ++row) {
      float* to = scratch + (row - begin) * padded;
      if (row < 0 || row >= g.in_rows) {
        clear(to, padded);
        continue;
      }
      const long before = -left, present = least(g.in_columns, width - before);
      clear(to, before * channels);
      copy(base + row * pitch, to + before * channels, present * channels);
      clear(to + (before + present) * channels, (width - before - present) * channels);
    }
    base = scratch;
    pitch = padded;
  }
  float* target = out + image * g.out_rows * g.out_columns * g.out_channels;
  Product product;
  product.depth = channels;
  product.in_step = g.in_step * channels;
  product.weight_step = g.out_channels;
  product.out_step = g.out_step * g.out_channels;
  for (long index = 0; index < g.phases; ++index) {
    const Phase& phase = g.phase[index];
    product.taps = phase.count;
    for (long t = 0; t < phase.count; ++t)
      product.weights[t] = weights + phase.taps[t].weight * channels * g.out_channels;
    for (long i = first; i < least(last, phase.rows); ++i) {
      for (long t = 0; t < phase.count; ++t) {
        const long row = i * g.in_step + phase.taps[t].row - begin;
        product.in[t] = base + row * pitch + (phase.taps[t].column - left) * channels;
      }
      const long row = i * g.out_step + phase.row;
      product.out = target + (row * g.out_columns + phase.column) * g.out_channels;
      multiply_block(product, phase.columns, g.out_channels);
    }
  }
}

// Winograd's F(2x2, 3x3) (Lavin and Gray 2016, arXiv:1509.09308): y = A'[(G g G') * (B' d B)] A.

void winograd_kernel(const float* weights, long channels, long features, float* transformed) {
  const long tap = channels * features;
  for (long begin = 0; begin < features; begin += 2 * L) {
    const long width = least(2 * L, features - begin);
    for (long c = 0; c < channels; ++c)
      for (long k = 0; k < width; k += L) {
        const float* w = weights + c * features + begin + k;
        Vec rows[4][3];
        for (int j = 0; j < 3; ++j) {
          const Vec a = load(w + j * tap), b = load(w + (3 + j) * tap), d = load(w + (6 + j) * tap);
          const Vec even = 0.5f * (a + d), odd = 0.5f * b;
          rows[0][j] = a, rows[1][j] = even + odd, rows[2][j] = even - odd, rows[3][j] = d;
        }
        float* to = transformed + begin * channels + c * width + k;
        for (int i = 0; i < 4; ++i) {
          const Vec a = rows[i][0], b = rows[i][1], d = rows[i][2];
          const Vec even = 0.5f * (a + d), odd = 0.5f * b;
          store(to + (4 * i) * tap, a);
          store(to + (4 * i + 1) * tap, even + odd);
          store(to + (4 * i + 2) * tap, even - odd);
          store(to + (4 * i + 3) * tap, d);
        }
      }
  }
}

struct Tile {
  long image, row, column;  // of the tile's upper left output
};

inline Tile tile_at(const Shape& s, long index) {
  const long across = (s.out_columns + 1) / 2, down = (s.out_rows + 1) / 2;
  const long row = index / across;
  return {row / down, 2 * (row % down), 2 * (index % across)};
}

inline void advance(const Shape& s, Tile& tile) {
  if ((tile.column += 2) < s.out_columns) return;
  tile.column = 0;
  if ((tile.row += 2) < s.out_rows) return;
  tile.row = 0;
  ++tile.image;
}

// B' d B of 16 pixels' vectors, of which `at(i, j)` gives the address.
template <class Address>
inline void transform_pixels(const Address& at, float* to, long step) {
  Vec t[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec a = load(at(0, j)), b = load(at(1, j)), d = load(at(2, j)), e = load(at(3, j));
    t[0][j] = a - d, t[1][j] = b + d, t[2][j] = d - b, t[3][j] = b - e;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(to + (4 * i) * step, t[i][0] - t[i][2]);
    store(to + (4 * i + 1) * step, t[i][1] + t[i][2]);
    store(to + (4 * i + 2) * step, t[i][2] - t[i][1]);
    store(to + (4 * i + 3) * step, t[i][1] - t[i][3]);
  }
}

struct Inside {
  const float* rows[4];
  long channels;
  const float* operator()(int i, int j) const { return rows[i] + j * channels; }
};

struct AtBorder {
  const float* pixels[16];
  long channel;
  const float* operator()(int i, int j) const { return pixels[4 * i + j] + channel; }
};

// Of one tile, all channels; `step` floats between frequencies. `zeros` stands for a pixel outside.
void transform_input(const Shape& s, const float* x, Tile tile, const float* zeros, float* to,
                     long step) {
  const long channels = s.channels, top = tile.row - s.top, left = tile.column - s.left;
  const float* image = x + tile.image * s.rows * s.columns * channels;
  if (top >= 0 && top + 4 <= s.rows && left >= 0 && left + 4 <= s.columns) {
    Inside at = {{}, channels};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) at.rows[i] = image + ((top + i) * s.columns + left) * channels;
    for (long c = 0; c < channels; c += L) {
      transform_pixels(at, to + c, step);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) at.rows[i] += L;
    }
    return;
  }
  AtBorder at;
  for (int i = 0; i < 4; ++i) {
    const long row = top + i;
    const bool present = row >= 0 && row < s.rows;
    const float* first = image + (row * s.columns + left) * channels;
    for (int j = 0; j < 4; ++j) {
      const bool inside = present && left + j >= 0 && left + j < s.columns;
      at.pixels[4 * i + j] = inside ? first + j * channels : zeros;
    }
  }
  for (at.channel = 0; at.channel < channels; at.channel += L)
    transform_pixels(at, to + at.channel, step);
}

// A' m A of one tile, all features, into the outputs that exist.
void transform_output(const Shape& s, const float* from, long step, Tile tile, float* y) {
  const long features = s.features, pitch = s.out_columns * features;
  float* to = y + ((tile.image * s.out_rows + tile.row) * s.out_columns + tile.column) * features;
  const bool below = tile.row + 1 < s.out_rows, beside = tile.column + 1 < s.out_columns;
  for (long k = 0; k < features; k += L) {
    Vec t[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec a = load(from + j * step + k), b = load(from + (4 + j) * step + k);
      const Vec d = load(from + (8 + j) * step + k), e = load(from + (12 + j) * step + k);
      t[0][j] = a + b + d, t[1][j] = b - d - e;
    }
    store(to + k, t[0][0] + t[0][1] + t[0][2]);
    if (beside) store(to + features + k, t[0][1] - t[0][2] - t[0][3]);
    if (below) store(to + pitch + k, t[1][0] + t[1][1] + t[1][2]);
    if (below && beside) store(to + pitch + features + k, t[1][1] - t[1][2] - t[1][3]);
  }
}

// A dy A' of one tile: the transpose of the above.
void transform_cotangent(const Shape& s, const float* dy, Tile tile, float* to, long step) {
  const long features = s.features, pitch = s.out_columns * features;
  const float* from =
      dy + ((tile.image * s.out_rows + tile.row) * s.out_columns + tile.column) * features;
  const bool below = tile.row + 1 < s.out_rows, beside = tile.column + 1 < s.out_columns;
  for (long k = 0; k < features; k += L) {
    const Vec a = load(from + k);
    const Vec b = beside ? load(from + features + k) : zero();
    const Vec d = below ? load(from + pitch + k) : zero();
    const Vec e = below && beside ? load(from + pitch + features + k) : zero();
    const Vec t[4][2] = {{a, b}, {a + d, b + e}, {a - d, b - e}, {-d, -e}};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(to + (4 * i) * step + k, t[i][0]);
      store(to + (4 * i + 1) * step + k, t[i][0] + t[i][1]);
      store(to + (4 * i + 2) * step + k, t[i][0] - t[i][1]);
      store(to + (4 * i + 3) * step + k, -t[i][1]);
    }
  }
}

void winograd(const Shape& s, const float* x, const float* transformed, float* y, long first,
              long last, float* scratch) {
  const long in_step = kTiles * s.channels + kGap, out_step = kTiles * s.features + kGap;
  float* inputs = scratch;
  float* outputs = scratch + 16 * in_step;
  float* zeros = outputs + 16 * out_step;
  clear(zeros, s.channels);
  Product product;
  product.taps = 1;
  product.depth = product.in_step = s.channels;
  product.out_step = s.features;
  for (long begin = first; begin < last; begin += kTiles) {
    const long count = least(kTiles, last - begin);
    Tile tile = tile_at(s, begin);
    for (long t = 0; t < count; ++t, advance(s, tile))
      transform_input(s, x, tile, zeros, inputs + t * s.channels, in_step);
    for (long f = 0; f < 16; ++f) {
      product.in[0] = inputs + f * in_step;
      for (long k = 0; k < s.features; k += 2 * L) {
        product.weight_step = least(2 * L, s.features - k);
        product.weights[0] = transformed + (f * s.features + k) * s.channels;
        product.out = outputs + f * out_step + k;
        multiply_block(product, count, product.weight_step);
      }
    }
    tile = tile_at(s, begin);
    for (long t = 0; t < count; ++t, advance(s, tile))
      transform_output(s, outputs + t * s.features, out_step, tile, y);
  }
}

// gradient[i][...] += sum over three nested loops of x[i] * y[...].
struct Loop {
  long count, x, y;
};

template <int I, int V>
void accumulate(const float* x, const float* y, Loop outer, Loop middle, Loop inner,
                float* gradient, long step) {
  Vec sum[I][V];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) sum[i][j] = load(gradient + i * step + j * L);
  for (long a = 0; a < outer.count; ++a)
    for (long b = 0; b < middle.count; ++b) {
      const float* from = x + a * outer.x + b * middle.x;
      const float* with = y + a * outer.y + b * middle.y;
      for (long c = 0; c < inner.count; ++c) {
        Vec w[V];
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) w[j] = load(with + j * L);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
          for (int j = 0; j < V; ++j) sum[i][j] += from[i] * w[j];
        from += inner.x;
        with += inner.y;
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) store(gradient + i * step + j * L, sum[i][j]);
}

// V vectors of features and all channels, in blocks of `Deep`.
template <int V, int Deep>
void accumulate_channels(const float* x, const float* y, Loop outer, Loop middle, Loop inner,
                         float* gradient, long channels, long features) {
  for (; channels >= Deep; channels -= Deep, x += Deep, gradient += Deep * features)
    accumulate<Deep, V>(x, y, outer, middle, inner, gradient, features);
  for (; channels >= 3; channels -= 3, x += 3, gradient += 3 * features)
    accumulate<3, V>(x, y, outer, middle, inner, gradient, features);
  for (; channels >= 1; --channels, ++x, gradient += features)
    accumulate<1, V>(x, y, outer, middle, inner, gradient, features);
}

void accumulate_block(const float* x, const float* y, Loop outer, Loop middle, Loop inner,
                      float* gradient, long channels, long features) {
  long k = 0;
  for (; k + 2 * L <= features; k += 2 * L)
    accumulate_channels<2, L == 8 ? 4 : 8>(x, y + k, outer, middle, inner, gradient + k, channels,
                                           features);
  if (k < features)
    accumulate_channels<1, 8>(x, y + k, outer, middle, inner, gradient + k, channels, features);
}

void winograd_gradient(const Shape& s, const float* x, const float* dy, float* frequencies,
                       long first, long last, float* scratch) {
  const long in_step = kTiles * s.channels + kGap, out_step = kTiles * s.features + kGap;
  float* inputs = scratch;
  float* cotangents = scratch + 16 * in_step;
  float* zeros = cotangents + 16 * out_step;
  clear(zeros, s.channels);
  for (long begin = first; begin < last; begin += kTiles) {
    const long count = least(kTiles, last - begin);
    Tile tile = tile_at(s, begin);
    for (long t = 0; t < count; ++t, advance(s, tile)) {
      transform_input(s, x, tile, zeros, inputs + t * s.channels, in_step);
      transform_cotangent(s, dy, tile, cotangents + t * s.features, out_step);
    }
    const Loop once = {1, 0, 0}, tiles = {count, s.channels, s.features};
    for (long f = 0; f < 16; ++f)
      accumulate_block(inputs + f * in_step, cotangents + f * out_step, once, once, tiles,
                       frequencies + f * s.channels * s.features, s.channels, s.features);
  }
}

void winograd_kernel_gradient(const float* frequencies, long size, float* gradient) {
  for (long c = 0; c < size; c += L) {
    Vec t[3][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* from = frequencies + j * size + c;
      const Vec a = load(from), b = load(from + 4 * size), d = load(from + 8 * size);
      const Vec e = load(from + 12 * size), half = 0.5f * (b + d);
      t[0][j] = a + half, t[1][j] = 0.5f * (b - d), t[2][j] = half + e;
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const Vec half = 0.5f * (t[i][1] + t[i][2]);
      store(gradient + (3 * i) * size + c, t[i][0] + half);
      store(gradient + (3 * i + 1) * size + c, 0.5f * (t[i][1] - t[i][2]));
      store(gradient + (3 * i + 2) * size + c, half + t[i][3]);
    }
  }
}

// The outputs for which in = out * stride + offset lies in [0, size).
inline void valid(long size, long stride, long offset, long& from, long& to) {
  from = most(from, offset < 0 ? (-offset + stride - 1) / stride : 0);
  const long room = size - 1 - offset;
  to = least(to, room < 0 ? 0 : room / stride + 1);
}

void gradient(const Shape& s, const float* x, const float* dy, float* gradient, long first,
              long last, long top, long bottom) {
  const long in_size = s.rows * s.columns * s.channels;
  const long out_size = s.out_rows * s.out_columns * s.features;
  for (long kh = 0; kh < s.window; ++kh)
    for (long kw = 0; kw < s.window; ++kw) {
      long from = top, to = bottom, left = 0, right = s.out_columns;
      valid(s.rows, s.stride, kh - s.top, from, to);
      valid(s.columns, s.stride, kw - s.left, left, right);
      if (from >= to || left >= right) continue;
      const long row = from * s.stride + kh - s.top, column = left * s.stride + kw - s.left;
      const float* in = x + first * in_size + (row * s.columns + column) * s.channels;
      const float* out = dy + first * out_size + (from * s.out_columns + left) * s.features;
      const Loop images = {last - first, in_size, out_size};
      const Loop rows = {to - from, s.stride * s.columns * s.channels, s.out_columns * s.features};
      const Loop columns = {right - left, s.stride * s.channels, s.features};
      float* target = gradient + (kh * s.window + kw) * s.channels * s.features;
      if (images.count > columns.count)
        accumulate_block(in, out, rows, columns, images, target, s.channels, s.features);
      else
        accumulate_block(in, out, images, rows, columns, target, s.channels, s.features);
    }
}

}  // namespace

extern const Kernels ORTHOJAX_NAME;
const Kernels ORTHOJAX_NAME = {
    L,        gather_images,     gather_rows,
    winograd_kernel, winograd, winograd_gradient, winograd_kernel_gradient, gradient,
};

}  // namespace orthojax
