// Backward attention on sm_90a, twice over the same pairs: once by tiles of queries for their
// gradient, once by tiles of keys for the gradients of keys and values. Sums then need no atomics,
// and their order is always the same.
//
// A block takes 128 rows, queries (or keys), 64 for each of two warpgroups, and meets columns, keys
// (or queries), in boxes that a warp of a third one has copied. With x and y the rows' operands and
// u and w the columns', s = x u', p = exp(s - lse), and ds = p (y w' - delta): then ds u is the
// gradient of x, and, where rows are keys, p w that of y. Scores lie in registers as the left
// operand of a product does, so p and ds are never stored.
#pragma once

#include "../repair_backward.h"
#include "forward.h"

namespace gna {

template <typename T>
struct HopperBackwardArguments {
  Problem p;
  Problem rows;  // the rows' layout: that of p or, `flat`, additional keys one after the other
  bool flat;
  int tiles;
  BoxShape box;  // of columns
  Pairs<T> pairs;
  TensorMap more_u, more_w;
  Maps x, y, u, w;
};

template <int kD, bool kKeys>
struct HopperBackward {
  static constexpr int kRows = 128, kThreads = 384;
  // Keys have two sums each, whose registers are taken from the scores.
  static constexpr int kColumns = kKeys && kD > 64 ? 64 : 128;
  static constexpr int kStages = kColumns * kD > 128 * 64 ? 2 : 4;
  static constexpr int kPanels = (kD + kPanel - 1) / kPanel;
  static constexpr int kBytes = kPanels * kColumns * 128;  // of a tile of columns
  static constexpr int kStatWarps = kKeys ? kColumns / 64 : 0;  // which bring numbers of queries
  // Of a thread that brings and of one that computes; what 128 give up 256 share.
  static constexpr int kGiven = kKeys ? 40 : 24, kTaken = kKeys ? 232 : 240;

  struct Shared {
    char x[kPanels][kRows * 128];
    char y[kPanels][kRows * 128];
    char u[kStages][kPanels][kColumns * 128];
    char w[kStages][kPanels][kColumns * 128];
    float lse[kStages][kColumns], delta[kStages][kColumns];  // of the columns, if queries
    Interval met[3][kRows];  // columns that each row meets along the dimensions
    Step step[kStages];
    Barrier rows_here, here[kStages], read[kStages];
    Boxes boxes;
    bool is_empty;
  };
};

template <typename T, int kD, bool kKeys>
GNA_DEVICE void hopper_backward_tile(const HopperBackwardArguments<T>& a) {
  using Shape = HopperBackward<kD, kKeys>;
  constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kStages = Shape::kStages;
  constexpr int kPanels = Shape::kPanels;
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(panels_memory());
  const Problem& p = a.p;
  const Pairs<T>& pairs = a.pairs;
  Boxes& boxes = shared.boxes;
  if (threadIdx.x == 0) {
    // Additional keys meet all queries, one after the other.
    const int more = kKeys ? a.flat ? p.tokens : 0 : p.additional;
    shared.is_empty = !boxes.template find<kKeys>(a.rows, a.tiles, kKeys ? p.kv_heads : p.heads,
                                                  a.box, more);
    if (kKeys && a.flat) boxes.along[0] = 0;
    start_barrier(shared.rows_here, 1);
    for (int n = 0; n < kStages; ++n) {
      start_barrier(shared.here[n], 1 + 32 * Shape::kStatWarps);
      start_barrier(shared.read[n], 8);
    }
    publish_barriers();
  }
  block_barrier();
  if (shared.is_empty) return;
  boxes.template meet_rows<kKeys>(a.rows, shared.met);
  block_barrier();
  // Keys meet the queries of all heads that read them, one after the other.
  const int heads = kKeys ? p.repeats() : 1, warp = uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;

  if (warp < 4) {
    give_registers<Shape::kGiven>();
    const int of_head = boxes.steps();
    if (threadIdx.x == 0) {
      int at[5];
      boxes.corner(at, a.rows, boxes.first, boxes.head);
      arrive_expecting(shared.rows_here, 2 * kPanels * kRows * 128);
      for (int panel = 0; panel < kPanels; ++panel) {
        at[0] = panel * kPanel;
        copy_box(shared.x[panel], a.x.of[boxes.map(a.rows)], shared.rows_here, at);
        copy_box(shared.y[panel], a.y.of[boxes.map(a.rows)], shared.rows_here, at);
      }
      int n = 0;
      for (int head = 0; head < heads; ++head) {
        int next[3] = {};
        for (int i = 0; i < of_head; ++i, ++n) {
          const int slot = n % kStages;
          const Step step = boxes.take(i, next);
          const TensorMap& u = step.more ? a.more_u : a.u.of[boxes.map(p)];
          const TensorMap& w = step.more ? a.more_w : a.w.of[boxes.map(p)];
          boxes.corner(at, p, step.place,
                       kKeys ? boxes.head * heads + head : boxes.head / p.repeats());
          if (step.more) at[2] = step.place[0], at[3] = 0, at[4] = boxes.batch;
          wait(shared.read[slot], ~(n / kStages) & 1);
          shared.step[slot] = step;
          arrive_expecting(shared.here[slot], 2 * Shape::kBytes);
          for (int panel = 0; panel < kPanels; ++panel) {
            at[0] = panel * kPanel;
            copy_box(shared.u[slot][panel], u, shared.here[slot], at);
            copy_box(shared.w[slot][panel], w, shared.here[slot], at);
          }
        }
      }
    } else if (warp > 0 && warp <= Shape::kStatWarps) {
      // Begun ahead of the stage's turn, so that only the first steps wait for them.
      const int first = (warp - 1) * 64 + lane;
      int n = 0;
      for (int head = 0; head < heads; ++head) {
        int next[3] = {};
        for (int i = 0; i < of_head; ++i, ++n) {
          const int slot = n % kStages;
          const Step step = boxes.take(i, next);
          float lse[2] = {}, delta[2] = {};
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const int token = boxes.column_token(p, a.box, step, first + part * 32);
            if (token < 0) continue;
            const int64_t query = place_of(p, boxes.batch, token, boxes.head * heads + head);
            lse[part] = pairs.lse[query];
            delta[part] = pairs.delta[query];
          }
          wait(shared.read[slot], ~(n / kStages) & 1);
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            shared.lse[slot][first + part * 32] = lse[part] * kLog2e;
            shared.delta[slot][first + part * 32] = delta[part];
          }
          arrive(shared.here[slot]);
        }
      }
    }
    return;
  }

  take_registers<Shape::kTaken>();
  const int first = (warp - 4) * 16;
  const uint64_t x = operand_at(shared.x[0] + (warp / 4 - 1) * 64 * 128);
  const uint64_t y = operand_at(shared.y[0] + (warp / 4 - 1) * 64 * 128);
  const uint64_t u = operand_at(shared.u[0][0], kColumns * 128);
  const uint64_t w = operand_at(shared.w[0][0], kColumns * 128);
  const float scale = p.scale * kLog2e;
  float dx[kD / 2] = {}, dy[kD / 2] = {}, s[kColumns / 2], ds[kColumns / 2];
  uint32_t rounded_p[kColumns / 16][4], rounded_ds[kColumns / 16][4];
  float lse[2] = {}, delta[2] = {};
  if (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = boxes.token(p, first + 8 * half + lane / 4);
      if (token < 0) continue;
      const int64_t query = place_of(p, boxes.batch, token, boxes.head);
      lse[half] = pairs.lse[query] * kLog2e;
      delta[half] = pairs.delta[query];
    }
  }
  const auto score = [&](float (&sums)[kColumns / 2], uint64_t rows, uint64_t columns) {
    begin_products();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      multiply(sums, further(rows, k / 4 * kRows * 128 + k % 4 * 32),
               further(columns, k / 4 * kColumns * 128 + k % 4 * 32), k > 0, T{});
    }
    end_group();
  };
  const auto add_up = [&](float (&sums)[kD / 2], const uint32_t (&weights)[kColumns / 16][4],
                          uint64_t columns) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      multiply(sums, weights[k], further(columns, k * 16 * 128), true, T{});
    }
  };
  const auto round = [](uint32_t (&rounded)[kColumns / 16][4], const float (&from)[kColumns / 2]) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rounded[k][i] = pack(from[k * 8 + 2 * i], from[k * 8 + 2 * i + 1], T{});
      }
    }
  };

  wait(shared.rows_here, 0);
  const int steps = heads * boxes.steps();
  for (int n = 0; n < steps; ++n) {
    const int slot = n % kStages;
    const uint64_t these_u = further(u, slot * Shape::kBytes);
    const uint64_t these_w = further(w, slot * Shape::kBytes);
    const float* const column_lse = shared.lse[slot] + lane % 4 * 2;
    const float* const column_delta = shared.delta[slot] + lane % 4 * 2;
    wait(shared.here[slot], n / kStages & 1);
    score(s, x, these_u);
    score(ds, y, these_w);
    const Step step = shared.step[slot];
    wait_for_products<1>();
    changed(s);
    if (step.met != kMetAll) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + 8 * half + lane / 4;
        const Interval met[3] = {shared.met[0][row], shared.met[1][row], shared.met[2][row]};
        Boxes::visit_mask<kColumns>(step, a.box, met, [&](int column, bool met) {
          float& score = s[column / 8 * 4 + 2 * half + column % 2];
          score = met ? score : -INFINITY;
        });
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      s[i] = power_of_two(s[i] * scale - (kKeys ? column_lse[i / 4 * 8 + i % 2] : lse[i / 2 % 2]));
    }
    wait_for_products<0>();
    changed(ds);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      ds[i] = s[i] * (ds[i] - (kKeys ? column_delta[i / 4 * 8 + i % 2] : delta[i / 2 % 2]));
    }
    if (kKeys) round(rounded_p, s);
    round(rounded_ds, ds);
    begin_products();
    if (kKeys) add_up(dy, rounded_p, these_w);
    add_up(dx, rounded_ds, these_u);
    end_group();
    wait_for_products<0>();
    changed(dx);
    if (kKeys) changed(dy);
    if (lane == 0) arrive(shared.read[slot]);
  }

  uint32_t strange = 0;  // rows of the warp whose sums are not finite, a bit each
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = boxes.token(a.rows, first + 8 * half + lane / 4);
    float zero = 0;
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) {
      if (i / 2 % 2 == half) zero += dx[i] * 0 + (kKeys ? dy[i] * 0 : 0);
    }
    const uint32_t lanes = votes(token >= 0 && zero != 0);
    for (int n = 0; n < 8; ++n) {
      if (lanes >> (4 * n) & 15) strange |= 1u << (8 * half + n);
    }
    const auto write = [&](const Operand<T>& to, const float (&sums)[kD / 2], float factor) {
      T* const row = to.row(p, boxes.batch, token + (kKeys && a.flat ? p.tokens : 0), boxes.head);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        if (n * 8 >= to.dim) continue;
        reinterpret_cast<uint32_t*>(row)[n * 4 + lane % 4] =
            pack(sums[n * 4 + 2 * half] * factor, sums[n * 4 + 2 * half + 1] * factor, T{});
      }
    };
    if (token < 0) continue;
    write(pairs.dx, dx, p.scale);
    if (kKeys) write(pairs.dy, dy, 1);
  }
  warp_barrier();  // the rows are written
  for (int n = 0; strange >> n; ++n) {
    if (!(strange >> n & 1)) continue;
    repair_gradients<kKeys>(p, pairs, boxes.batch,
                            boxes.token(a.rows, first + n) + (kKeys && a.flat ? p.tokens : 0),
                            boxes.head);
  }
}

template <typename T, int kD, bool kKeys>
__global__ void __launch_bounds__(384, 1)
    hopper_backward(const __grid_constant__ HopperBackwardArguments<T> a) {
  if constexpr (kHasBoxes) hopper_backward_tile<T, kD, kKeys>(a);
}

// The host's side. A tile of rows has 128 tokens, a box of columns as many as a step.
template <typename T, int kD, bool kKeys>
cudaError_t launch_hopper_gradients(const Problem& p, const int (&box)[3], const Pairs<T>& pairs,
                                    cudaStream_t stream) {
  using Shape = HopperBackward<kD, kKeys>;
  HopperBackwardArguments<T> a{p, p, false, layout_tiles(p), box_shape(box), pairs};
  const int tile[3] = {p.axis[0].tile, p.axis[1].tile, p.axis[2].tile};
  const int blocks = (kKeys ? p.kv_heads : p.heads) * p.batch;
  const int bytes = static_cast<int>(sizeof(typename Shape::Shared));
  cudaError_t error = make_maps(a.x, p, pairs.x, tile);
  if (error == cudaSuccess) error = make_maps(a.y, p, pairs.y, tile);
  if (error == cudaSuccess) error = make_maps(a.u, p, pairs.u, box);
  if (error == cudaSuccess) error = make_maps(a.w, p, pairs.w, box);
  if (!kKeys && p.additional && error == cudaSuccess) {
    error = make_map_of_more(a.more_u, p, pairs.u, Shape::kColumns);
    if (error == cudaSuccess) error = make_map_of_more(a.more_w, p, pairs.w, Shape::kColumns);
  }
  if (error == cudaSuccess) {
    error = launch(hopper_backward<T, kD, kKeys>, int64_t{a.tiles} * blocks, Shape::kThreads,
                   bytes, stream, a);
  }
  if (!kKeys || p.additional == 0 || error != cudaSuccess) return error;
  // Additional keys are rows of a layout of their own, and columns all queries in theirs.
  a.rows.tokens = p.additional;
  for (int m = 0; m < 3; ++m) a.rows.axis[m] = Axis{};
  a.rows.axis[2].length = a.rows.axis[2].kernel = p.additional;
  a.rows.axis[2].tile = Shape::kRows;
  a.flat = true;
  a.tiles = layout_tiles(a.rows);
  const auto more = [](const Operand<const T>& x) {
    return Operand<const T>{x.more, nullptr, x.heads, x.dim};
  };
  const auto all = [](const Operand<const T>& x) {
    return Operand<const T>{nullptr, x.data, x.heads, x.dim};
  };
  Problem queries = p;
  queries.additional = p.tokens;
  error = make_maps(a.x, a.rows, more(pairs.x), {1, 1, Shape::kRows});
  if (error == cudaSuccess) error = make_maps(a.y, a.rows, more(pairs.y), {1, 1, Shape::kRows});
  if (error == cudaSuccess) {
    error = make_map_of_more(a.more_u, queries, all(pairs.u), Shape::kColumns);
  }
  if (error == cudaSuccess) {
    error = make_map_of_more(a.more_w, queries, all(pairs.w), Shape::kColumns);
  }
  if (error != cudaSuccess) return error;
  return launch(hopper_backward<T, kD, kKeys>, int64_t{a.tiles} * blocks, Shape::kThreads, bytes,
                stream, a);
}

}  // namespace gna
