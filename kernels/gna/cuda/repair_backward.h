// Gradients of single rows, pair by pair, where those of tiles are not finite; see repair.h.
#pragma once

#include "repair.h"

namespace gna {

// Of rows and columns that are queries and keys, or the reverse: queries go with the output's
// cotangent, keys with values. By query, [B, tokens, heads]: log-sum-exp, and what is taken from a
// probability's gradient.
template <typename T>
struct Pairs {
  Operand<const T> x, y;  // of rows
  Operand<const T> u, w;  // of columns
  Operand<T> dx, dy;      // dy only where rows are keys
  const float *lse, *delta;
};

// The columns of a row: keys of a query, or, kKeys, queries of a key.
template <bool kKeys>
struct ColumnsOf {
  int token, size[3], step[3], count, plain, plain_token;

  GNA_DEVICE ColumnsOf(const Problem& p, int row) {
    token = 0;
    count = 1;
    plain = kKeys ? 0 : p.additional;
    plain_token = kKeys ? 0 : p.tokens;
    if (row >= p.tokens) {  // an additional key, which all queries see
      count = 0;
      plain = p.tokens;
      return;
    }
#pragma unroll
    for (int m = 2, stride = 1; m >= 0; --m) {
      const Axis& axis = p.axis[m];
      const int x = row % axis.length, group = x % axis.dilation, i = x / axis.dilation;
      const int length = group_length(axis, group);
      const Interval met = kKeys ? inverse_window(axis, length, i) : window(axis, length, i);
      row /= axis.length;
      size[m] = met.end - met.start;
      step[m] = stride * axis.dilation;
      token += stride * (group + met.start * axis.dilation);
      count *= size[m];
      stride *= axis.length;
    }
  }
  GNA_DEVICE int at(int n) const {
    if (n >= count) return plain_token + n - count;
    return token + n % size[2] * step[2] + n / size[2] % size[1] * step[1] +
           n / size[2] / size[1] * step[0];
  }
};

// Writes a row's gradients, the sums over what it meets alone; by a whole warp.
template <bool kKeys, typename T>
GNA_DEVICE void repair_gradients(const Problem& p, const Pairs<T>& pairs, int batch, int row,
                                 int row_head) {
  const int lane = threadIdx.x % 32, heads = kKeys ? p.repeats() : 1;
  const ColumnsOf<kKeys> columns(p, row);
  const int count = columns.count + columns.plain;
  const auto load = [&](float (&to)[kMostParts], const Operand<const T>& from, int token,
                        int head) {
    const T* const numbers = from.row(p, batch, token, head);
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      to[i] = i * 32 + lane < from.dim ? number(numbers[i * 32 + lane]) : 0;
    }
  };
  const auto dot = [](const float (&x)[kMostParts], const float (&y)[kMostParts]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) sum += x[i] * y[i];
    return sum_of_warp(sum);
  };
  const auto write = [&](const Operand<T>& to, const float (&sums)[kMostParts], float factor) {
    T* const numbers = to.row(p, batch, row, row_head);
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      if (i * 32 + lane < to.dim) {
        numbers[i * 32 + lane].bits = pack(sums[i] * factor, 0.0f, T{}) & 0xffff;
      }
    }
  };
  float x[kMostParts], y[kMostParts], u[kMostParts], w[kMostParts];
  float dx[kMostParts] = {}, dy[kMostParts] = {};
  load(x, pairs.x, row, row_head);
  load(y, pairs.y, row, row_head);
  for (int n = 0; n < count * heads; ++n) {
    const int token = columns.at(n % count);
    const int head = kKeys ? row_head * heads + n / count : row_head / p.repeats();
    const int64_t query =
        kKeys ? place_of(p, batch, token, head) : place_of(p, batch, row, row_head);
    load(u, pairs.u, token, head);
    load(w, pairs.w, token, head);
    const float weight = power_of_two((dot(x, u) * p.scale - pairs.lse[query]) * kLog2e);
    const float ds = weight * (dot(y, w) - pairs.delta[query]);
    bool open = false;  // whether a number is not settled yet: NaN stays
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      dx[i] += ds * u[i];
      if (kKeys) dy[i] += weight * w[i];
      open |= i * 32 + lane < pairs.dx.dim && dx[i] == dx[i];
      open |= kKeys && i * 32 + lane < pairs.dy.dim && dy[i] == dy[i];
    }
    if (votes(open) == 0) break;
  }
  write(pairs.dx, dx, p.scale);
  if (kKeys) write(pairs.dy, dy, 1);
}

}  // namespace gna
