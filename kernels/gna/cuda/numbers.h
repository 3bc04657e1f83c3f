// bfloat16 and float16 as the CPU target reads and writes them: through float32, rounded to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace gna {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t rest = (x.bits & 0x7fffu) << 13;
  // The exponent's bias differs by 112; multiplying also makes subnormal numbers right.
  const uint32_t finite = as_bits(as_float(rest) * as_float((127 + 112) << 23));
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  return as_float(sign | (special ? rest | 0x7f800000u : finite));
}

inline void from_float(float x, float& y) { y = x; }

inline void from_float(float x, BFloat16& y) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  y.bits = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40u : rounded);
}

inline void from_float(float x, Float16& y) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t result;
  if (size > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (size >= 0x47800000u) {
    result = 0x7c00u;  // from 2^16
  } else if (size < 0x38800000u) {
    result = as_bits(as_float(size) + 0.5f) - 0x3f000000u;  // below 2^-14: multiples of 2^-24
  } else {
    result = (size + 0xfffu + (size >> 13 & 1) - (112u << 23)) >> 13;
  }
  y.bits = static_cast<uint16_t>(sign | result);
}

}  // namespace gna
