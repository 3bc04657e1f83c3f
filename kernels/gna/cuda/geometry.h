// Which keys a query sees along one dimension, on host and device; see kernels/gna/windows.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GNA_BOTH __host__ __device__ __forceinline__
#else
#define GNA_BOTH inline
#endif

namespace gna {

// One of always three dimensions; a layout of fewer begins with dimensions of one token.
struct Axis {
  int length = 1;    // tokens
  int kernel = 1;    // keys that a query sees
  int stride = 1;    // neighbouring queries that share a window
  int dilation = 1;  // dilation groups, which never see each other
  int causal = 0;    // whether no key behind the query is seen
  int tile = 1;      // queries of a tile
};

struct Interval {
  int start, end;
};

GNA_BOTH int at_most(int a, int b) { return a < b ? a : b; }
GNA_BOTH int at_least(int a, int b) { return a > b ? a : b; }
GNA_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tokens of a dilation group.
GNA_BOTH int group_length(const Axis& axis, int group) {
  return ceil_div(axis.length - group, axis.dilation);
}

// Keys that query i of a group of `length` tokens sees. Queries past the end count as the last.
// Neither bound ever decreases with i.
GNA_BOTH Interval window(const Axis& axis, int length, int i) {
  i = at_most(i, length - 1);
  const int first = i / axis.stride * axis.stride;
  if (axis.causal) {
    const int leader = at_most(first + axis.stride - 1, length - 1);
    return {at_least(leader - axis.kernel + 1, 0), i + 1};
  }
  const int leader = at_most(first + axis.stride / 2, length - 1);
  const int start = at_most(at_least(leader - axis.kernel / 2, 0), length - axis.kernel);
  return {start, start + axis.kernel};
}

}  // namespace gna
