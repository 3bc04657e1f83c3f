// Products of small matrices and the softmax's exponential, vectorized for the machine that
// compiles.
//
// Scores lie [keys, queries]: sums over keys run along vectors of queries, and no sum runs across a
// vector. Products are built from outer products that stay in registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace gna {

#if defined(__AVX512F__)
constexpr int kWidth = 16;   // floats of a vector
constexpr int kVectors = 4;  // most vectors of an accumulator's row
constexpr int kRows[] = {0, 16, 12, 8, 6};  // rows of accumulators, by vectors of a row
#else
constexpr int kWidth = 8;
constexpr int kVectors = 2;
constexpr int kRows[] = {0, 8, 6};
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth), may_alias));

constexpr float kHidden = -1e30f;  // minus infinity whose differences are not NaN

inline Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
inline void store(float* x, Floats v) { *reinterpret_cast<Floats*>(x) = v; }
inline Floats fill(float x) { return Floats{} + x; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// 2^x to float32's precision; 0 below the normal range.
inline Floats exp2(Floats x) {
  const Floats shifter = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x + shifter;
  const Floats f = x - (shifted - shifter);  // in [-1/2, 1/2]
  Floats p = fill(1.327645461e-3f);  // closest to 2^f in relative terms: 7.5e-8
  p = p * f + 9.675540368e-3f;
  p = p * f + 5.550713310e-2f;
  p = p * f + 2.402211974e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072f;
  // The sum's lowest bits are the integer: they go to the exponent.
  const Floats scaled = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x < -126.0f ? Floats{} : scaled;  // NaN stays
}

// Lanes of vector `v` whose bit is set in a mask keep x, others become `hidden`.
inline Floats where(uint64_t mask, int v, Floats x, Floats hidden) {
  Ints bit;
  for (int i = 0; i < kWidth; ++i) bit[i] = 1 << i;
  const Ints bits = Ints{} + static_cast<int32_t>(mask >> (v * kWidth) & ((1u << kWidth) - 1));
  return (bits & bit) != 0 ? x : hidden;
}

// Whether none of the numbers is NaN or infinite.
inline bool all_finite(const float* x, int64_t count) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found |= (bits & 0x7f800000) == 0x7f800000;
  }
  return !found;
}

// out[r][:] (+)= sum over i of in[r][i] * table[i][:], for R rows of V vectors.
template <int R, int V, bool Add>
inline void row_block(const float* const* in, int inner, const float* table, int columns,
                      float* const* out, int offset) {
  Floats sums[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[r][v] = Add ? load(out[r] + offset + v * kWidth) : Floats{};
    }
  }
  const float* row = table + offset;
  for (int i = 0; i < inner; ++i, row += columns) {
    Floats x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(row + v * kWidth);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const Floats factor = fill(in[r][i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += factor * x[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out[r] + offset + v * kWidth, sums[r][v]);
  }
}

template <int V, bool Add>
void row_blocks(const float* const* in, int rows, int inner, const float* table, int columns,
                float* const* out, int offset) {
  int r = 0;
  for (; r + kRows[V] <= rows; r += kRows[V]) {
    row_block<kRows[V], V, Add>(in + r, inner, table, columns, out + r, offset);
  }
  for (; r + 4 <= rows; r += 4) {
    row_block<4, V, Add>(in + r, inner, table, columns, out + r, offset);
  }
  for (; r < rows; ++r) row_block<1, V, Add>(in + r, inner, table, columns, out + r, offset);
}

// out[r][c] (+)= sum over i < inner of in[r][i] * table[i][c]; `columns` is a multiple of 16.
template <bool Add>
void multiply_rows(const float* const* in, int rows, int inner, const float* table, int columns,
                   float* const* out) {
  int c = 0;
  for (; c + kVectors * kWidth <= columns; c += kVectors * kWidth) {
    row_blocks<kVectors, Add>(in, rows, inner, table, columns, out, c);
  }
#if defined(__AVX512F__)
  if (columns - c == 3 * kWidth) {
    row_blocks<3, Add>(in, rows, inner, table, columns, out, c);
  } else if (columns - c == 2 * kWidth) {
    row_blocks<2, Add>(in, rows, inner, table, columns, out, c);
  } else
#endif
      if (columns - c == kWidth) {
    row_blocks<1, Add>(in, rows, inner, table, columns, out, c);
  }
}

// out[d][:] = out[d][:] * factor[:] + sum over k of in[k][d] * table[k][:], R rows of V vectors.
template <int R, int V>
inline void column_block(const float* const* in, int first, int inner, const float* table,
                         int columns, const float* factor, float* out, int offset) {
  Floats sums[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int at = offset + v * kWidth;
      sums[r][v] = load(out + (first + r) * columns + at);
      if (factor) sums[r][v] *= load(factor + at);
    }
  }
  const float* row = table + offset;
  for (int k = 0; k < inner; ++k, row += columns) {
    const float* one = in[k] + first;
    Floats x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(row + v * kWidth);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const Floats f = fill(one[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += f * x[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(out + (first + r) * columns + offset + v * kWidth, sums[r][v]);
    }
  }
}

template <int V>
void column_blocks(const float* const* in, int rows, int inner, const float* table, int columns,
                   const float* factor, float* out, int offset) {
  int r = 0;
  for (; r + kRows[V] <= rows; r += kRows[V]) {
    column_block<kRows[V], V>(in, r, inner, table, columns, factor, out, offset);
  }
  for (; r + 4 <= rows; r += 4) {
    column_block<4, V>(in, r, inner, table, columns, factor, out, offset);
  }
  for (; r < rows; ++r) column_block<1, V>(in, r, inner, table, columns, factor, out, offset);
}

// out[d][c] = out[d][c] * factor[c] + sum over k < inner of in[k][d] * table[k][c], d < rows; no
// factor is 1. `columns` is a multiple of 16.
inline void multiply_columns(const float* const* in, int rows, int inner, const float* table,
                             int columns, const float* factor, float* out) {
  int c = 0;
  for (; c + kVectors * kWidth <= columns; c += kVectors * kWidth) {
    column_blocks<kVectors>(in, rows, inner, table, columns, factor, out, c);
  }
#if defined(__AVX512F__)
  if (columns - c == 3 * kWidth) {
    column_blocks<3>(in, rows, inner, table, columns, factor, out, c);
  } else if (columns - c == 2 * kWidth) {
    column_blocks<2>(in, rows, inner, table, columns, factor, out, c);
  } else
#endif
      if (columns - c == kWidth) {
    column_blocks<1>(in, rows, inner, table, columns, factor, out, c);
  }
}

}  // namespace gna
