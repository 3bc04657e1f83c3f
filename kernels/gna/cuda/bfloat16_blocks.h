// Blocks of a product in bfloat16 that accumulate in float32, by what the machine that compiles has
// for it: AMX, AVX512-BF16, or float32 alone.
//
// A block of the first operand lies in rows [R, K]; one of the second in panels of 32 columns, two
// rows at a time [K / 2, 32, 2]. K is a multiple of 32, so that all of them take the same.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bfloat16 {

constexpr int kPanel = 32;  // columns
constexpr int kStep = 32;   // K is a multiple of this

// One column's, or one row's, at two neighboring k: the first is in the lower half.
typedef uint32_t Pair;

inline Pair pair_at(const uint16_t* x) {
  Pair pair;
  std::memcpy(&pair, x, 4);
  return pair;
}

#if defined(__AMX_BF16__)

constexpr int kRows = 32;  // of a tile; rows of a block are a multiple of kLeast
constexpr int kLeast = 16;

// Linux lets a process use tiles once it has asked.
inline bool ready() {
  constexpr int kAsk = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kAsk, kTiles) == 0;
  return granted;
}

// A thread's tiles are all of 16 rows of 64 bytes, while this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// sums[r][c] += sum over k < inner of rows[r][k] * panel[k][c], for 16 or 32 rows.
inline void tile(const uint16_t* rows, int count, int64_t stride, const Pair* panel, int inner,
                 float* sums, int64_t width) {
  const bool two = count > 16;
  const int64_t step = width * 4, below = 16 * width;
  _tile_loadd(0, sums, step);
  _tile_loadd(1, sums + 16, step);
  if (two) {
    _tile_loadd(2, sums + below, step);
    _tile_loadd(3, sums + below + 16, step);
  }
  for (int k = 0; k < inner; k += kStep) {
    const Pair* pairs = panel + k / 2 * kPanel;
    _tile_loadd(6, pairs, kPanel * 4);
    _tile_loadd(7, pairs + 16, kPanel * 4);
    _tile_loadd(4, rows + k, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, rows + 16 * stride + k, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, step);
  _tile_stored(1, sums + 16, step);
  if (two) {
    _tile_stored(2, sums + below, step);
    _tile_stored(3, sums + below + 16, step);
  }
}

#else

constexpr int kRows = 12;
constexpr int kLeast = 4;

inline bool ready() { return true; }

struct Tiles {
  Tiles() {}
};

#if defined(__AVX512BF16__)

typedef __m512 Sums;

inline Sums load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Sums v) { _mm512_storeu_ps(x, v); }
typedef __m512bh Pairs;

inline Pairs load(const Pair* x) { return (__m512bh)_mm512_loadu_si512(x); }
inline Pairs fill(Pair x) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(x)); }
inline Sums add(Sums sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

#else

typedef float Sums __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));

inline Sums load(const float* x) {
  Sums v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
inline void store(float* x, Sums v) { std::memcpy(x, &v, sizeof v); }
inline Pairs load(const Pair* x) {
  Pairs v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
inline Pairs fill(Pair x) { return Pairs{} + x; }
inline Sums add(Sums sum, Pairs a, Pairs b) {
  sum += (Sums)(a << 16) * (Sums)(b << 16);
  return sum + (Sums)(a & 0xffff0000u) * (Sums)(b & 0xffff0000u);
}

#endif

template <int R>
inline void tile(const uint16_t* rows, int64_t stride, const Pair* panel, int inner, float* sums,
                 int64_t width) {
  Sums total[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    total[r][0] = load(sums + r * width);
    total[r][1] = load(sums + r * width + 16);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {  // of the next tile
    __builtin_prefetch(sums + (R + r) * width, 1);
    __builtin_prefetch(sums + (R + r) * width + 16, 1);
  }
  for (int k = 0; k < inner; k += 2, panel += kPanel) {
    const Pairs first = load(panel), second = load(panel + 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Pairs one = fill(pair_at(rows + r * stride + k));
      total[r][0] = add(total[r][0], one, first);
      total[r][1] = add(total[r][1], one, second);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(sums + r * width, total[r][0]);
    store(sums + r * width + 16, total[r][1]);
  }
}

// sums[r][c] += sum over k < inner of rows[r][k] * panel[k][c], for 4, 8 or 12 rows.
inline void tile(const uint16_t* rows, int count, int64_t stride, const Pair* panel, int inner,
                 float* sums, int64_t width) {
  if (count == 12) {
    tile<12>(rows, stride, panel, inner, sums, width);
  } else if (count == 8) {
    tile<8>(rows, stride, panel, inner, sums, width);
  } else {
    tile<4>(rows, stride, panel, inner, sums, width);
  }
}

#endif

}  // namespace bfloat16
