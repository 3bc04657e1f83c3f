// What NaN and infinity leave of a tile's sums.
//
// A pair that does not meet has a probability of 0, and 0 times a number that is not finite is NaN:
// in a tile's products, values that one row sees reach others that do not. It shows in the sums of
// those, so that products need no care: a row whose sums are not finite is computed again, by its
// warp and from what it meets alone.
#pragma once

#include "fragments.h"

namespace gna {

constexpr int kMostParts = 4;  // of a row, of 32 numbers

// Where a row's numbers of float32 stand: log-sum-exp [B, tokens, heads].
GNA_DEVICE int64_t place_of(const Problem& p, int batch, int token, int head) {
  return (int64_t{batch} * p.tokens + token) * p.heads + head;
}

// The keys of a query: those of its window, then the additional ones.
struct KeysOf {
  int token, first[3], size[3], step[3], count;

  GNA_DEVICE KeysOf(const Problem& p, int query) {
    int stride = 1;
    token = 0;
    count = 1;
#pragma unroll
    for (int m = 2; m >= 0; --m) {
      const Axis& axis = p.axis[m];
      const int x = query % axis.length, group = x % axis.dilation;
      query /= axis.length;
      const Interval seen = window(axis, group_length(axis, group), x / axis.dilation);
      size[m] = seen.end - seen.start;
      step[m] = stride * axis.dilation;
      token += stride * (group + seen.start * axis.dilation);
      count *= size[m];
      stride *= axis.length;
    }
  }
  GNA_DEVICE int at(const Problem& p, int n) const {
    if (n >= count) return p.tokens + n - count;
    return token + n % size[2] * step[2] + n / size[2] % size[1] * step[1] +
           n / size[2] / size[1] * step[0];
  }
};

GNA_DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += exchange(x, mask);
  return x;
}

// Writes again those numbers of an output row that are not finite, as far as its log-sum-exp is.
template <typename T>
GNA_DEVICE void repair_output(const Problem& p, const Operand<const T>& query,
                              const Operand<const T>& key, const Operand<const T>& value,
                              const Operand<T>& output, const float* lse, int batch, int token,
                              int head) {
  const int lane = threadIdx.x % 32, key_head = head / p.repeats();
  const T* const q = query.row(p, batch, token, head);
  T* const row = output.row(p, batch, token, head);
  const float norm = lse[place_of(p, batch, token, head)] * kLog2e;
  const KeysOf keys(p, token);
  float sums[kMostParts] = {};
  bool strange[kMostParts];
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    const int e = i * 32 + lane;
    strange[i] = e < p.value_dim && number(row[e]) * 0 != 0;
  }
  for (int n = 0; n < keys.count + p.additional; ++n) {
    const int at = keys.at(p, n);
    const T* const k = key.row(p, batch, at, key_head);
    const T* const v = value.row(p, batch, at, key_head);
    float score = 0;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      const int e = i * 32 + lane;
      if (e < p.dim) score += number(q[e]) * number(k[e]);
    }
    const float weight = power_of_two(sum_of_warp(score) * p.scale * kLog2e - norm);
    bool open = false;  // whether a number is not settled yet
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      if (strange[i]) sums[i] += weight * number(v[i * 32 + lane]);
      open |= strange[i] && sums[i] == sums[i];
    }
    if (votes(open) == 0) break;
  }
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    if (strange[i]) row[i * 32 + lane].bits = pack(sums[i], 0.0f, T{}) & 0xffff;
  }
}

}  // namespace gna
