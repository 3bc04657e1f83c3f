// How a block for sm_90a goes about: its tile of rows is one box of tokens, and the columns that
// these meet come in boxes of a fixed shape, each copied by one instruction for 64 of its numbers.
//
// Rows are queries and columns keys, or the other way round, as in ../walk.h. Boxes of columns begin
// with the first column that a row meets, and additional keys follow. Those whose columns all rows
// meet need no mask. A box is a matrix of as many rows as it has tokens, in row-major order of the
// dimensions.
#pragma once

#include "../problem.h"
#include "machine.h"

namespace gna {

constexpr int kPanel = 64;      // columns of a panel
constexpr int kMostGroups = 60; // dilation groups whose maps are passed to a kernel, 4 of each

// The shape of boxes of columns: powers of two, the last at least 8, so that every 8 columns differ
// in the last dimension only. Counted by 8, columns change along a dimension every `unit` and recur
// with `repeat`, which has a bit for each time.
struct BoxShape {
  int size[3], unit[3];
  int log[3];  // of sizes
  uint32_t repeat[3];
};

inline BoxShape box_shape(const int (&size)[3]) {
  BoxShape shape{};
  int period = 1;
  for (int m = 2; m >= 0; --m) {
    shape.size[m] = size[m];
    while (1 << shape.log[m] < size[m]) ++shape.log[m];
    shape.unit[m] = period;
    period *= m == 2 ? size[m] / 8 : size[m];
    for (int n = 0; n < 32; n += period) shape.repeat[m] |= 1u << n;
  }
  return shape;
}

// What of a step's columns is met: all by all rows, by each row its own, or so many by all rows.
enum Met { kMetAll = 0, kMetOwn = -1 };

struct Step {
  int place[3];  // a box's first column in its dilation group; or the first additional key
  int met;       // of type Met, or a number of additional keys; below `more`
  bool more;     // whether these are additional keys
};

// The tile of a block, and the list of its steps.
struct Boxes {
  int group;       // of dilation
  int head, batch; // of the rows
  int offset[3], length[3], first[3];
  int start[3], along[3], free_start[3], free_along[3];
  int box[3];  // columns of a box
  int additional, columns;

  // False if the tile is empty. Tiles of a head come before those of the next.
  template <bool kKeys>
  GNA_DEVICE bool find(const Problem& p, int tiles, int heads, const BoxShape& shape,
                       int additional_keys) {
    int rest = blockIdx.x % tiles;
    head = blockIdx.x / tiles % heads;
    batch = blockIdx.x / tiles / heads;
#pragma unroll
    for (int m = 2; m >= 0; --m) {
      const int n = ceil_div(group_length(p.axis[m], 0), p.axis[m].tile);
      first[m] = rest % n * p.axis[m].tile;
      rest /= n;
    }
    group = rest;
    bool inside = true;
    columns = 1;
#pragma unroll
    for (int m = 2; m >= 0; --m) {
      const Axis& axis = p.axis[m];
      offset[m] = rest % axis.dilation;
      rest /= axis.dilation;
      length[m] = group_length(axis, offset[m]);
      inside &= first[m] < length[m];
      const int last = first[m] + axis.tile - 1;
      const Interval a = met<kKeys>(axis, length[m], first[m]);
      const Interval b = met<kKeys>(axis, length[m], last);
      box[m] = shape.size[m];
      columns *= box[m];
      start[m] = a.start;
      along[m] = ceil_div(b.end - a.start, box[m]);
      free_start[m] = ceil_div(b.start - a.start, box[m]);
      free_along[m] = at_least((a.end - a.start) / box[m] - free_start[m], 0);
    }
    additional = additional_keys;
    return inside;
  }

  template <bool kKeys>
  static GNA_DEVICE Interval met(const Axis& axis, int length, int row) {
    return kKeys ? inverse_window(axis, length, row) : window(axis, length, row);
  }

  // The token of a row of the tile, -1 where there is none.
  GNA_DEVICE int token(const Problem& p, int row) const {
    const int place[3] = {first[0] + row / (p.axis[1].tile * p.axis[2].tile),
                          first[1] + row / p.axis[2].tile % p.axis[1].tile,
                          first[2] + row % p.axis[2].tile};
    return row < p.tile() ? token_at(p, place) : -1;
  }
  GNA_DEVICE int token_at(const Problem& p, const int (&place)[3]) const {
    int token = 0;
    bool inside = true;
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      inside &= place[m] < length[m];
      token = token * p.axis[m].length + place[m] * p.axis[m].dilation + offset[m];
    }
    return inside ? token : -1;
  }

  // Steps one after the other, of which `done` were before: first all boxes in their order, of
  // which `next` is this one, then additional keys.
  GNA_DEVICE int boxes() const { return along[0] * along[1] * along[2]; }
  GNA_DEVICE int steps() const { return boxes() + ceil_div(additional, columns); }
  GNA_DEVICE Step take(int done, int (&next)[3]) const {
    const int from = (done - boxes()) * columns, rest = additional - from;
    if (from >= 0) return {{from, 0, 0}, rest < columns ? rest : kMetAll, true};
    Step step{{}, kMetAll, false};
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      step.place[m] = start[m] + next[m] * box[m];
      const int free = next[m] - free_start[m];
      if (free < 0 || free >= free_along[m]) step.met = kMetOwn;
    }
    if (++next[2] == along[2]) next[2] = 0, ++next[1];
    if (next[1] == along[1]) next[1] = 0, ++next[0];
    return step;
  }

  // The token of a step's column, -1 where there is none.
  GNA_DEVICE int column_token(const Problem& p, const BoxShape& shape, const Step& step,
                              int column) const {
    if (step.more) {
      const int token = step.place[0] + column;
      return token < additional ? token : -1;
    }
    const int line = column >> shape.log[2];
    const int place[3] = {step.place[0] + (line >> shape.log[1]),
                          step.place[1] + (line & (shape.size[1] - 1)),
                          step.place[2] + (column & (shape.size[2] - 1))};
    return token_at(p, place);
  }

  // What the rows of a tile meet along each dimension, [3, rows]; every thread writes of some rows.
  template <bool kKeys, int kRows>
  GNA_DEVICE void meet_rows(const Problem& p, Interval (&rows)[3][kRows]) const {
    const int row = threadIdx.x, t1 = p.axis[1].tile, t2 = p.axis[2].tile;
    if (row >= kRows) return;
    const int place[3] = {row / (t1 * t2), row / t2 % t1, row % t2};
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      rows[m][row] = met<kKeys>(p.axis[m], length[m], first[m] + place[m]);
    }
  }

  // Where the copies of a box begin in its map: column and head, then the tokens' places.
  GNA_DEVICE void corner(int (&at)[5], const Problem& p, const int (&place)[3], int head_of) const {
    at[1] = head_of;
    at[2] = place[2];
    at[3] = place[1];
    at[4] = place[0] + (maps_by_batch(p) ? 0 : batch * length[0]);
  }
  // The number of the tile's maps; see `make_maps`.
  GNA_DEVICE int map(const Problem& p) const {
    return maps_by_batch(p) ? group * p.batch + batch : group;
  }

  // Calls visit(column, met) of a row for the columns 8 n + 2 t + c of thread 4 g + t of a warp;
  // `met` of a row is what it meets along the dimensions.
  template <int kColumns, typename Visit>
  static GNA_DEVICE void visit_mask(const Step& step, const BoxShape& shape,
                                    const Interval (&met)[3], const Visit& visit) {
    int start[3], end[3];
    uint32_t bits[2], outer = ~0u;
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      start[m] = at_most(at_least(met[m].start - step.place[m], 0), shape.size[m]);
      end[m] = at_most(at_least(met[m].end - step.place[m], 0), shape.size[m]);
      if (m < 2) {
        outer &= shape.repeat[m] *
                 bit_range(start[m] * shape.unit[m], (end[m] - start[m]) * shape.unit[m]);
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      // Of 8 columns this one is `column`: the first and the last 8 of which it is met.
      const int column = threadIdx.x % 4 * 2 + c;
      const int from = (start[2] + 7 - column) >> 3, to = (end[2] + 7 - column) >> 3;
      bits[c] = step.more ? bit_range(0, (step.met + 7 - column) >> 3)
                          : outer & shape.repeat[2] * bit_range(from, to - from);
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) visit(n * 8 + c, (bits[c] >> n & 1) != 0);
    }
  }

  // A batch's first dimension goes on in the next batch's, unless dilation leaves a remainder.
  static GNA_BOTH bool maps_by_batch(const Problem& p) {
    return p.batch > 1 && p.axis[0].length % p.axis[0].dilation != 0;
  }
};

}  // namespace gna
