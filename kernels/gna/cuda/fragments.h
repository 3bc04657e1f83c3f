// Tiles of 16-bit rows in shared memory, and products of them in registers.
#pragma once

#include "instructions.h"
#include "walk.h"

namespace gna {

constexpr float kLog2e = 1.44269504088896f;

// One operand of the call: [B, tokens, heads, dim], and maybe additional tokens of it.
template <typename T>
struct Operand {
  T* data;
  T* more;
  int heads, dim;

  GNA_DEVICE T* row(const Problem& p, int batch, int token, int head) const {
    const bool inside = token < p.tokens;
    const int64_t place = inside ? int64_t{batch} * p.tokens + token
                                 : int64_t{batch} * p.additional + (token - p.tokens);
    return (inside ? data : more) + (place * heads + head) * dim;
  }
};

// A chunk of 8 numbers in a tile whose rows have kD. Chunks are shuffled so that 8 rows of a column
// of chunks lie in different banks.
template <int kD>
GNA_DEVICE char* chunk_at(char* tile, int row, int chunk) {
  constexpr int kChunks = kD / 8;
  const int shuffled = kChunks >= 8 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
  return tile + (row * kChunks + shuffled) * 16;
}

// Starts to copy the rows of some tokens; rows without a token, and what a row lacks to kD, are 0.
template <int kD, int kRows, typename T>
GNA_DEVICE void gather(char* tile, const int* tokens, const Problem& p, const Operand<T>& x,
                       int batch, int head) {
  constexpr int kChunks = kD / 8;
#pragma unroll 2  // registers are scarce
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int n = i * kThreads + threadIdx.x, row = n / kChunks, chunk = n % kChunks;
    const int token = tokens[row];
    const bool present = token >= 0 && chunk * 8 < x.dim;
    copy_16(chunk_at<kD>(tile, row, chunk),
            present ? x.row(p, batch, token, head) + chunk * 8 : x.data, present);
  }
}

// Writes kM * 16 rows of a warp, from registers by way of the tile, each row times a factor.
template <int kD, int kM, typename T>
GNA_DEVICE void scatter(char* tile, const int* tokens, int first, const Problem& p,
                        const Operand<T>& x, int batch, int head,
                        const float (&sums)[kM][kD / 8][4],
                        const float (&factor)[kM][2]) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        char* chunk = chunk_at<kD>(tile, first + m * 16 + half * 8 + group, n);
        reinterpret_cast<uint32_t*>(chunk)[pair] =
            pack(sums[m][n][2 * half] * factor[m][half],
                 sums[m][n][2 * half + 1] * factor[m][half], T{});
      }
    }
  }
  warp_barrier();
  constexpr int kChunks = kD / 8;
#pragma unroll
  for (int i = 0; i < kM * 16 * kChunks / 32; ++i) {
    const int n = i * 32 + lane, row = first + n / kChunks, chunk = n % kChunks;
    if (tokens[row] < 0 || chunk * 8 >= x.dim) continue;
    T* target = x.row(p, batch, tokens[row], head) + chunk * 8;
    *reinterpret_cast<int4*>(target) = *reinterpret_cast<int4*>(chunk_at<kD>(tile, row, chunk));
  }
  warp_barrier();
}

// s[m][n] += rows (first + 16 m) of one tile times rows (8 n) of another.
template <typename T, int kD, int kM, int kN>
GNA_DEVICE void multiply_tiles(float (&s)[kM][kN][4], char* rows, int first, char* columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_matrices(a[m], chunk_at<kD>(rows, first + m * 16 + lane % 16, 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      const int row = n * 8 + lane / 16 * 8 + lane % 8;
      load_matrices(b, chunk_at<kD>(columns, row, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add(s[m][n], a[m], b[0], b[1], T{});
        multiply_add(s[m][n + 1], a[m], b[2], b[3], T{});
      }
    }
  }
}

// Products' results [rows, 8 kN], rounded to T, as the left operand of another product.
template <typename T, int kM, int kN>
GNA_DEVICE void round_tile(uint32_t (&a)[kM][kN / 2][4], const float (&p)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      a[m][n / 2][n % 2 * 2] = pack(p[m][n][0], p[m][n][1], T{});
      a[m][n / 2][n % 2 * 2 + 1] = pack(p[m][n][2], p[m][n][3], T{});
    }
  }
}

// sums [rows, kD] += a [rows, 16 kK] times the tile's rows.
template <typename T, int kD, int kM, int kK>
GNA_DEVICE void accumulate(float (&sums)[kM][kD / 8][4], const uint32_t (&a)[kM][kK][4],
                           char* tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < kD / 16; ++n) {
      uint32_t b[4];
      const int row = k * 16 + lane / 8 % 2 * 8 + lane % 8;
      load_transposed(b, chunk_at<kD>(tile, row, 2 * n + lane / 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add(sums[m][2 * n], a[m][k], b[0], b[1], T{});
        multiply_add(sums[m][2 * n + 1], a[m][k], b[2], b[3], T{});
      }
    }
  }
}

// Calls visit(m, n, 2 half + c, met) for the elements of this lane: s[m][n][2 half + c] stands in
// row 16 m + 8 half + lane / 4 and column 8 n + 2 (lane % 4) + c, `met` says whether they meet.
template <int kM, int kN, typename Visit>
GNA_DEVICE void visit_mask(const Walk& walk, int step, const Places (&places)[kM][2],
                           const Visit& visit) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int word = 0; word < kN / 4; ++word) {
        const uint32_t bits =
            places[m][half].mask(walk, step, word) >> (threadIdx.x % 4 * 2);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            visit(m, word * 4 + n, 2 * half + c, (bits >> (n * 8 + c) & 1) != 0);
          }
        }
      }
    }
  }
}

}  // namespace gna
