// Tiles of AMX as the SDM describes them, in plain C++; included before everything else.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
static thread_local Tile tiles[8];
static thread_local bool configured = false;

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1) std::abort();
  for (int t = 0; t < 8; ++t) {
    uint16_t size;
    std::memcpy(&size, bytes + 16 + 2 * t, 2);
    tiles[t].bytes = size, tiles[t].rows = bytes[48 + t];
    if (size > 64 || tiles[t].rows > 16) std::abort();
  }
  configured = true;
}

inline Tile& tile(int t) {
  if (!configured) std::abort();
  return tiles[t];
}

inline void load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < tile(t).rows; ++r) {
    std::memcpy(tile(t).data[r], static_cast<const char*>(from) + r * stride, tile(t).bytes);
  }
}

inline void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < tile(t).rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile(t).data[r], tile(t).bytes);
  }
}

inline float wide(const uint8_t* x) {
  uint16_t half;
  std::memcpy(&half, x, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply(int c, int a, int b) {
  if (tile(a).bytes != 4 * tile(b).rows || tile(c).rows != tile(a).rows) std::abort();
  for (int m = 0; m < tile(c).rows; ++m) {
    for (int n = 0; n < tile(c).bytes / 4; ++n) {
      float sum;
      std::memcpy(&sum, tile(c).data[m] + 4 * n, 4);
      for (int k = 0; k < tile(a).bytes / 4; ++k) {
        for (int half = 0; half < 2; ++half) {
          sum += wide(tile(a).data[m] + 4 * k + 2 * half) * wide(tile(b).data[k] + 4 * n + 2 * half);
        }
      }
      std::memcpy(tile(c).data[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() (emulated::configured = false)
#define _tile_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated::multiply(c, a, b)
#define syscall(...) 0
#define __AMX_BF16__ 1
