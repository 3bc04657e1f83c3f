// Forward attention on sm_90a: a tile of 128 queries of one head, by a warpgroup that has boxes of
// keys and values copied and two, of 64 queries each, that take turns: while one waits for its
// products the other makes probabilities of its scores.
#pragma once

#include "../forward.h"
#include "../repair.h"
#include "maps.h"

namespace gna {

template <typename T>
struct HopperForwardArguments {
  Problem p;
  int tiles;
  BoxShape box;  // of keys
  Operand<const T> query, key, value;
  Operand<T> output;
  float* lse;
  TensorMap more_keys, more_values;
  Maps queries, keys, values;
};

template <int kD>
struct HopperForward {
  static constexpr int kRows = 128, kColumns = 128, kThreads = 384;
  static constexpr int kPanels = (kD + kPanel - 1) / kPanel;
  static constexpr int kStages = kD > 64 ? 2 : 4;
  static constexpr int kBytes = kPanels * kColumns * 128;  // of a tile of keys or values

  struct Shared {
    char query[kPanels][kRows * 128];
    char key[kStages][kPanels][kColumns * 128];
    char value[kStages][kPanels][kColumns * 128];
    Interval met[3][kRows];  // columns that each row meets along the dimensions
    int token[kRows];        // -1 where there is none
    Step step[kStages];
    Barrier query_here, key_here[kStages], value_here[kStages];
    Barrier key_read[kStages], value_read[kStages];
  };
};

// Named barriers: the turns of the two warpgroups.
constexpr int kTurn = 1;

template <typename T, int kD>
GNA_DEVICE void hopper_forward_tile(const HopperForwardArguments<T>& a) {
  using Shape = HopperForward<kD>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStages = Shape::kStages;
  constexpr int kPanels = Shape::kPanels;
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(panels_memory());
  const Problem& p = a.p;
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  Boxes boxes;
  if (!boxes.find<false>(p, a.tiles, p.heads, a.box, p.additional)) return;
  const int steps = boxes.steps();
  if (threadIdx.x == 0) {
    start_barrier(shared.query_here, 1);
    for (int n = 0; n < kStages; ++n) {
      start_barrier(shared.key_here[n], 1);
      start_barrier(shared.value_here[n], 1);
      start_barrier(shared.key_read[n], 2);
      start_barrier(shared.value_read[n], 2);
    }
    publish_barriers();
  }
  boxes.meet_rows<false>(p, shared.met);
  if (threadIdx.x < kRows) shared.token[threadIdx.x] = boxes.token(p, threadIdx.x);
  block_barrier();

  if (warpgroup == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      int at[5];
      boxes.corner(at, p, boxes.first, boxes.head);
      arrive_expecting(shared.query_here, kPanels * kRows * 128);
      for (int n = 0; n < kPanels; ++n) {
        at[0] = n * kPanel;
        copy_box(shared.query[n], a.queries.of[boxes.map(p)], shared.query_here, at);
      }
      const int key_head = boxes.head / p.repeats();
      int next[3] = {};
      for (int n = 0; n < steps; ++n) {
        const int slot = n % kStages, ended = ~(n / kStages) & 1;
        const Step step = boxes.take(n, next);
        const TensorMap& keys = step.more ? a.more_keys : a.keys.of[boxes.map(p)];
        const TensorMap& values = step.more ? a.more_values : a.values.of[boxes.map(p)];
        boxes.corner(at, p, step.place, key_head);
        if (step.more) at[2] = step.place[0], at[3] = 0, at[4] = boxes.batch;
        wait(shared.key_read[slot], ended);
        shared.step[slot] = step;
        arrive_expecting(shared.key_here[slot], Shape::kBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
          at[0] = panel * kPanel;
          copy_box(shared.key[slot][panel], keys, shared.key_here[slot], at);
        }
        wait(shared.value_read[slot], ended);
        arrive_expecting(shared.value_here[slot], Shape::kBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
          at[0] = panel * kPanel;
          copy_box(shared.value[slot][panel], values, shared.value_here[slot], at);
        }
      }
    }
    return;
  }

  take_registers<232>();
  const int me = warpgroup - 1, first = me * 64 + warp * 16 + lane / 4;
  const bool speaks = threadIdx.x % 128 == 0;
  const float scale = p.scale * kLog2e;
  float sums[kD / 2] = {}, s[kColumns / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  float kept[2];
  uint32_t rounded[kColumns / 16][4];
  const auto score = [&](int slot) {
    begin_products();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      multiply(s, operand_at(shared.query[k / 4] + me * 64 * 128 + k % 4 * 32),
               operand_at(shared.key[slot][k / 4] + k % 4 * 32), k > 0, T{});
    }
    end_group();
  };
  const auto accumulate_values = [&](int slot) {
    begin_products();
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      multiply(sums, rounded[k],
               operand_at(shared.value[slot][0] + k * 16 * 128, kColumns * 128), true, T{});
    }
    end_group();
  };
  // Probabilities up to a factor, which `kept` brings up to date for what came before.
  const auto probabilities = [&](const Step& step) {
    if (step.met != kMetAll) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + 8 * half;
        const Interval met[3] = {shared.met[0][row], shared.met[1][row], shared.met[2][row]};
        Boxes::visit_mask<kColumns>(step, a.box, met, [&](int column, bool met) {
          float& x = s[column / 8 * 4 + 2 * half + column % 2];
          x = met ? x : -INFINITY;
        });
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top[half];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        most = fmaxf(most, fmaxf(s[n * 4 + 2 * half], s[n * 4 + 2 * half + 1]));
      }
      most = fmaxf(most, exchange(most, 1));
      most = fmaxf(most, exchange(most, 2));
      // A row that has met nothing yet has no maximum to subtract.
      const float shift = most == -INFINITY ? 0.0f : most * scale;
      kept[half] = power_of_two(top[half] * scale - shift);
      top[half] = most;
      total[half] *= kept[half];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[n * 4 + 2 * half + c];
          x = power_of_two(x * scale - shift);
          total[half] += x;
        }
      }
    }
  };
  const auto round = [&] {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[k][i] = pack(s[k * 8 + 2 * i], s[k * 8 + 2 * i + 1], T{});
    }
  };

  wait(shared.query_here, 0);
  wait(shared.key_here[0], 0);
  Step step = shared.step[0];
  if (me == 1) meet(kTurn + 1, 256);  // the first warpgroup begins
  score(0);
  wait_for_products<0>();
  changed(s);
  if (speaks) arrive(shared.key_read[0]);
  signal(kTurn + 1 - me, 256);
  probabilities(step);
  round();
  for (int n = 1; n < steps; ++n) {
    const int slot = n % kStages, before = (n - 1) % kStages;
    wait(shared.key_here[slot], n / kStages & 1);
    step = shared.step[slot];
    meet(kTurn + me, 256);
    score(slot);
    wait(shared.value_here[before], (n - 1) / kStages & 1);
    accumulate_values(before);
    signal(kTurn + 1 - me, 256);
    wait_for_products<1>();
    changed(s);
    if (speaks) arrive(shared.key_read[slot]);
    probabilities(step);
    keep_before(total[0] + total[1]);  // or the compiler waits for the other products first
    wait_for_products<0>();
    changed(sums);
    if (speaks) arrive(shared.value_read[before]);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) sums[i] *= kept[i / 2 % 2];
    round();
  }
  const int last = (steps - 1) % kStages;
  wait(shared.value_here[last], (steps - 1) / kStages & 1);
  accumulate_values(last);
  wait_for_products<0>();
  changed(sums);
  if (me == 0) meet(kTurn, 256);  // the other's last turn is over

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = total[half];
    sum += exchange(sum, 1);
    sum += exchange(sum, 2);
    const int token = shared.token[first + 8 * half];
    float strange = 0;  // not 0 if any of the sums is not finite
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      strange += sums[n * 4 + 2 * half] * 0 + sums[n * 4 + 2 * half + 1] * 0;
    }
    if (token >= 0) {
      if (lane % 4 == 0) {
        a.lse[place_of(p, boxes.batch, token, boxes.head)] = top[half] * p.scale + logf(sum);
      }
      T* const row = a.output.row(p, boxes.batch, token, boxes.head);
      const float factor = 1 / sum;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        if (n * 8 >= p.value_dim) continue;
        reinterpret_cast<uint32_t*>(row)[n * 4 + lane % 4] =
            pack(sums[n * 4 + 2 * half] * factor, sums[n * 4 + 2 * half + 1] * factor, T{});
      }
    }
    const uint32_t rows = votes(token >= 0 && strange != 0 && sum > 0);
    if (rows == 0) continue;
    warp_barrier();  // the rows are written
    for (int n = 0; n < 8; ++n) {
      if ((rows >> 4 * n & 15) == 0) continue;
      repair_output(p, a.query, a.key, a.value, a.output, a.lse, boxes.batch,
                    shared.token[me * 64 + warp * 16 + half * 8 + n], boxes.head);
    }
  }
}

template <typename T, int kD>
__global__ void __launch_bounds__(384, 1)
    hopper_forward(const __grid_constant__ HopperForwardArguments<T> a) {
  if constexpr (kHasBoxes) hopper_forward_tile<T, kD>(a);
}

// The host's side: output and log-sum-exp of a problem whose tiles of queries have 128 tokens, as
// have boxes of keys.
template <typename T, int kD>
cudaError_t launch_hopper_forward(const Problem& p, const int (&box)[3],
                                  const Operand<const T>& query, const Operand<const T>& key,
                                  const Operand<const T>& value, const Operand<T>& output,
                                  float* lse, cudaStream_t stream) {
  using Shape = HopperForward<kD>;
  HopperForwardArguments<T> a{p, layout_tiles(p), box_shape(box), query, key, value, output,
                              lse};
  const int tile[3] = {p.axis[0].tile, p.axis[1].tile, p.axis[2].tile};
  cudaError_t error = make_maps(a.queries, p, query, tile);
  if (error == cudaSuccess) error = make_maps(a.keys, p, key, box);
  if (error == cudaSuccess) error = make_maps(a.values, p, value, box);
  if (error == cudaSuccess && p.additional) {
    error = make_map_of_more(a.more_keys, p, key, Shape::kColumns);
    if (error == cudaSuccess) error = make_map_of_more(a.more_values, p, value, Shape::kColumns);
  }
  if (error != cudaSuccess) return error;
  return launch(hopper_forward<T, kD>, int64_t{a.tiles} * p.heads * p.batch, Shape::kThreads,
                static_cast<int>(sizeof(typename Shape::Shared)), stream, a);
}

}  // namespace gna
