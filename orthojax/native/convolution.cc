// Convolution on CPUs for XLA's foreign function interface: forward and both gradients.
//
// float32, NHWC and HWIO, windows of 1x1 and 3x3, strides 1 and 2, "SAME" padding, channels in
// multiples of 8; below 8 input channels (the first layer) there is no input gradient. How the work is cut depends on shapes alone, and partial sums are added in a
// fixed order: results do not depend on the number of threads, nor on which of them is faster.

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace orthojax {
namespace {

namespace ffi = xla::ffi;

using Images = ffi::Buffer<ffi::F32, 4>;
using Result = ffi::Result<Images>;

constexpr double kTaskSize = 2e6;        // multiply-adds that are worth waking a thread for
constexpr long kMostTasks = 64;
constexpr long kSmallImage = 8192;       // bytes up to which blocks run across images
constexpr long kCacheSize = 16384;       // bytes of operands to go through again and again
constexpr long kPartialSums = 16 << 20;  // bytes

enum Algorithm : int64_t { kAutomatic = 0, kDirect = 1, kWinograd = 2 };

// Memory that a thread keeps for its next call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(long size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (static_cast<size_t>(size) * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  long size_ = 0;
};

thread_local Scratch of_task, of_call;

// Calls body(0), ..., body(count - 1), with the help of the pool's threads where they are idle.
//
// The caller claims tasks like everybody else and waits for those only that a running thread has
// claimed. So it finishes alone if no thread of the pool ever comes, and cannot deadlock: a task
// waits for nothing.
class Tasks {
 public:
  Tasks(long count, std::function<void(long)> body) : count_(count), body_(std::move(body)) {}

  static void run(ffi::ThreadPool& pool, long count, std::function<void(long)> body) {
    const long threads = count > 1 ? pool.num_threads() : 1;
    if (threads < 2) {
      for (long task = 0; task < count; ++task) body(task);
      return;
    }
    auto tasks = std::make_shared<Tasks>(count, std::move(body));
    for (long helper = 1; helper < threads && helper < count; ++helper)
      pool.Schedule([tasks] { tasks->work(); });
    tasks->work();
    tasks->wait();
  }

 private:
  void work() {
    long finished = 0;
    for (long task; (task = next_.fetch_add(1)) < count_; ++finished) body_(task);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    done_ += finished;
    if (done_ == count_) all_done_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == count_; });
  }

  const long count_;
  const std::function<void(long)> body_;
  std::atomic<long> next_{0};
  long done_ = 0;
  std::mutex mutex_;
  std::condition_variable all_done_;
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }

const Kernels& kernels(long channels, long features) {
  static const bool wide = has_avx512();
#ifdef ORTHOJAX_ALWAYS_WIDE  // for tests: 16 lanes where there is no AVX-512
  const bool chosen = true;
#else
  const bool chosen = wide;
#endif
  (void)wide;
  return chosen && channels % 16 == 0 && features % 16 == 0 ? kAvx512 : kAvx2;
}

long divide(long a, long b) { return (a + b - 1) / b; }  // rounded up
long at_least(long a, long b) { return a > b ? a : b; }
long at_most(long a, long b) { return a < b ? a : b; }

double multiply_adds(const Shape& s) {
  return double(s.images) * s.out_rows * s.out_columns * s.channels * s.features * s.window *
         s.window;
}

// How many tasks so much work is cut into, where it cannot be cut into more than `units`.
long tasks_of(double work, long units, long most = kMostTasks) {
  const double wanted = work / kTaskSize;
  const long tasks = wanted < 1 ? 1 : wanted > most ? most : long(wanted);
  return at_most(tasks, at_least(units, 1));
}

long share(long units, long tasks, long task) { return units * task / tasks; }

// The convolution of x with w to y; an error's text if it is none that this file can do.
std::string shape_of(const Images& x, const Images& y, ffi::Span<const int64_t> w, int64_t stride,
                     Shape& s) {
  const auto in = x.dimensions(), out = y.dimensions();
  s = {in[0], in[1], in[2], in[3], out[1], out[2], out[3], w[0], stride, 0, 0};
  const bool known = (s.window == 1 || s.window == 3) && w[1] == s.window &&
                     (stride == 1 || stride == 2) && w[2] == s.channels && w[3] == s.features &&
                     s.channels > 0 && (s.channels < 8 || s.channels % 8 == 0) &&
                     s.features > 0 && s.features % 8 == 0;
  if (!known || out[0] != s.images || s.out_rows != divide(s.rows, stride) ||
      s.out_columns != divide(s.columns, stride))
    return "orthojax: not a convolution that the native part computes";
  s.top = at_least((s.out_rows - 1) * stride + s.window - s.rows, 0) / 2;
  s.left = at_least((s.out_columns - 1) * stride + s.window - s.columns, 0) / 2;
  return "";
}

bool use_winograd(const Shape& s, int64_t algorithm) {
  if (s.window != 3 || s.stride != 1 || s.channels < 8 || algorithm == kDirect) return false;
  if (algorithm == kWinograd) return true;
  return s.channels >= 16 && s.features >= 16 && s.out_rows >= 4 && s.out_columns >= 4;
}

long scratch_size(const Shape& s) {
  return 16 * (kTiles * (s.channels + s.features) + 2 * kGap) + s.channels;
}

long tiles(const Shape& s) { return s.images * ((s.out_rows + 1) / 2) * ((s.out_columns + 1) / 2); }

void convolve_winograd(ffi::ThreadPool& pool, const Shape& s, const float* x, const float* w,
                       float* y) {
  const Kernels& k = kernels(s.channels, s.features);
  float* transformed = of_call.get(16 * s.channels * s.features);
  k.winograd_kernel(w, s.channels, s.features, transformed);
  const long total = tiles(s), blocks = divide(total, kTiles);
  const long count = tasks_of(multiply_adds(s) / 2, blocks);
  Tasks::run(pool, count, [&, transformed](long task) {
    k.winograd(s, x, transformed, y, share(blocks, count, task) * kTiles,
               at_most(share(blocks, count, task + 1) * kTiles, total),
               of_task.get(scratch_size(s)));
  });
}

void gather(ffi::ThreadPool& pool, const Gather& g, double work, const float* in,
            const float* weights, float* out) {
  const Kernels& k = kernels(g.in_channels, g.out_channels);
  const long bytes = 4 * at_least(g.in_rows * g.in_columns * g.in_channels,
                                  g.out_rows * g.out_columns * g.out_channels);
  constexpr long kBlock = 24;
  if (bytes <= kSmallImage && g.images >= 4) {
    const long blocks = divide(g.images, kBlock), count = tasks_of(work, blocks);
    Tasks::run(pool, count, [&](long task) {
      const long last = share(blocks, count, task + 1);
      for (long block = share(blocks, count, task); block < last; ++block)
        k.gather_images(g, in, weights, out, block * kBlock,
                        at_most((block + 1) * kBlock, g.images));
    });
    return;
  }
  long rows = 0, columns = 0;
  for (long p = 0; p < g.phases; ++p) {
    rows = at_least(rows, g.phase[p].rows);
    columns = at_least(columns, g.phase[p].columns);
  }
  constexpr long kRows = 8;
  const long strips = divide(rows, kRows), units = g.images * strips;
  const long count = tasks_of(work, units);
  const long size = (kRows * g.in_step + 2) * (columns * g.in_step + 2) * g.in_channels;
  Tasks::run(pool, count, [&](long task) {
    float* scratch = of_task.get(size);
    const long last = share(units, count, task + 1);
    for (long unit = share(units, count, task); unit < last; ++unit) {
      const long first = unit % strips * kRows;
      k.gather_rows(g, in, weights, out, unit / strips, first, at_most(first + kRows, rows),
                    scratch);
    }
  });
}

ffi::Error forward(ffi::ThreadPool pool, Images x, Images w, Result y, int64_t stride,
                   int64_t algorithm) {
  Shape s;
  const std::string error = shape_of(x, *y, w.dimensions(), stride, s);
  if (!error.empty()) return ffi::Error::InvalidArgument(error);
  if (use_winograd(s, algorithm)) {
    convolve_winograd(pool, s, x.typed_data(), w.typed_data(), y->typed_data());
    return ffi::Error::Success();
  }
  Gather g = {s.images, s.rows, s.columns, s.channels, s.out_rows, s.out_columns, s.features,
              stride, 1, 1, {}};
  Phase& phase = g.phase[0];
  phase = {0, 0, s.out_rows, s.out_columns, 0, {}};
  for (long kh = 0; kh < s.window; ++kh)
    for (long kw = 0; kw < s.window; ++kw)
      phase.taps[phase.count++] = {kh - s.top, kw - s.left, kh * s.window + kw};
  gather(pool, g, multiply_adds(s), x.typed_data(), w.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

// (taps, channels, features) to (taps, features, channels), the taps in reverse where mirrored.
float* transpose(const Shape& s, const float* w, bool mirrored) {
  const long taps = s.window * s.window, size = s.channels * s.features;
  float* transposed = of_call.get((16 + taps) * size) + 16 * size;
  for (long tap = 0; tap < taps; ++tap) {
    const float* from = w + tap * size;
    float* to = transposed + (mirrored ? taps - 1 - tap : tap) * size;
    for (long c = 0; c < s.channels; c += 8)
      for (long f = 0; f < s.features; f += 8)
        for (long i = 0; i < 8; ++i)
          for (long j = 0; j < 8; ++j)
            to[(f + i) * s.channels + c + j] = from[(c + j) * s.features + f + i];
  }
  return transposed;
}

ffi::Error input_gradient(ffi::ThreadPool pool, Images dy, Images w, Result dx, int64_t stride,
                          int64_t algorithm) {
  Shape s;
  std::string error = shape_of(*dx, dy, w.dimensions(), stride, s);
  if (s.channels < 8) error = "orthojax: no gradient for inputs of so few channels";
  if (!error.empty()) return ffi::Error::InvalidArgument(error);
  if (use_winograd(s, algorithm)) {
    // The convolution of dy with the mirrored kernel.
    const float* mirrored = transpose(s, w.typed_data(), true);
    std::swap(s.channels, s.features);
    convolve_winograd(pool, s, dy.typed_data(), mirrored, dx->typed_data());
    return ffi::Error::Success();
  }
  const float* transposed = transpose(s, w.typed_data(), false);
  Gather g = {s.images, s.out_rows, s.out_columns, s.features, s.rows, s.columns, s.channels,
              1, stride, 0, {}};
  for (long row = 0; row < at_most(stride, s.rows); ++row)
    for (long column = 0; column < at_most(stride, s.columns); ++column) {
      Phase& phase = g.phase[g.phases++];
      phase = {row, column, divide(s.rows - row, stride), divide(s.columns - column, stride), 0, {}};
      for (long kh = 0; kh < s.window; ++kh)
        for (long kw = 0; kw < s.window; ++kw) {
          const long down = row + s.top - kh, right = column + s.left - kw;
          if (down % stride == 0 && right % stride == 0)
            phase.taps[phase.count++] = {down / stride, right / stride, kh * s.window + kw};
        }
    }
  gather(pool, g, multiply_adds(s), dy.typed_data(), transposed, dx->typed_data());
  return ffi::Error::Success();
}

ffi::Error kernel_gradient(ffi::ThreadPool pool, Images x, Images dy, Result dw, int64_t stride,
                           int64_t algorithm) {
  Shape s;
  const std::string error = shape_of(x, dy, dw->dimensions(), stride, s);
  if (!error.empty()) return ffi::Error::InvalidArgument(error);
  const Kernels& k = kernels(s.channels, s.features);
  const bool winograd = use_winograd(s, algorithm);
  const long size = s.window * s.window * s.channels * s.features;
  const long total = tiles(s), blocks = winograd ? divide(total, kTiles) : s.images;
  const long most = at_least(at_most(kPartialSums / (4 * size), 16), 2);
  const long count = tasks_of(multiply_adds(s) / (winograd ? 2 : 1), blocks, most);
  float* result = dw->typed_data();
  float* partial = of_call.get((count - 1) * size + 1);
  Tasks::run(pool, count, [&, partial](long task) {
    float* sum = task == 0 ? result : partial + (task - 1) * size;
    const long first = share(blocks, count, task), last = share(blocks, count, task + 1);
    if (winograd) {
      const long plane = s.channels * s.features;
      float* frequencies = of_task.get(16 * plane + scratch_size(s));
      for (long c = 0; c < 16 * plane; ++c) frequencies[c] = 0;
      k.winograd_gradient(s, x.typed_data(), dy.typed_data(), frequencies, first * kTiles,
                          at_most(last * kTiles, total), frequencies + 16 * plane);
      k.winograd_kernel_gradient(frequencies, plane, sum);
      return;
    }
    for (long c = 0; c < size; ++c) sum[c] = 0;
    const long row = 4 * at_least(s.out_columns * s.features, 1) +
                     4 * at_least(s.columns * s.channels * s.stride, 1);
    const long rows = at_least(kCacheSize / row, 1);
    const long images = at_least(rows / at_least(s.out_rows, 1), 1);
    for (long image = first; image < last; image += images)
      for (long top = 0; top < s.out_rows; top += rows)
        k.gradient(s, x.typed_data(), dy.typed_data(), sum, image, at_most(image + images, last),
                   top, at_most(top + rows, s.out_rows));
  });
  for (long task = 1; task < count; ++task) {
    const float* from = partial + (task - 1) * size;
    for (long c = 0; c < size; ++c) result[c] += from[c];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace orthojax

extern "C" int orthojax_supported() { return orthojax::has_avx2() ? 1 : 0; }

#define ORTHOJAX_HANDLER(name)                                         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(orthojax_##name, orthojax::name,       \
                                xla::ffi::Ffi::Bind()                  \
                                    .Ctx<xla::ffi::ThreadPool>()       \
                                    .Arg<orthojax::Images>()           \
                                    .Arg<orthojax::Images>()           \
                                    .Ret<orthojax::Images>()           \
                                    .Attr<int64_t>("stride")           \
                                    .Attr<int64_t>("algorithm"))

ORTHOJAX_HANDLER(forward);
ORTHOJAX_HANDLER(input_gradient);
ORTHOJAX_HANDLER(kernel_gradient);
