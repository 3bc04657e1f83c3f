// Backward attention on tensor cores, twice over the same pairs: once by tiles of queries for their
// gradient, once by tiles of keys for the gradients of keys and values. Sums then need no atomics,
// and their order is always the same.
//
// A block of four warps takes 64 rows, queries (or keys), and meets columns, keys (or queries).
// With x and y the rows' operands and u and w the columns', s = x u', p = exp(s - lse), and
// ds = p (y w' - delta): then ds u is the gradient of x, and, where rows are keys, p w that of y.
#pragma once

#include "repair_backward.h"

namespace gna {

template <typename T>
struct BackwardArguments {
  Problem p;
  int tiles;
  Operand<const T> x, y;  // query and d_output, or key and value
  Operand<const T> u, w;  // key and value, or query and d_output
  Operand<T> dx, dy;      // dy only where rows are keys
  const float *lse, *delta;
};

template <int kD>
struct Backward {
  // Long rows leave registers, and sm_86's shared memory, for fewer columns.
  static constexpr int kRows = 64, kColumns = kD > 64 ? 32 : 64, kN = kColumns / 8;
  static constexpr int kStage = 2 * kColumns * kD * 2;
  static constexpr int kBytes = 2 * kRows * kD * 2 + 2 * kStage;
  static constexpr int kShared = kBytes + sizeof(Walk) + 2 * 2 * kColumns * sizeof(float);
};

template <typename T, int kD, bool kKeys>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardArguments<T> a) {
  using Shape = Backward<kD>;
  constexpr int kN = Shape::kN, kColumns = Shape::kColumns;
  const Problem& p = a.p;
  char* const x = shared_memory();
  char* const y = x + Shape::kRows * kD * 2;
  char* const stages = y + Shape::kRows * kD * 2;
  Walk& walk = *reinterpret_cast<Walk*>(x + Shape::kBytes);
  float* const column_stats = reinterpret_cast<float*>(&walk + 1);
  const Place place(p, a.tiles, kKeys ? p.kv_heads : p.heads);
  if (!start_walk<kKeys>(walk, p, place.tile, Shape::kRows)) return;

  const int row_head = place.head, batch = place.batch;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  const Places places[1][2] = {{{p, first + lane / 4}, {p, first + lane / 4 + 8}}};
  // Keys meet the queries of all heads that read them, one after the other.
  const int tiles = ceil_div(walk.count, kColumns), steps = kKeys ? tiles * p.repeats() : tiles;

  auto stat = [&](const float* from, int token, int head) {
    return from + (int64_t{batch} * p.tokens + token) * p.heads + head;
  };
  auto start_stage = [&](int step) {
    const int head = kKeys ? row_head * p.repeats() + step / tiles : row_head / p.repeats();
    const int* tokens = walk.token[step % kSteps];
    char* stage = stages + step % 2 * Shape::kStage;
    gather<kD, kColumns>(stage, tokens, p, a.u, batch, head);
    gather<kD, kColumns>(stage + kColumns * kD * 2, tokens, p, a.w, batch, head);
    if (kKeys && threadIdx.x < kColumns) {
      const int token = tokens[threadIdx.x];
      const bool present = token >= 0;
      float* stats = column_stats + step % 2 * 2 * kColumns + threadIdx.x;
      copy_4(stats, present ? stat(a.lse, token, head) : a.lse, present);
      copy_4(stats + kColumns, present ? stat(a.delta, token, head) : a.delta, present);
    }
  };

  gather<kD, Shape::kRows>(x, walk.row_token, p, a.x, batch, row_head);
  gather<kD, Shape::kRows>(y, walk.row_token, p, a.y, batch, row_head);
  float lse[2] = {}, delta[2] = {};
  if (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = walk.row_token[first + half * 8 + lane / 4];
      if (token < 0) continue;
      lse[half] = *stat(a.lse, token, row_head) * kLog2e;
      delta[half] = *stat(a.delta, token, row_head);
    }
  }
  plan_step<kColumns>(walk, p, 0, 0);
  block_barrier();
  start_stage(0);

  const float scale = p.scale * kLog2e;
  float dx[1][kD / 8][4] = {}, dy[1][kD / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int tile = step % tiles;
    if (step + 1 < steps) plan_step<kColumns>(walk, p, (step + 1) % tiles, step + 1);
    wait_for_copies();
    block_barrier();  // the stage is here, the other no longer read, and the next step is planned
    if (step + 1 < steps) start_stage(step + 1);
    char* const u = stages + step % 2 * Shape::kStage;
    char* const w = u + kColumns * kD * 2;
    const float* const stats = column_stats + step % 2 * 2 * kColumns + lane % 4 * 2;
    float s[1][kN][4] = {}, ds[1][kN][4] = {};
    multiply_tiles<T, kD>(s, x, first, u);
    multiply_tiles<T, kD>(ds, y, first, w);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const of_column = stats + n * 8 + i % 2;
        const float norm = kKeys ? of_column[0] * kLog2e : lse[i / 2];
        s[0][n][i] = power_of_two(s[0][n][i] * scale - norm);
      }
    }
    if ((tile + 1) * kColumns > walk.free) {
      visit_mask<1, kN>(walk, step, places, [&](int m, int n, int i, bool met) {
        if (!met) s[m][n][i] = 0;
      });
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = kKeys ? stats[kColumns + n * 8 + i % 2] : delta[i / 2];
        ds[0][n][i] = s[0][n][i] * (ds[0][n][i] - shift);
      }
    }
    uint32_t rounded[1][kN / 2][4];
    if (kKeys) {
      round_tile<T>(rounded, s);
      accumulate<T, kD>(dy, rounded, w);
    }
    round_tile<T>(rounded, ds);
    accumulate<T, kD>(dx, rounded, u);
  }
  scatter<kD>(x, walk.row_token, first, p, a.dx, batch, row_head, dx, {{p.scale, p.scale}});
  if (kKeys) scatter<kD>(y, walk.row_token, first, p, a.dy, batch, row_head, dy, {{1.0f, 1.0f}});
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float strange = 0;  // not 0 if any of the sums is not finite
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        strange += dx[0][n][2 * half + c] * 0;
        if (kKeys) strange += dy[0][n][2 * half + c] * 0;
      }
    }
    const int row = first + half * 8;
    const uint32_t rows = votes(walk.row_token[row + lane / 4] >= 0 && strange != 0);
    for (int n = 0; n < 8 && rows != 0; ++n) {
      if ((rows >> 4 * n & 15) == 0) continue;
      repair_gradients<kKeys>(p, Pairs<T>{a.x, a.y, a.u, a.w, a.dx, a.dy, a.lse, a.delta}, batch,
                              walk.row_token[row + n], row_head);
    }
  }
}

}  // namespace gna
