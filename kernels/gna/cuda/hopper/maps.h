// Maps of the call's operands, by which boxes of their tokens are copied without being permuted.
#pragma once

#include "../fragments.h"
#include "boxes.h"

namespace gna {

// A map for each dilation group, and where `Boxes::maps_by_batch` for each batch of it.
struct Maps {
  TensorMap of[kMostGroups];
};

inline bool is_bfloat(BFloat16) { return true; }
inline bool is_bfloat(Float16) { return false; }

GNA_BOTH int many_maps(const Problem& p) {
  return p.groups() * (Boxes::maps_by_batch(p) ? p.batch : 1);
}

// Whether boxes say what a problem's tiles meet, here.
inline bool boxes_do(const Problem& p) { return has_boxes() && many_maps(p) <= kMostGroups; }

// Maps of an operand [B, *X, heads, dim], whose boxes have the shape `box` of tokens.
template <typename T>
cudaError_t make_maps(Maps& maps, const Problem& p, const Operand<const T>& x, const int (&box)[3]) {
  const bool by_batch = Boxes::maps_by_batch(p);
  if (many_maps(p) > kMostGroups) return cudaErrorInvalidValue;
  const uint64_t row = uint64_t(x.heads) * x.dim * 2;
  uint64_t step[3];  // bytes between tokens along each dimension
  step[2] = row;
  step[1] = step[2] * p.axis[2].length;
  step[0] = step[1] * p.axis[1].length;
  for (int n = 0; n < many_maps(p); ++n) {
    int rest = by_batch ? n / p.batch : n;
    const uint64_t batch = by_batch ? n % p.batch : 0;
    uint64_t from = batch * step[0] * p.axis[0].length;
    uint64_t sizes[5] = {uint64_t(x.dim), uint64_t(x.heads)}, strides[4] = {uint64_t(x.dim) * 2};
    uint32_t shape[5] = {kPanel, 1};
    for (int m = 2; m >= 0; --m) {
      const Axis& axis = p.axis[m];
      const int offset = rest % axis.dilation;
      rest /= axis.dilation;
      from += offset * step[m];
      sizes[4 - m] = group_length(axis, offset);
      strides[3 - m] = step[m] * axis.dilation;
      shape[4 - m] = box[m];
    }
    if (!by_batch) sizes[4] *= p.batch;
    const cudaError_t error = make_map(maps.of[n], is_bfloat(T{}),
                                       reinterpret_cast<const char*>(x.data) + from, sizes,
                                       strides, shape);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// A map of additional keys or values [B, A, heads, dim], in boxes of so many.
template <typename T>
cudaError_t make_map_of_more(TensorMap& map, const Problem& p, const Operand<const T>& x,
                             int columns) {
  const uint64_t row = uint64_t(x.heads) * x.dim * 2, all = row * p.additional;
  return make_map(map, is_bfloat(T{}), x.more,
                  {uint64_t(x.dim), uint64_t(x.heads), uint64_t(p.additional), 1,
                   uint64_t(p.batch)},
                  {uint64_t(x.dim) * 2, row, all, all},
                  {kPanel, 1, uint32_t(columns), 1, 1});
}

}  // namespace gna
