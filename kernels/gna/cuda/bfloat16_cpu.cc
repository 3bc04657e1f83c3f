// Convolutions of bfloat16 [B, T, H, W, C], and their gradients, as blocked products.
//
// A task makes a block of the result, in float32. Of the sum it goes through a piece after another:
// the first operand's rows are copied, with zeros where the padding is, and meet the second operand
// panel by panel, each of which stays in the first-level cache.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "numbers.h"
#include "threads.h"
#include "bfloat16_blocks.h"

namespace bfloat16 {
namespace {

namespace ffi = xla::ffi;
using Integers = ffi::Span<const int64_t>;
using Array = ffi::Buffer<ffi::BF16>;
using Result = ffi::ResultBuffer<ffi::BF16>;

constexpr int kInner = 384;      // of a sum's terms at a time
constexpr int kMostRows = 192;   // of a block of the result
constexpr int kMostColumns = 512;  // many, as rows take longer to copy than panels
constexpr int kTasksPerThread = 4;

struct Free {
  void operator()(void* x) const { ::operator delete[](x, std::align_val_t(64)); }
};
template <typename T>
std::unique_ptr<T[], Free> memory(int64_t count) {
  const size_t bytes = std::max<int64_t>(count, 1) * sizeof(T);
  return std::unique_ptr<T[], Free>(
      static_cast<T*>(::operator new[](bytes, std::align_val_t(64))));
}

int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
int64_t rounded(int64_t x, int64_t step) { return pieces(x, step) * step; }

// The largest block, but enough of them for all threads.
struct Blocks {
  Blocks(int64_t rows, int64_t columns, int64_t groups, int64_t threads) {
    rows_at_once = std::min<int64_t>(rows, kMostRows);
    columns_at_once = std::min<int64_t>(rounded(columns, kPanel), kMostColumns);
    const int64_t wanted = threads > 1 ? kTasksPerThread * threads : 1;
    auto count = [&] {
      return groups * pieces(rows, rows_at_once) * pieces(columns, columns_at_once);
    };
    while (count() < wanted && (rows_at_once > 96 || columns_at_once > 2 * kPanel)) {
      if (rows_at_once > 96 && rows_at_once >= columns_at_once) {
        rows_at_once = rounded(pieces(rows_at_once, 2), 48);
      } else {
        columns_at_once = rounded(pieces(columns_at_once, 2), kPanel);
      }
    }
    rows_at_once = pieces(rows, pieces(rows, rows_at_once));
  }

  int64_t rows_at_once, columns_at_once;
};

// results[group][row][column] in bfloat16, of pieces of a sum that `rows_of` and `panel_of` give:
// rows_of(group, piece, row, count, to, stride) copies rows, and returns how long they are, with
// zeros up to a multiple of kStep; panel_of(group, piece, column, to) one panel.
template <typename RowsOf, typename PanelOf>
bool multiply(ffi::ThreadPool& pool, int64_t groups, int64_t rows, int64_t columns, int64_t sums,
              uint16_t* results, const RowsOf& rows_of, const PanelOf& panel_of) {
  const Blocks blocks(rows, columns, groups, std::max<int64_t>(pool.num_threads(), 1));
  const int64_t down = pieces(rows, blocks.rows_at_once);
  const int64_t across = pieces(columns, blocks.columns_at_once);
  const int64_t room = rounded(blocks.rows_at_once, kLeast), width = blocks.columns_at_once;
  constexpr int64_t stride = kInner + kStep;  // not a power of two, so that rows share the cache
  return gna::parallel(pool, groups * down * across, [&](gna::Counter& counter) {
    const Tiles tiles;
    auto block = memory<uint16_t>(room * stride);
    auto panel = memory<Pair>(kInner / 2 * kPanel);
    auto total = memory<float>(room * width);
    std::fill_n(block.get(), room * stride, uint16_t{0});
    for (int64_t task; counter.next(task);) {
      const int64_t group = task / (down * across);
      const int64_t row = task / across % down * blocks.rows_at_once;
      const int64_t column = task % across * width;
      const int64_t here = std::min(blocks.rows_at_once, rows - row);
      const int64_t wide = std::min(width, columns - column);
      std::fill_n(total.get(), room * width, 0.0f);
      for (int64_t piece = 0; piece < sums; ++piece) {
        const int inner = rows_of(group, piece, row, here, block.get(), stride);
        for (int64_t c = 0; c < wide; c += kPanel) {
          panel_of(group, piece, column + c, panel.get());
          for (int64_t r = 0; r < here; r += kRows) {
            const int count = static_cast<int>(rounded(std::min<int64_t>(kRows, here - r), kLeast));
            tile(block.get() + r * stride, count, stride, panel.get(), inner,
                 total.get() + r * width + c, width);
          }
        }
      }
      for (int64_t r = 0; r < here; ++r) {
        auto* to = reinterpret_cast<gna::BFloat16*>(results) + (group * rows + row + r) * columns;
        for (int64_t c = 0; c < wide; ++c) {
          gna::from_float(total[r * width + c], to[column + c]);
        }
      }
    }
  });
}

// Two rows of up to 32 numbers, one of which may be missing, as pairs.
void interleave(const uint16_t* first, const uint16_t* second, int64_t count, Pair* to) {
  if (count >= kPanel) {
    for (int c = 0; c < kPanel; ++c) to[c] = first[c] | static_cast<Pair>(second[c]) << 16;
    return;
  }
  for (int c = 0; c < kPanel; ++c) {
    to[c] = c < count ? first[c] | static_cast<Pair>(second[c]) << 16 : 0;
  }
}

constexpr int kAxes = 3;
alignas(64) const uint16_t kZeros[kPanel] = {};

// Which pixel of an image or video a kernel's tap sees, from a pixel of the result.
struct Window {
  int64_t image[kAxes], result[kAxes], kernel[kAxes], strides[kAxes], padding[kAxes],
      dilation[kAxes];  // of the image, between whose pixels are zeros

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels() const { return result[0] * result[1] * result[2]; }

  // Calls visit(n, pixel of all images, or -1) for `count` pixels of all results from `first` on.
  template <typename Visit>
  void visit(int64_t tap, int64_t first, int64_t count, const Visit& visit) const {
    const int64_t place[kAxes] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1],
                                  tap % kernel[2]};
    int64_t at[kAxes] = {first / (result[1] * result[2]) % result[0],
                         first / result[2] % result[1], first % result[2]};
    int64_t batch = first / pixels();
    auto seen = [&](int axis) {
      const int64_t x = at[axis] * strides[axis] + place[axis] - padding[axis];
      if (x < 0 || x % dilation[axis] != 0) return int64_t{-1};
      return x / dilation[axis] < image[axis] ? x / dilation[axis] : int64_t{-1};
    };
    int64_t line = -1;
    bool fresh = true;
    for (int64_t n = 0; n < count; ++n) {
      if (fresh) {
        const int64_t t = seen(0), h = seen(1);
        line = t < 0 || h < 0 ? -1 : ((batch * image[0] + t) * image[1] + h) * image[2];
        fresh = false;
      }
      const int64_t w = seen(2);
      visit(n, line < 0 || w < 0 ? int64_t{-1} : line + w);
      if (++at[2] < result[2]) continue;
      at[2] = 0, fresh = true;
      if (++at[1] < result[1]) continue;
      at[1] = 0;
      if (++at[0] < result[0]) continue;
      at[0] = 0, ++batch;
    }
  }
};

bool read(Window& window, Integers image, const int64_t* result, const int64_t* kernel,
          Integers strides, Integers padding, Integers dilation) {
  if (strides.size() != kAxes || padding.size() != kAxes || dilation.size() != kAxes) return false;
  for (int n = 0; n < kAxes; ++n) {
    window.image[n] = image[n + 1];
    window.result[n] = result[n + 1];
    window.kernel[n] = kernel[n];
    window.strides[n] = strides[n], window.padding[n] = padding[n];
    window.dilation[n] = dilation[n];
    if (strides[n] < 1 || dilation[n] < 1) return false;
  }
  return true;
}

const uint16_t* numbers(const Array& x) { return static_cast<const uint16_t*>(x.untyped_data()); }

ffi::Error answer(const char* wrong) { return ffi::Error::InvalidArgument(wrong); }

template <typename Run>
ffi::Error finished(const Run& run) {
  bool good;
  try {
    good = run();
  } catch (const std::bad_alloc&) {
    good = false;
  }
  return good ? ffi::Error::Success()
              : ffi::Error(ffi::ErrorCode::kResourceExhausted, "bfloat16: out of memory");
}

// [B, T, H, W, C] with kernel [t, h, w, C, D]; transposed, with the kernel turned around, of which
// the result has the channels C, as the gradient of an image has.
ffi::Error convolve(ffi::ThreadPool pool, Array x, Array kernel, Result y, Integers strides,
                    Integers padding, Integers dilation, bool transposed) {
  const auto image = x.dimensions(), taps = kernel.dimensions(), result = y->dimensions();
  Window window;
  if (image.size() != 5 || taps.size() != 5 || result.size() != 5 ||
      !read(window, image, result.begin(), taps.begin(), strides, padding, dilation)) {
    return answer("bfloat16: convolutions are of five dimensions");
  }
  const int64_t channels = image[4], features = result[4];
  if (taps[3] != (transposed ? features : channels) ||
      taps[4] != (transposed ? channels : features) || channels % 2 || image[0] != result[0]) {
    return answer("bfloat16: the kernel does not fit, or channels are not even");
  }
  if (!ready()) return answer("bfloat16: the system does not grant tiles");
  // A piece of the sum is of several taps, or of a part of the channels of one.
  const int64_t taps_at_once = std::min(std::max<int64_t>(kInner / channels, 1), window.taps());
  const int64_t parts = pieces(channels, kInner);
  const int64_t part = rounded(pieces(channels, parts), kStep);
  struct Piece {
    int64_t tap, taps, channel, channels;
    int64_t length() const { return taps * channels; }
  };
  auto piece_at = [&](int64_t n) {
    const int64_t tap = n / parts * taps_at_once, channel = n % parts * part;
    return Piece{tap, std::min(taps_at_once, window.taps() - tap), channel,
                 parts == 1 ? channels : std::min(part, channels - channel)};
  };
  auto rows_of = [&](int64_t, int64_t n, int64_t row, int64_t count, uint16_t* to,
                     int64_t stride) {
    const Piece piece = piece_at(n);
    const int64_t some = piece.channels, whole = piece.length(), most = rounded(whole, kStep);
    for (int64_t tap = 0; tap < piece.taps; ++tap) {
      const uint16_t* from = numbers(x) + piece.channel;
      window.visit(piece.tap + tap, row, count, [&](int64_t r, int64_t pixel) {
        uint16_t* target = to + r * stride + tap * some;
        if (pixel < 0) {
          std::fill_n(target, some, uint16_t{0});
        } else {
          std::memcpy(target, from + pixel * channels, some * 2);
        }
      });
    }
    for (int64_t r = 0; r < count && most > whole; ++r) {
      std::fill_n(to + r * stride + whole, most - whole, uint16_t{0});
    }
    return static_cast<int>(most);
  };
  auto panel_of = [&](int64_t, int64_t n, int64_t column, Pair* to) {
    const Piece piece = piece_at(n);
    const int64_t count = std::min<int64_t>(kPanel, features - column), some = piece.channels;
    for (int64_t tap = piece.tap; tap < piece.tap + piece.taps; ++tap, to += some / 2 * kPanel) {
      if (!transposed) {
        const uint16_t* from =
            numbers(kernel) + (tap * channels + piece.channel) * features + column;
        for (int64_t k = 0; k < some; k += 2) {
          interleave(from + k * features, from + (k + 1) * features, count, to + k / 2 * kPanel);
        }
      } else {
        const uint16_t* from = numbers(kernel) + piece.channel +
                               ((window.taps() - 1 - tap) * features + column) * channels;
        for (int64_t c = 0; c < kPanel; ++c) {
          for (int64_t k = 0; k < some; k += 2) {
            to[k / 2 * kPanel + c] = c < count ? pair_at(from + c * channels + k) : 0;
          }
        }
      }
    }
    std::fill_n(to, (rounded(piece.length(), kStep) - piece.length()) / 2 * kPanel, Pair{0});
  };
  return finished([&] {
    return multiply(pool, 1, image[0] * window.pixels(), features,
                    pieces(window.taps(), taps_at_once) * parts,
                    static_cast<uint16_t*>(y->untyped_data()), rows_of, panel_of);
  });
}

// The gradient of the kernel [t, h, w, C, D], from x [B, T, H, W, C] and that of the result.
ffi::Error correlate(ffi::ThreadPool pool, Array x, Array g, Result kernel, Integers strides,
                     Integers padding) {
  const auto image = x.dimensions(), result = g.dimensions(), taps = kernel->dimensions();
  const int64_t ones[kAxes] = {1, 1, 1};
  Window window;
  if (image.size() != 5 || taps.size() != 5 || result.size() != 5 ||
      !read(window, image, result.begin(), taps.begin(), strides, padding,
            Integers(ones, kAxes))) {
    return answer("bfloat16: convolutions are of five dimensions");
  }
  const int64_t channels = image[4], features = result[4], all = result[0] * window.pixels();
  if (taps[3] != channels || taps[4] != features || image[0] != result[0]) {
    return answer("bfloat16: the gradient does not fit");
  }
  if (!ready()) return answer("bfloat16: the system does not grant tiles");
  auto length = [&](int64_t piece) { return std::min<int64_t>(kInner, all - piece * kInner); };
  auto rows_of = [&](int64_t tap, int64_t piece, int64_t channel, int64_t count, uint16_t* to,
                     int64_t stride) {
    const int64_t some = length(piece);
    window.visit(tap, piece * kInner, some, [&](int64_t n, int64_t pixel) {
      if (pixel < 0) {
        for (int64_t c = 0; c < count; ++c) to[c * stride + n] = 0;
      } else {
        const uint16_t* from = numbers(x) + pixel * channels + channel;
        for (int64_t c = 0; c < count; ++c) to[c * stride + n] = from[c];
      }
    });
    const int64_t most = rounded(some, kStep);
    for (int64_t c = 0; c < count; ++c) {
      std::fill_n(to + c * stride + some, most - some, uint16_t{0});
    }
    return static_cast<int>(most);
  };
  auto panel_of = [&](int64_t, int64_t piece, int64_t column, Pair* to) {
    const int64_t some = length(piece), count = std::min<int64_t>(kPanel, features - column);
    const uint16_t* from = numbers(g) + piece * kInner * features + column;
    for (int64_t k = 0; k < some; k += 2, to += kPanel) {
      interleave(from + k * features, k + 1 < some ? from + (k + 1) * features : kZeros, count, to);
    }
    std::fill_n(to, (rounded(some, kStep) - rounded(some, 2)) / 2 * kPanel, Pair{0});
  };
  return finished([&] {
    return multiply(pool, window.taps(), channels, features, pieces(all, kInner),
                    static_cast<uint16_t*>(kernel->untyped_data()), rows_of, panel_of);
  });
}

}  // namespace
}  // namespace bfloat16

XLA_FFI_DEFINE_HANDLER_SYMBOL(Bfloat16Convolve, bfloat16::convolve,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<bfloat16::Array>()
                                  .Arg<bfloat16::Array>()
                                  .Ret<bfloat16::Array>()
                                  .Attr<bfloat16::Integers>("strides")
                                  .Attr<bfloat16::Integers>("padding")
                                  .Attr<bfloat16::Integers>("dilation")
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(Bfloat16Correlate, bfloat16::correlate,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<bfloat16::Array>()
                                  .Arg<bfloat16::Array>()
                                  .Ret<bfloat16::Array>()
                                  .Attr<bfloat16::Integers>("strides")
                                  .Attr<bfloat16::Integers>("padding"));
