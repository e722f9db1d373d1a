// The inner loops of the convolution, compiled once for each instruction set from kernels.cc.
//
// Everything is float32. Images are NHWC, kernels HWIO, and channel counts multiples of `lanes`; but
// the functions that compute direct sums take any number of input channels.

#pragma once

namespace orthojax {

constexpr long kTiles = 24;  // Winograd tiles that are transformed together
constexpr long kGap = 16;    // floats between two frequencies, against cache conflicts

constexpr long kMaxTaps = 9;

// Sums over taps: out[i * out_step + row][j * out_step + column] of a phase is the sum, over its
// taps, of in[i * in_step + tap.row][j * in_step + tap.column] times weights[tap.weight]. A
// convolution has one phase; the gradient of a strided one has a phase for each residue.
struct Tap {
  long row, column, weight;
};

struct Phase {
  long row, column, rows, columns, count;
  Tap taps[kMaxTaps];
};

struct Gather {
  long images, in_rows, in_columns, in_channels, out_rows, out_columns, out_channels;
  long in_step, out_step, phases;
  Phase phase[4];
};

// A convolution and its padding; `rows` and `columns` are those of x, `out_*` those of y.
struct Shape {
  long images, rows, columns, channels, out_rows, out_columns, features;
  long window, stride, top, left;
};

struct Kernels {
  long lanes;

  // Images `first` to `last`, in blocks of images at one position: for images of few pixels.
  void (*gather_images)(const Gather&, const float* in, const float* weights, float* out,
                        long first, long last);
  // Rows `first` to `last` of each phase of one image. `scratch` holds the padded input rows.
  void (*gather_rows)(const Gather&, const float* in, const float* weights, float* out,
                      long image, long first, long last, float* scratch);

  // (3, 3, in, out) to 16 frequencies, in blocks of output channels.
  void (*winograd_kernel)(const float* weights, long channels, long features, float* transformed);
  // Tiles `first` to `last`; scratch of 16 * (kTiles * (channels + features) + 2 * kGap) + channels.
  void (*winograd)(const Shape&, const float* x, const float* transformed, float* y, long first,
                   long last, float* scratch);
  // Adds the tiles' part to `frequencies`, (16, channels, features).
  void (*winograd_gradient)(const Shape&, const float* x, const float* dy, float* frequencies,
                            long first, long last, float* scratch);
  // 16 frequencies back to (3, 3, channels, features).
  void (*winograd_kernel_gradient)(const float* frequencies, long size, float* gradient);

  // Adds the part of output rows `top` to `bottom` of images `first` to `last` to `gradient`,
  // (window, window, channels, features).
  void (*gradient)(const Shape&, const float* x, const float* dy, float* gradient, long first,
                   long last, long top, long bottom);
};

extern const Kernels kAvx2;
extern const Kernels kAvx512;

}  // namespace orthojax
