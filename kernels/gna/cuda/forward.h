// Forward attention on tensor cores: a block of four warps takes a tile of 128 queries of one head.
#pragma once

#include "repair.h"

namespace gna {

template <typename T>
struct ForwardArguments {
  Problem p;
  int tiles;
  Operand<const T> query, key, value;
  Operand<T> output;
  float* lse;
};

template <int kD>
struct Forward {
  static constexpr int kRows = 128, kColumns = 64;
  static constexpr int kM = kRows / kWarps / 16, kN = kColumns / 8;
  static constexpr int kBytes = (kRows + 2 * kColumns) * kD * 2;
  static constexpr int kShared = kBytes + sizeof(Walk);
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardArguments<T> a) {
  using Shape = Forward<kD>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kColumns = Shape::kColumns;
  const Problem& p = a.p;
  char* const queries = shared_memory();
  char* const keys = queries + Shape::kRows * kD * 2;
  char* const values = keys + kColumns * kD * 2;
  Walk& walk = *reinterpret_cast<Walk*>(queries + Shape::kBytes);
  const Place place(p, a.tiles, p.heads);
  if (!start_walk<false>(walk, p, place.tile, Shape::kRows)) return;

  const int head = place.head, key_head = head / p.repeats(), batch = place.batch;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kM * 16;
  const Places places[kM][2] = {{{p, first + lane / 4}, {p, first + lane / 4 + 8}},
                                {{p, first + lane / 4 + 16}, {p, first + lane / 4 + 24}}};
  const int steps = ceil_div(walk.count, kColumns);
  gather<kD, Shape::kRows>(queries, walk.row_token, p, a.query, batch, head);
  plan_step<kColumns>(walk, p, 0, 0);
  block_barrier();
  gather<kD, kColumns>(keys, walk.token[0], p, a.key, batch, key_head);

  const float scale = p.scale * kLog2e;
  float sums[kM][kD / 8][4] = {}, top[kM][2], total[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) top[m][0] = top[m][1] = -INFINITY;

  for (int step = 0; step < steps; ++step) {
    wait_for_copies();
    block_barrier();  // keys are here, values no longer read
    gather<kD, kColumns>(values, walk.token[step % kSteps], p, a.value, batch, key_head);
    float s[kM][kN][4] = {};
    multiply_tiles<T, kD>(s, queries, first, keys);
    if (step + 1 < steps) plan_step<kColumns>(walk, p, step + 1, step + 1);
    if ((step + 1) * kColumns > walk.free) {
      visit_mask<kM, kN>(walk, step, places, [&](int m, int n, int i, bool met) {
        if (!met) s[m][n][i] = -INFINITY;
      });
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        most = fmaxf(most, exchange(most, 1));
        most = fmaxf(most, exchange(most, 2));
        // A row that has met nothing yet has no maximum to subtract.
        const float shift = most == -INFINITY ? 0.0f : most * scale;
        const float kept = power_of_two(top[m][half] * scale - shift);
        top[m][half] = most;
        total[m][half] *= kept;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[m][n][2 * half + c];
            x = power_of_two(x * scale - shift);
            total[m][half] += x;
          }
        }
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          sums[m][n][2 * half] *= kept;
          sums[m][n][2 * half + 1] *= kept;
        }
      }
    }
    uint32_t rounded[kM][kN / 2][4];
    round_tile<T>(rounded, s);
    wait_for_copies();
    block_barrier();  // values are here, keys no longer read, and the next step is planned
    if (step + 1 < steps) {
      gather<kD, kColumns>(keys, walk.token[(step + 1) % kSteps], p, a.key, batch, key_head);
    }
    accumulate<T, kD>(sums, rounded, values);
  }

  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = total[m][half];
      sum += exchange(sum, 1);
      sum += exchange(sum, 2);
      factor[m][half] = 1 / sum;
      const int token = walk.row_token[first + m * 16 + half * 8 + lane / 4];
      if (token >= 0 && lane % 4 == 0) {
        a.lse[place_of(p, batch, token, head)] = top[m][half] * p.scale + logf(sum);
      }
    }
  }
  scatter<kD>(queries, walk.row_token, first, p, a.output, batch, head, sums, factor);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float strange = 0;  // not 0 if any of the sums is not finite
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        strange += sums[m][n][2 * half] * 0 + sums[m][n][2 * half + 1] * 0;
      }
      const int row = first + m * 16 + half * 8;
      const bool lost = walk.row_token[row + lane / 4] >= 0 && strange != 0 && total[m][half] > 0;
      const uint32_t rows = votes(lost);
      for (int n = 0; n < 8 && rows != 0; ++n) {
        if ((rows >> 4 * n & 15) == 0) continue;
        repair_output(p, a.query, a.key, a.value, a.output, a.lse, batch, walk.row_token[row + n],
                      head);
      }
    }
  }
}

}  // namespace gna
