// What a custom call is asked for: buffers and attributes, decoded once for all targets.
#pragma once

#include <cstdint>

#include "geometry.h"
#include "xla/ffi/api/ffi.h"

namespace gna {

namespace ffi = xla::ffi;

// The order of kinds in the attribute `tiles`.
enum TileKind {
  kCpuTile,
  kForwardTile,
  kQueryTile,
  kKeyTile,
  kHopperForward,  // queries, and what these meet, of kind + 1, in both passes
  kHopperKeys = kHopperForward + 2,      // keys that meet 64 queries at a time
  kHopperKeysWide = kHopperKeys + 2,     // or 128
  kTileKinds = kHopperKeysWide + 2
};

struct Problem {
  int batch, heads, kv_heads, dim, value_dim;
  int additional;  // keys after those of the layout, which every query sees
  int tokens;      // of the layout
  float scale;
  Axis axis[3];

  GNA_BOTH int repeats() const { return heads / kv_heads; }
  GNA_BOTH int groups() const { return axis[0].dilation * axis[1].dilation * axis[2].dilation; }
  GNA_BOTH int tile() const { return axis[0].tile * axis[1].tile * axis[2].tile; }
};

// query [B, *X, Hq, D], key [B, *X, Hkv, D], value [B, *X, Hkv, Dv], additional [B, A, Hkv, D];
// `windows` holds length, kernel size, stride, dilation and causality of each dimension, `tiles`
// the tokens along each dimension of several kinds of tiles.
inline ffi::Error decode(Problem& problem, const ffi::AnyBuffer& query, const ffi::AnyBuffer& value,
                         const ffi::AnyBuffer& additional, ffi::Span<const int64_t> windows,
                         ffi::Span<const int64_t> tiles, float scale) {
  const auto q = query.dimensions(), v = value.dimensions();
  const int rank = static_cast<int>(q.size()) - 3;
  if (rank < 1 || rank > 3 || v.size() != q.size() || windows.size() != 5u * rank ||
      tiles.size() != static_cast<size_t>(kTileKinds * rank)) {
    return ffi::Error::InvalidArgument("gna: operands and attributes differ in rank");
  }
  problem = Problem{};
  problem.batch = static_cast<int>(q[0]);
  problem.heads = static_cast<int>(q[rank + 1]);
  problem.dim = static_cast<int>(q[rank + 2]);
  problem.kv_heads = static_cast<int>(v[rank + 1]);
  problem.value_dim = static_cast<int>(v[rank + 2]);
  problem.additional = static_cast<int>(additional.dimensions()[1]);
  problem.scale = scale;
  int64_t tokens = 1;
  for (int m = 0; m < rank; ++m) {
    const int64_t* w = windows.begin() + 5 * m;
    Axis& axis = problem.axis[3 - rank + m];
    axis = {static_cast<int>(w[0]), static_cast<int>(w[1]), static_cast<int>(w[2]),
            static_cast<int>(w[3]), static_cast<int>(w[4]), 1};
    if (axis.length != q[m + 1]) {
      return ffi::Error::InvalidArgument("gna: windows do not fit the operands");
    }
    tokens *= axis.length;
  }
  // Half of what an int holds, so that sums of tokens and tiles do too.
  if (tokens + problem.additional > INT32_MAX / 2) {
    return ffi::Error::InvalidArgument("gna: more than 2^30 tokens");
  }
  problem.tokens = static_cast<int>(tokens);
  return ffi::Error::Success();
}

// The tokens along always three dimensions of a kind of tiles.
struct TileShape {
  int size[3];
  TileShape(ffi::Span<const int64_t> tiles, int kind) : size{1, 1, 1} {
    const int rank = static_cast<int>(tiles.size()) / kTileKinds;
    for (int m = 0; m < rank; ++m) {
      size[3 - rank + m] = static_cast<int>(tiles.begin()[kind * rank + m]);
    }
  }
};

// The problem with tiles of one kind, at most `most` tokens.
inline ffi::Error set_tile(Problem& problem, ffi::Span<const int64_t> tiles, TileKind kind,
                           int most) {
  const TileShape shape(tiles, kind);
  for (int m = 0; m < 3; ++m) problem.axis[m].tile = shape.size[m];
  if (problem.tile() <= most) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("gna: a tile has too many tokens");
}

}  // namespace gna
