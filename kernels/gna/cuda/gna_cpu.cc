// The CPU target of the custom calls: blocked attention in float32, in any dtype outside.
//
// Keys and values are packed once per batch entry and key head into rows of float32. A task takes a
// tile of at most 64 queries, lists the keys that any of them sees, those that all see first, and
// goes through them in blocks that stay in the first-level cache. The keys are those of windows
// (`Plan`, `Neighborhood`) or of listed blocks (`ListPlan`, `ListedBlocks`).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <numeric>

#include "bindings.h"
#include "list_bindings.h"
#include "lists.h"
#include "numbers.h"
#include "problem.h"
#include "threads.h"
#include "tiles.h"
#include "vectors.h"

namespace gna {
namespace {

constexpr int kBlock = 72;  // keys at a time
constexpr float kLog2e = 1.44269504088896f;

struct Free {
  void operator()(float* x) const { ::operator delete[](x, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float[], Free>;

Memory memory(int64_t count) {
  const size_t bytes = std::max<int64_t>(count, 1) * sizeof(float);
  return Memory(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

Memory zeros(int64_t count) {
  Memory x = memory(count);
  std::fill_n(x.get(), count, 0.0f);
  return x;
}

int padded(int dim) { return (dim + 15) / 16 * 16; }

// Packed rows of one kind (keys or values, or their gradients) for each batch entry and key head.
struct Rows {
  template <typename Plan>
  Rows(const Plan& plan, int dim, int copies = 1)
      : keys(plan.key_tokens() + plan.problem.additional), dim(dim), width(padded(dim)),
        copies(copies),
        data(memory(int64_t{copies} * plan.problem.batch * plan.problem.kv_heads * keys * width)) {}

  float* of(int64_t lane) const { return data.get() + lane * keys * width; }

  const int keys, dim, width, copies;
  const Memory data;
  std::atomic<bool> finite{true};  // all of them
};

// Calls visit(row, numbers) in parallel for all rows of `rows`, of its first copy, and their `dim`
// numbers among those of the layout [B, tokens, Hkv, dim] or the additional ones [B, A, Hkv, dim].
template <typename T, typename Plan, typename Visit>
bool visit_rows(ffi::ThreadPool& pool, const Plan& plan, const Rows& rows, T* own, T* additional,
                const Visit& visit) {
  const Problem& p = plan.problem;
  const int64_t runs = plan.runs.size() + 1;  // the last one is that of the additional keys
  return parallel(pool, int64_t{p.batch} * p.kv_heads * runs, [&](Counter& counter) {
    for (int64_t i; counter.next(i);) {
      const int64_t lane = i / runs, run = i % runs;
      const int64_t batch = lane / p.kv_heads, head = lane % p.kv_heads;
      const bool more = run + 1 == runs;
      const Run r = more ? Run{plan.key_tokens(), 0, 1, p.additional} : plan.runs[run];
      T* numbers = more ? additional : own;
      float* first = rows.of(lane * rows.copies) + int64_t{r.packed} * rows.width;
      for (int64_t n = 0; n < r.count; ++n) {
        const int64_t tokens = more ? p.additional : plan.key_tokens();
        const int64_t token = batch * tokens + r.token + n * r.step;
        visit(first + n * rows.width, numbers + (token * p.kv_heads + head) * rows.dim);
      }
    }
  });
}

template <typename T, typename Plan>
bool pack(ffi::ThreadPool& pool, const Plan& plan, const T* from, const T* additional, Rows& to) {
  return visit_rows(pool, plan, to, from, additional, [&](float* row, const T* source) {
    for (int d = 0; d < to.dim; ++d) row[d] = to_float(source[d]);
    if (!all_finite(row, to.dim)) to.finite.store(false, std::memory_order_relaxed);
  });
}

// The sum over all copies, times a factor, in the operands' order.
template <typename T, typename Plan>
bool unpack(ffi::ThreadPool& pool, const Plan& plan, const Rows& from, float factor, T* to,
            T* additional) {
  const int64_t copy = int64_t{from.keys} * from.width;
  return visit_rows(pool, plan, from, to, additional, [&](float* row, T* target) {
    for (int c = 1; c < from.copies; ++c) {
      for (int d = 0; d < from.dim; ++d) row[d] += row[c * copy + d];
    }
    for (int d = 0; d < from.dim; ++d) from_float(row[d] * factor, target[d]);
  });
}

// The rows of a tile's queries [B, tokens, Hq, dim], times a factor, as columns [dim, lanes] and,
// if asked for, as rows [lanes, padded dim]; zero for lanes without a query.
template <typename T, typename Plan, typename Near>
void gather(const Plan& plan, const Near& near, int64_t batch, int head, const T* from,
            int dim, float factor, float* columns, float* rows) {
  const Problem& p = plan.problem;
  for (int lane = 0; lane < plan.lanes; ++lane) {
    const int64_t token = batch * p.tokens + near.token[lane];
    const T* source = from + (token * p.heads + head) * dim;
    const bool present = near.token[lane] >= 0;
    for (int d = 0; d < dim; ++d) {
      const float x = present ? to_float(source[d]) * factor : 0.0f;
      columns[d * plan.lanes + lane] = x;
      if (rows) rows[lane * padded(dim) + d] = x;
    }
  }
}

// The inverse of `gather` for columns [dim, lanes]; each lane has its own factor.
template <typename T, typename Plan, typename Near>
void scatter(const Plan& plan, const Near& near, int64_t batch, int head,
             const float* columns, int dim, const float* factor, T* to) {
  const Problem& p = plan.problem;
  for (int lane = 0; lane < plan.lanes; ++lane) {
    if (near.token[lane] < 0) continue;
    const int64_t token = batch * p.tokens + near.token[lane];
    T* target = to + (token * p.heads + head) * dim;
    for (int d = 0; d < dim; ++d) {
      from_float(columns[d * plan.lanes + lane] * factor[lane], target[d]);
    }
  }
}

// Calls visit(first, count, masks) for blocks of keys, masks null where all lanes see all of them.
template <typename Near, typename Visit>
void visit_blocks(const Near& near, const Visit& visit) {
  const int all = static_cast<int>(near.keys.size());
  for (int k = 0; k < near.free; k += kBlock) {
    visit(k, std::min(kBlock, near.free - k), static_cast<const uint64_t*>(nullptr));
  }
  for (int k = near.free; k < all; k += kBlock) {
    visit(k, std::min(kBlock, all - k), near.masks.data() + (k - near.free));
  }
}

// Pointers to the rows of a block's keys.
struct Pointers {
  float* row[kBlock];

  Pointers(float* rows, int width, const int* keys, int count) {
    for (int k = 0; k < count; ++k) row[k] = rows + int64_t{keys[k]} * width;
  }
  // Of consecutive rows.
  Pointers(float* rows, int width) {
    for (int k = 0; k < kBlock; ++k) row[k] = rows + k * width;
  }
};

// Whether all rows of a block are finite.
bool are_finite(const Rows& rows, const Pointers& block, int count) {
  if (rows.finite) return true;
  return std::all_of(block.row, block.row + count,
                     [&](const float* row) { return all_finite(row, rows.dim); });
}

// Calls visit(key, lane) for the pairs of a block that see each other. Products over whole blocks
// take others times zero, which is not zero of NaN or infinity: where any of them is at hand,
// products are summed pair by pair.
template <typename Visit>
void visit_seen(const uint64_t* masks, int count, int lanes, const Visit& visit) {
  for (int n = 0; n < count; ++n) {
    for (int lane = 0; lane < lanes; ++lane) {
      if (masks[n] >> lane & 1) visit(n, lane);
    }
  }
}

template <typename Near, typename T, typename Plan>
bool forward(ffi::ThreadPool& pool, const Plan& plan, const T* query, const T* key, const T* value,
             const T* more_keys, const T* more_values, T* output, float* lse) {
  const Problem& problem = plan.problem;
  Rows keys(plan, problem.dim), values(plan, problem.value_dim);
  if (!pack(pool, plan, key, more_keys, keys)) return false;
  if (!pack(pool, plan, value, more_values, values)) return false;
  const int64_t tiles = plan.tile_count();
  const int lanes = plan.lanes;

  auto work = [&](Counter& counter) {
    Near near;
    const Memory queries = memory(problem.dim * lanes), sums = memory(problem.value_dim * lanes);
    const Memory scores = memory(kBlock * lanes), state = memory(3 * lanes);
    float *top = state.get(), *total = top + lanes, *factor = total + lanes;
    const Pointers score_rows(scores.get(), lanes);
    for (int64_t i; counter.next(i);) {
      const int64_t entry = i / tiles / problem.heads;
      const int head = static_cast<int>(i / tiles % problem.heads);
      const int64_t lane = entry * problem.kv_heads + head / problem.repeats();
      near.find(plan, i % tiles, entry, head);
      gather(plan, near, entry, head, query, problem.dim, problem.scale * kLog2e, queries.get(),
             nullptr);
      std::fill_n(sums.get(), problem.value_dim * lanes, 0.0f);
      std::fill_n(top, lanes, kHidden);
      std::fill_n(total, lanes, 0.0f);
      visit_blocks(near, [&](int first, int count, const uint64_t* masks) {
        const Pointers k(keys.of(lane), keys.width, &near.keys[first], count);
        const Pointers v(values.of(lane), values.width, &near.keys[first], count);
        multiply_rows<false>(k.row, count, problem.dim, queries.get(), lanes, score_rows.row);
        for (int c = 0; c < lanes; c += kWidth) {
          const Floats old = load(top + c);
          Floats most = old;
          for (int n = 0; n < count; ++n) {
            float* s = scores.get() + n * lanes + c;
            if (masks) store(s, where(masks[n], c / kWidth, load(s), fill(kHidden)));
            most = larger(most, load(s));
          }
          Floats sum{};
          for (int n = 0; n < count; ++n) {
            float* s = scores.get() + n * lanes + c;
            Floats p = exp2(load(s) - most);
            // A lane that has seen nothing yet has no maximum to hide keys by.
            if (masks) p = where(masks[n], c / kWidth, p, Floats{});
            store(s, p);
            sum += p;
          }
          const Floats kept = exp2(old - most);
          store(total + c, load(total + c) * kept + sum);
          store(top + c, most);
          store(factor + c, kept);
        }
        const bool pairwise = masks && !are_finite(values, v, count);
        multiply_columns(v.row, problem.value_dim, pairwise ? 0 : count, scores.get(), lanes,
                         factor, sums.get());
        if (!pairwise) return;
        visit_seen(masks, count, lanes, [&](int n, int c) {
          const float p = scores.get()[n * lanes + c];
          for (int d = 0; d < problem.value_dim; ++d) sums.get()[d * lanes + c] += p * v.row[n][d];
        });
      });
      for (int n = 0; n < lanes; ++n) {
        factor[n] = total[n] == 0 ? 0 : 1 / total[n];  // a query may see nothing
        if (near.token[n] < 0) continue;
        const int64_t token = entry * problem.tokens + near.token[n];
        lse[token * problem.heads + head] = top[n] / kLog2e + std::log(total[n]);
      }
      scatter(plan, near, entry, head, sums.get(), problem.value_dim, factor, output);
    }
  };
  return parallel(pool, tiles * problem.batch * problem.heads, work);
}

// How many parts share the tiles of one batch entry and key head, each with sums of its own: enough
// to keep all threads busy.
int64_t parts_of(int64_t lanes, int64_t threads, int64_t tiles) {
  if (lanes >= 4 * threads) return 1;
  return std::min(threads / std::gcd(lanes, threads), tiles);
}

template <typename Near, typename T, typename Plan>
bool backward(ffi::ThreadPool& pool, const Plan& plan, const T* query, const T* key, const T* value,
              const T* more_keys, const T* more_values, const float* lse, const T* d_output,
              const float* delta, T* d_query, T* d_key, T* d_value, T* d_more_keys,
              T* d_more_values) {
  const Problem& problem = plan.problem;
  const int dim = problem.dim, value_dim = problem.value_dim, lanes = plan.lanes;
  const int64_t tiles = plan.tile_count(), sources = int64_t{problem.batch} * problem.kv_heads;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int parts = static_cast<int>(parts_of(sources, threads, tiles));
  Rows keys(plan, dim), values(plan, value_dim);
  Rows d_keys(plan, dim, parts), d_values(plan, value_dim, parts);
  if (!pack(pool, plan, key, more_keys, keys)) return false;
  if (!pack(pool, plan, value, more_values, values)) return false;

  auto work = [&](Counter& counter) {
    Near near;
    const Memory q = memory(dim * lanes), q_rows = zeros(keys.width * lanes);
    const Memory d_out = memory(value_dim * lanes), d_out_rows = zeros(values.width * lanes);
    const Memory p = memory(kBlock * lanes), ds = memory(kBlock * lanes);
    const Memory d_q = memory(dim * lanes), state = memory(3 * lanes);
    float *norm = state.get(), *shift = norm + lanes, *factor = shift + lanes;
    std::fill_n(factor, lanes, problem.scale);
    const Pointers p_rows(p.get(), lanes), ds_rows(ds.get(), lanes);
    for (int64_t i; counter.next(i);) {
      const int64_t lane = i / parts, entry = lane / problem.kv_heads, part = i % parts;
      std::fill_n(d_keys.of(i), int64_t{keys.keys} * keys.width, 0.0f);
      std::fill_n(d_values.of(i), int64_t{keys.keys} * values.width, 0.0f);
      for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
        for (int r = 0; r < problem.repeats(); ++r) {
          const int head = static_cast<int>(lane % problem.kv_heads) * problem.repeats() + r;
          if (r == 0 || Near::kPerHead) near.find(plan, t, entry, head);
          gather(plan, near, entry, head, query, dim, problem.scale * kLog2e, q.get(),
                 q_rows.get());
          gather(plan, near, entry, head, d_output, value_dim, 1.0f, d_out.get(),
                 d_out_rows.get());
          for (int n = 0; n < lanes; ++n) {
            const bool present = near.token[n] >= 0;
            const int64_t token = entry * problem.tokens + near.token[n];
            norm[n] = present ? lse[token * problem.heads + head] * kLog2e : 0.0f;
            shift[n] = present ? delta[token * problem.heads + head] : 0.0f;
          }
          std::fill_n(d_q.get(), dim * lanes, 0.0f);
          const bool finite = all_finite(q.get(), int64_t{dim} * lanes) &&
                              all_finite(d_out.get(), int64_t{value_dim} * lanes) &&
                              all_finite(shift, lanes);
          visit_blocks(near, [&](int first, int count, const uint64_t* masks) {
            const int* chosen = &near.keys[first];
            const Pointers k(keys.of(lane), keys.width, chosen, count);
            const Pointers v(values.of(lane), values.width, chosen, count);
            const Pointers dk(d_keys.of(i), keys.width, chosen, count);
            const Pointers dv(d_values.of(i), values.width, chosen, count);
            multiply_rows<false>(k.row, count, dim, q.get(), lanes, p_rows.row);
            multiply_rows<false>(v.row, count, value_dim, d_out.get(), lanes, ds_rows.row);
            for (int n = 0; n < count; ++n) {
              for (int c = 0; c < lanes; c += kWidth) {
                float *s = p.get() + n * lanes + c, *g = ds.get() + n * lanes + c;
                Floats one = exp2(load(s) - load(norm + c));
                if (masks) one = where(masks[n], c / kWidth, one, Floats{});
                store(s, one);
                store(g, one * (load(g) - load(shift + c)));
              }
            }
            if (masks &&
                !(finite && are_finite(keys, k, count) && are_finite(values, v, count))) {
              visit_seen(masks, count, lanes, [&](int n, int c) {
                const float one = p_rows.row[n][c], g = ds_rows.row[n][c];
                const float* to = d_out_rows.get() + c * values.width;
                for (int d = 0; d < value_dim; ++d) dv.row[n][d] += one * to[d];
                for (int d = 0; d < dim; ++d) {
                  dk.row[n][d] += g * q_rows.get()[c * keys.width + d];
                  d_q.get()[d * lanes + c] += g * k.row[n][d];
                }
              });
              return;
            }
            multiply_rows<true>(p_rows.row, count, lanes, d_out_rows.get(), values.width, dv.row);
            multiply_rows<true>(ds_rows.row, count, lanes, q_rows.get(), keys.width, dk.row);
            multiply_columns(k.row, dim, count, ds.get(), lanes, nullptr, d_q.get());
          });
          scatter(plan, near, entry, head, d_q.get(), dim, factor, d_query);
        }
      }
    }
  };
  if (!parallel(pool, sources * parts, work)) return false;
  // The queries were scaled for powers of two.
  return unpack(pool, plan, d_keys, 1 / kLog2e, d_key, d_more_keys) &&
         unpack(pool, plan, d_values, 1.0f, d_value, d_more_values);
}

// Calls run with a null pointer of the operands' type.
template <typename Run>
ffi::Error dispatch(ffi::DataType type, const Run& run) {
  bool good;
  try {
    switch (type) {
      case ffi::DataType::F32: good = run(static_cast<float*>(nullptr)); break;
      case ffi::DataType::BF16: good = run(static_cast<BFloat16*>(nullptr)); break;
      case ffi::DataType::F16: good = run(static_cast<Float16*>(nullptr)); break;
      default: return ffi::Error::InvalidArgument("gna: operands must be of 16 or 32-bit floats");
    }
  } catch (const std::bad_alloc&) {
    good = false;
  }
  return good ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kResourceExhausted,
                                                   "gna: out of memory");
}

ffi::Error read(Problem& problem, const ffi::AnyBuffer& q, const ffi::AnyBuffer& v,
                const ffi::AnyBuffer& ak, ffi::Span<const int64_t> windows,
                ffi::Span<const int64_t> tiles, float scale) {
  ffi::Error error = decode(problem, q, v, ak, windows, tiles, scale);
  return error.failure() ? error : set_tile(problem, tiles, kCpuTile, kMostQueries);
}

// The operands of a call, read and written as numbers of one type.
template <typename T>
const T* in(const ffi::AnyBuffer& x) {
  return static_cast<const T*>(x.untyped_data());
}
template <typename T>
T* out(ffi::Result<ffi::AnyBuffer>& x) {
  return static_cast<T*>(x->untyped_data());
}

ffi::Error run_forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::AnyBuffer ak, ffi::AnyBuffer av, ffi::Result<ffi::AnyBuffer> output,
                       ffi::ResultBuffer<ffi::F32> lse, ffi::Span<const int64_t> windows,
                       ffi::Span<const int64_t> tiles, float scale) {
  Problem problem;
  ffi::Error error = read(problem, q, v, ak, windows, tiles, scale);
  if (error.failure()) return error;
  return dispatch(q.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return forward<Neighborhood>(pool, Plan(problem), in<T>(q), in<T>(k), in<T>(v), in<T>(ak),
                                 in<T>(av), out<T>(output), lse->typed_data());
  });
}

ffi::Error run_backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::AnyBuffer ak, ffi::AnyBuffer av, ffi::Buffer<ffi::F32> lse,
                        ffi::AnyBuffer d_output, ffi::Buffer<ffi::F32> delta,
                        ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                        ffi::Result<ffi::AnyBuffer> dv, ffi::Result<ffi::AnyBuffer> dak,
                        ffi::Result<ffi::AnyBuffer> dav, ffi::Span<const int64_t> windows,
                        ffi::Span<const int64_t> tiles, float scale) {
  Problem problem;
  ffi::Error error = read(problem, q, v, ak, windows, tiles, scale);
  if (error.failure()) return error;
  return dispatch(q.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return backward<Neighborhood>(pool, Plan(problem), in<T>(q), in<T>(k), in<T>(v), in<T>(ak),
                                  in<T>(av), lse.typed_data(), in<T>(d_output), delta.typed_data(),
                                  out<T>(dq), out<T>(dk), out<T>(dv), out<T>(dak), out<T>(dav));
  });
}

ffi::Error run_lists_forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                             ffi::AnyBuffer v, ffi::AnyBuffer ak, ffi::AnyBuffer av,
                             ffi::Buffer<ffi::S32> blocks, ffi::Buffer<ffi::S32> counts,
                             ffi::Result<ffi::AnyBuffer> output, ffi::ResultBuffer<ffi::F32> lse,
                             ffi::Span<const int64_t> sizes, float scale) {
  Problem problem;
  Lists lists;
  ffi::Error error = decode_lists(problem, lists, q, k, v, ak, blocks, counts, sizes, scale);
  if (error.failure()) return error;
  return dispatch(q.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return forward<ListedBlocks>(pool, ListPlan(problem, lists), in<T>(q), in<T>(k), in<T>(v),
                                 in<T>(ak), in<T>(av), out<T>(output), lse->typed_data());
  });
}

ffi::Error run_lists_backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                              ffi::AnyBuffer v, ffi::AnyBuffer ak, ffi::AnyBuffer av,
                              ffi::Buffer<ffi::S32> blocks, ffi::Buffer<ffi::S32> counts,
                              ffi::Buffer<ffi::F32> lse, ffi::AnyBuffer d_output,
                              ffi::Buffer<ffi::F32> delta, ffi::Result<ffi::AnyBuffer> dq,
                              ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                              ffi::Result<ffi::AnyBuffer> dak, ffi::Result<ffi::AnyBuffer> dav,
                              ffi::Span<const int64_t> sizes, float scale) {
  Problem problem;
  Lists lists;
  ffi::Error error = decode_lists(problem, lists, q, k, v, ak, blocks, counts, sizes, scale);
  if (error.failure()) return error;
  return dispatch(q.element_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return backward<ListedBlocks>(pool, ListPlan(problem, lists), in<T>(q), in<T>(k), in<T>(v),
                                  in<T>(ak), in<T>(av), lse.typed_data(), in<T>(d_output),
                                  delta.typed_data(), out<T>(dq), out<T>(dk), out<T>(dv),
                                  out<T>(dak), out<T>(dav));
  });
}

}  // namespace
}  // namespace gna

GNA_DEFINE_HANDLERS(xla::ffi::ThreadPool);
GNA_DEFINE_LIST_HANDLERS(xla::ffi::ThreadPool);
