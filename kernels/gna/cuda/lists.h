// Attention to listed blocks on the CPU target: blocks of queries in tiles, and the keys of the
// blocks that a tile's list names.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"
#include "tiles.h"

namespace gna {

struct Lists {
  const int32_t* blocks;  // [B, Hq, query blocks, most]: the front-end's, each block once
  const int32_t* counts;  // [B, Hq, query blocks]
  int keys;               // tokens of the layout of keys
  int query_block, key_block, query_blocks, most;
};

// query [B, N, Hq, D], key [B, M, Hkv, D], value [B, M, Hkv, Dv], additional [B, A, Hkv, D];
// `sizes` holds the tokens of a block of queries and of keys.
inline ffi::Error decode_lists(Problem& problem, Lists& lists, const ffi::AnyBuffer& query,
                               const ffi::AnyBuffer& key, const ffi::AnyBuffer& value,
                               const ffi::AnyBuffer& additional,
                               const ffi::Buffer<ffi::S32>& blocks,
                               const ffi::Buffer<ffi::S32>& counts, ffi::Span<const int64_t> sizes,
                               float scale) {
  const auto q = query.dimensions(), k = key.dimensions(), v = value.dimensions();
  const auto b = blocks.dimensions(), c = counts.dimensions();
  if (q.size() != 4 || k.size() != 4 || v.size() != 4 || b.size() != 4 || c.size() != 3 ||
      sizes.size() != 2) {
    return ffi::Error::InvalidArgument("gna: operands and attributes differ in rank");
  }
  const int64_t query_block = sizes.begin()[0], key_block = sizes.begin()[1];
  if (query_block < 1 || key_block < 1 || b[2] != (q[1] + query_block - 1) / query_block ||
      b[0] != q[0] || b[1] != q[2] || c[0] != b[0] || c[1] != b[1] || c[2] != b[2]) {
    return ffi::Error::InvalidArgument("gna: lists do not fit the operands");
  }
  if (q[1] > INT32_MAX || k[1] + additional.dimensions()[1] > INT32_MAX) {
    return ffi::Error::InvalidArgument("gna: more than 2^31 tokens");
  }
  problem = Problem{};
  problem.batch = static_cast<int>(q[0]);
  problem.tokens = static_cast<int>(q[1]);
  problem.heads = static_cast<int>(q[2]);
  problem.dim = static_cast<int>(q[3]);
  problem.kv_heads = static_cast<int>(v[2]);
  problem.value_dim = static_cast<int>(v[3]);
  problem.additional = static_cast<int>(additional.dimensions()[1]);
  problem.scale = scale;
  lists.blocks = blocks.typed_data();
  lists.counts = counts.typed_data();
  lists.keys = static_cast<int>(k[1]);
  // A block is no larger than all tokens.
  lists.query_block = static_cast<int>(query_block < q[1] ? query_block : q[1]);
  lists.key_block = static_cast<int>(key_block < k[1] ? key_block : k[1]);
  lists.query_blocks = static_cast<int>(b[2]);
  lists.most = static_cast<int>(b[3]);
  return ffi::Error::Success();
}

// Packed order is that of the tokens, then additional keys; blocks of queries are cut into equal
// tiles.
struct ListPlan {
  ListPlan(const Problem& problem, const Lists& lists)
      : problem(problem), lists(lists),
        tiles(ceil_div(lists.query_block, kMostQueries)),
        tile(ceil_div(lists.query_block, tiles)),
        lanes((tile + 15) / 16 * 16) {
    for (int first = 0; first < lists.keys; first += lists.key_block) {
      runs.push_back({first, first, 1, at_most(lists.key_block, lists.keys - first)});
      if (lists.keys - first <= lists.key_block) break;  // the sum might not be an int
    }
  }

  int64_t tile_count() const { return int64_t{lists.query_blocks} * tiles; }
  int key_tokens() const { return lists.keys; }

  const Problem& problem;
  const Lists& lists;
  const int tiles, tile, lanes;  // tiles of a block, their queries, these up to a multiple of 16
  std::vector<Run> runs;
};

// The queries of a tile and the keys that all of them see; of the members of `Neighborhood`.
struct ListedBlocks {
  static constexpr bool kPerHead = true;

  int token[kMostQueries];
  std::vector<int> keys;
  std::vector<uint64_t> masks;  // none
  int free;

  void find(const ListPlan& plan, int64_t number, int64_t entry, int head) {
    const Lists& lists = plan.lists;
    const int64_t block = number / plan.tiles;
    const int64_t in_block = number % plan.tiles * plan.tile, first = block * lists.query_block;
    for (int lane = 0; lane < kMostQueries; ++lane) {
      const int64_t place = in_block + lane, at = first + place;
      const bool inside =
          lane < plan.tile && place < lists.query_block && at < plan.problem.tokens;
      token[lane] = inside ? static_cast<int>(at) : -1;
    }
    keys.clear();
    if (token[0] >= 0) {  // the last block's last tiles may be empty
      const int64_t list = (entry * plan.problem.heads + head) * lists.query_blocks + block;
      const int32_t* const named = lists.blocks + list * lists.most;
      for (int n = 0; n < lists.counts[list]; ++n) {
        const int first_key = named[n] * lists.key_block;
        const int count = at_most(lists.key_block, lists.keys - first_key);
        for (int k = 0; k < count; ++k) keys.push_back(first_key + k);
      }
      for (int a = 0; a < plan.problem.additional; ++a) keys.push_back(lists.keys + a);
    }
    free = static_cast<int>(keys.size());
  }
};

}  // namespace gna
