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
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t size;
  if (rest >= 0x7c00u) {
    size = rest << 13 | 0x7f800000u;  // infinite or NaN
  } else if (rest >= 0x0400u) {
    size = (rest << 13) + (112u << 23);  // the exponent's bias differs by 112
  } else {
    // A multiple of 2^-24, from an integer: subnormal floats may count as zero.
    size = as_bits(static_cast<float>(rest) * as_float((127 - 24) << 23));
  }
  return as_float(sign | size);
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
