// How a thread block of the GPU target goes about: the tokens of its tile (its rows), and all those
// of the other side that these meet (its columns), a tile of columns at a time.
//
// Rows are queries and columns the keys that they see, or rows are keys and columns the queries
// that see them. Along each dimension a row meets one interval of columns, and the bounds of
// intervals never decrease from row to row. So the columns that any row meets are a box, and those
// that all rows meet are a smaller box in it, which comes first and needs no mask. The rest of the
// box is cut into slabs before and after the smaller box along each dimension. Columns are counted
// through all of these without gaps: whatever the window's size and stride, only the last tile is
// not full.
#pragma once

#include "instructions.h"
#include "problem.h"

namespace gna {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostRows = 128;
constexpr int kSteps = 3;     // tiles of columns whose plans are kept at a time
constexpr int kMostWords = 2; // of a mask: a tile has at most 64 columns

struct Slab {
  int first;    // number of its first column
  int start[3]; // its corner, in places of the dilation group
  int size[3];
};

struct Walk {
  // Columns before those of the layout, which all rows meet: additional keys, or, where the rows
  // are additional keys, all queries.
  int plain, plain_token;
  int free;   // columns that all rows meet, which come first
  int count;  // all columns
  int offset[3], length[3];
  Slab slab[7];
  int row_token[kMostRows];       // -1 where there is none; from `tokens` on, additional keys
  Interval meets[kMostRows + 2];  // columns met from each place of the tile along each dimension
  int token[kSteps][32 * kMostWords];
  uint32_t mask[kSteps][kMostRows + 2][kMostWords];  // of the columns met, likewise
};

GNA_DEVICE int places(const Axis (&axis)[3]) { return axis[0].tile + axis[1].tile + axis[2].tile; }

GNA_DEVICE int token_at(const Problem& p, const Walk& walk, const int (&place)[3]) {
  int token = 0;
  for (int m = 0; m < 3; ++m) {
    token = token * p.axis[m].length + place[m] * p.axis[m].dilation + walk.offset[m];
  }
  return token;
}

// Tiles of rows: those of the longest dilation group for each group, then those of additional keys.
GNA_BOTH int tiles_along(const Axis& axis) { return ceil_div(group_length(axis, 0), axis.tile); }
GNA_BOTH int layout_tiles(const Problem& p) {
  return p.groups() * tiles_along(p.axis[0]) * tiles_along(p.axis[1]) * tiles_along(p.axis[2]);
}

// What a block works on. All tiles of a head come before the next head, whose keys would need the
// cache.
struct Place {
  int tile, head, batch;
  GNA_DEVICE Place(const Problem& p, int tiles, int heads) {
    const int n = blockIdx.x / tiles;
    tile = blockIdx.x % tiles;
    head = n % heads;
    batch = n / heads;
  }
};

// Makes up the walk of a tile of `rows` rows; false, for all threads, if the tile is empty.
// kKeys: rows are keys.
template <bool kKeys>
GNA_DEVICE bool start_walk(Walk& walk, const Problem& p, int tile, int rows) {
  const int tiles = layout_tiles(p), thread = threadIdx.x;
  if (kKeys && tile >= tiles) {
    for (int r = thread; r < rows; r += kThreads) {
      const int a = (tile - tiles) * rows + r;
      walk.row_token[r] = a < p.additional ? p.tokens + a : -1;
    }
    if (thread == 0) {
      walk.plain = walk.free = walk.count = p.tokens;
      walk.plain_token = 0;
    }
    block_barrier();
    return true;
  }
  int first[3];
  for (int m = 2; m >= 0; --m) {
    const int along = tiles_along(p.axis[m]);
    first[m] = tile % along * p.axis[m].tile;
    tile /= along;
  }
  int offset[3], length[3];
  for (int m = 2; m >= 0; --m) {
    offset[m] = tile % p.axis[m].dilation;
    tile /= p.axis[m].dilation;
    length[m] = group_length(p.axis[m], offset[m]);
    if (first[m] >= length[m]) return false;
  }
  if (thread == 0) {
    walk.plain = kKeys ? 0 : p.additional;
    walk.plain_token = p.tokens;
    int start[3], end[3], free_start[3], free_end[3];
    bool any_free = true;
    for (int m = 0; m < 3; ++m) {
      const int last = first[m] + p.axis[m].tile - 1;
      const Interval a = kKeys ? inverse_window(p.axis[m], length[m], first[m])
                               : window(p.axis[m], length[m], first[m]);
      const Interval b = kKeys ? inverse_window(p.axis[m], length[m], last)
                               : window(p.axis[m], length[m], last);
      start[m] = a.start;
      end[m] = b.end;
      free_start[m] = b.start;
      free_end[m] = a.end;
      any_free &= b.start < a.end;
      walk.offset[m] = offset[m];
      walk.length[m] = length[m];
    }
    for (int m = 0; m < 3; ++m) {
      // Without columns that all rows meet, the first slab is empty, the last is the whole box.
      if (!any_free) free_start[m] = free_end[m] = m == 0 ? end[m] : start[m];
    }
    int count = walk.plain;
    for (int n = 0; n < 7; ++n) {
      Slab& slab = walk.slab[n];
      slab.first = count;
      const int cut = (n - 1) / 2;  // the dimension along which it lies before or after
      int size = 1;
      for (int m = 0; m < 3; ++m) {
        int from = free_start[m], to = free_end[m];
        if (n > 0 && m > cut) from = start[m], to = end[m];
        if (n > 0 && m == cut) {
          if (n % 2) to = from, from = start[m];
          else from = to, to = end[m];
        }
        slab.start[m] = from;
        slab.size[m] = to - from;
        size *= to - from;
      }
      count += size;
      if (n == 0) walk.free = count;
    }
    walk.count = count;
  }
  const int t1 = p.axis[1].tile, t2 = p.axis[2].tile;
  for (int r = thread; r < rows; r += kThreads) {
    const int place[3] = {first[0] + r / (t1 * t2), first[1] + r / t2 % t1, first[2] + r % t2};
    int token = 0;
    bool inside = r < p.tile();
    for (int m = 0; m < 3; ++m) {
      inside &= place[m] < length[m];
      token = token * p.axis[m].length + place[m] * p.axis[m].dilation + offset[m];
    }
    walk.row_token[r] = inside ? token : -1;
  }
  for (int e = thread; e < places(p.axis); e += kThreads) {
    int m = 0, at = e;
    while (at >= p.axis[m].tile) at -= p.axis[m++].tile;
    walk.meets[e] = kKeys ? inverse_window(p.axis[m], length[m], first[m] + at)
                          : window(p.axis[m], length[m], first[m] + at);
  }
  block_barrier();
  return true;
}

// Writes down the tokens of a tile of columns for a step, and, unless all rows meet them all, who
// meets whom.
template <int kColumns>
GNA_DEVICE void plan_step(Walk& walk, const Problem& p, int tile, int step) {
  constexpr int kWords = kColumns / 32, kShares = kWarps / kWords;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int word = warp % kWords, share = warp / kWords, buffer = step % kSteps;
  const int n = tile * kColumns + word * 32 + lane;
  const bool masked = (tile + 1) * kColumns > walk.free;
  if (share > 0 && !masked) return;
  int place[3] = {0, 0, 0}, token = -1;
  if (n < walk.plain) {
    token = walk.plain_token + n;
  } else if (n < walk.count) {
    int s = 0;
    while (s < 6 && n >= walk.slab[s + 1].first) ++s;
    const Slab& slab = walk.slab[s];
    int rest = n - slab.first;
    for (int m = 2; m > 0; --m) {
      place[m] = slab.start[m] + rest % slab.size[m];
      rest /= slab.size[m];
    }
    place[0] = slab.start[0] + rest;
    token = token_at(p, walk, place);
  }
  if (share == 0) walk.token[buffer][word * 32 + lane] = token;
  if (!masked) return;
  for (int e = share, m = 0, end = p.axis[0].tile; e < places(p.axis); e += kShares) {
    while (e >= end) end += p.axis[++m].tile;
    const int at = m == 0 ? place[0] : m == 1 ? place[1] : place[2];
    const bool met = at >= walk.meets[e].start && at < walk.meets[e].end;
    const uint32_t bits = votes(n < walk.plain || (n < walk.count && met));
    if (lane == 0) walk.mask[buffer][e][word] = bits;
  }
}

// Where a row's places along the dimensions stand in `Walk::mask`, a byte each.
struct Places {
  int at;
  GNA_DEVICE Places(const Problem& p, int row) {
    const int t0 = p.axis[0].tile, t1 = p.axis[1].tile, t2 = p.axis[2].tile;
    const int r = row < t0 * t1 * t2 ? row : 0;
    at = r / (t1 * t2) | (t0 + r / t2 % t1) << 8 | (t0 + t1 + r % t2) << 16;
  }
  GNA_DEVICE uint32_t mask(const Walk& walk, int step, int word) const {
    const auto& mask = walk.mask[step % kSteps];
    return mask[at & 255][word] & mask[at >> 8 & 255][word] & mask[at >> 16][word];
  }
};

}  // namespace gna
