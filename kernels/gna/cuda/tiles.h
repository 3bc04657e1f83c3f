// How the CPU target cuts a problem: dilation groups in rows of packed keys, tiles of queries, and
// the keys that a tile sees.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace gna {

constexpr int kMostQueries = 64;  // of a tile: a bit each
constexpr uint64_t kAll = ~uint64_t{0};

struct Group {
  int offset[3];  // its first token in the layout
  int length[3];
  int first;  // its first key among the packed ones
};

// Tokens that follow each other in a packed row: those of a group along the last dimension.
struct Run {
  int packed, token, step, count;
};

struct Tile {
  int group;
  int first[3];
};

// Packed order is by dilation group, then row-major within it, then additional keys.
struct Plan {
  explicit Plan(const Problem& problem) : problem(problem), lanes((problem.tile() + 15) / 16 * 16) {
    const Axis* axis = problem.axis;
    int packed = 0;
    for (int g = 0; g < problem.groups(); ++g) {
      Group group;
      for (int m = 2, rest = g; m >= 0; rest /= axis[m].dilation, --m) {
        group.offset[m] = rest % axis[m].dilation;
        group.length[m] = group_length(axis[m], group.offset[m]);
      }
      group.first = packed;
      for (int i = 0; i < group.length[0]; ++i) {
        for (int j = 0; j < group.length[1]; ++j) {
          runs.push_back({packed, token(group, i, j, 0), axis[2].dilation, group.length[2]});
          packed += group.length[2];
        }
      }
      for (int i = 0; i < group.length[0]; i += axis[0].tile) {
        for (int j = 0; j < group.length[1]; j += axis[1].tile) {
          for (int k = 0; k < group.length[2]; k += axis[2].tile) tiles.push_back({g, {i, j, k}});
        }
      }
      groups.push_back(group);
    }
  }

  int token(const Group& group, int i, int j, int k) const {
    const Axis* axis = problem.axis;
    const int x = i * axis[0].dilation + group.offset[0];
    const int y = j * axis[1].dilation + group.offset[1];
    const int z = k * axis[2].dilation + group.offset[2];
    return (x * axis[1].length + y) * axis[2].length + z;
  }

  int64_t tile_count() const { return tiles.size(); }
  int key_tokens() const { return problem.tokens; }

  const Problem& problem;
  const int lanes;  // queries of a tile, up to a multiple of 16
  std::vector<Group> groups;
  std::vector<Run> runs;
  std::vector<Tile> tiles;
};

// The queries of a tile and the keys that any of them sees, the same in all heads and entries.
struct Neighborhood {
  static constexpr bool kPerHead = false;

  int token[kMostQueries];     // of each lane in the layout, -1 where there is none
  std::vector<int> keys;       // packed; first those that all lanes see, then those that some see
  std::vector<uint64_t> masks; // lanes that see each of the latter
  int free;                    // keys that all lanes see

  void find(const Plan& plan, int64_t number, int64_t, int) {
    const Tile& tile = plan.tiles[number];
    const Group& group = plan.groups[tile.group];
    const int t[3] = {plan.problem.axis[0].tile, plan.problem.axis[1].tile,
                      plan.problem.axis[2].tile};
    for (int m = 0; m < 3; ++m) bits[m].assign(t[m], 0);
    for (int lane = 0; lane < kMostQueries; ++lane) {
      // Lanes without a query count as the first, to see nothing that no query sees.
      const int n = lane < t[0] * t[1] * t[2] ? lane : 0;
      const int place[3] = {n / (t[1] * t[2]), n / t[2] % t[1], n % t[2]};
      bool inside = lane == n;
      for (int m = 0; m < 3; ++m) {
        bits[m][place[m]] |= uint64_t{1} << lane;
        inside &= tile.first[m] + place[m] < group.length[m];
      }
      token[lane] = !inside ? -1 : plan.token(group, tile.first[0] + place[0],
                                              tile.first[1] + place[1], tile.first[2] + place[2]);
    }
    for (int m = 0; m < 3; ++m) along(plan.problem.axis[m], group.length[m], tile.first[m], m);
    keys.clear();
    masks.clear();
    masked.clear();
    const int last = group.length[2];
    for (size_t i = 0; i < seen[0].size(); ++i) {
      for (size_t j = 0; j < seen[1].size(); ++j) {
        const uint64_t outer = seen[0][i] & seen[1][j];
        if (!outer) continue;
        const int row = static_cast<int>((start[0] + i) * group.length[1] + start[1] + j);
        const int key = group.first + row * last + start[2];
        for (size_t k = 0; k < seen[2].size(); ++k) {
          const uint64_t mask = outer & seen[2][k];
          if (mask == kAll) {
            keys.push_back(key + static_cast<int>(k));
          } else if (mask) {
            masked.push_back(key + static_cast<int>(k));
            masks.push_back(mask);
          }
        }
      }
    }
    for (int a = 0; a < plan.problem.additional; ++a) keys.push_back(plan.problem.tokens + a);
    free = static_cast<int>(keys.size());
    keys.insert(keys.end(), masked.begin(), masked.end());
  }

 private:
  // Lanes that see each key along one dimension. Windows neither begin nor end earlier than those
  // of queries before, so queries come into a key's sight and leave it in their order.
  void along(const Axis& axis, int length, int first, int m) {
    start[m] = window(axis, length, first).start;
    const int end = window(axis, length, first + axis.tile - 1).end;
    seen[m].clear();
    uint64_t now = 0;
    int come = 0, gone = 0;
    for (int key = start[m]; key < end; ++key) {
      for (; come < axis.tile && window(axis, length, first + come).start <= key; ++come) {
        now |= bits[m][come];
      }
      for (; gone < come && window(axis, length, first + gone).end <= key; ++gone) {
        now &= ~bits[m][gone];
      }
      seen[m].push_back(now);
    }
  }

  int start[3];
  std::vector<uint64_t> bits[3];  // lanes at each place of the tile along a dimension
  std::vector<uint64_t> seen[3];  // lanes that see each key of the box along a dimension
  std::vector<int> masked;
};

}  // namespace gna
