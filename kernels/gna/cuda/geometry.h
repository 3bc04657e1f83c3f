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
  int stride = 1;    // neighboring queries that share a window
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

// Queries of the group that see key j: `window` read the other way. Keys past the end count as the
// last; the bounds never decrease with j either, and every key is seen.
GNA_BOTH Interval inverse_window(const Axis& axis, int length, int j) {
  j = at_most(j, length - 1);
  const int k = axis.kernel, s = axis.stride, shift = k / 2 - s / 2;
  if (axis.causal) {
    const int end = at_most(((j + k - s) / s + 1) * s, length);
    return {j, length <= j + k ? length : at_least(j, end)};
  }
  const int first = j < k ? 0 : ceil_div(j - k + 1 + shift, s);
  const int last = j >= length - k ? length / s : (j + shift) / s;
  return {first * s, at_most((last + 1) * s, length)};
}

}  // namespace gna
