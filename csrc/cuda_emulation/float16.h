// float16 and bfloat16 of a machine without a CUDA toolkit: storage types and conversions that round as the hardware
// does (to nearest, ties to even; NaN becomes 0x7fff).
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

inline float bfloat16_value(uint16_t h) { return bits_float(uint32_t(h) << 16); }

inline uint16_t float16_bits(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and up round to infinity
  if (magnitude < 0x33000001u) return uint16_t(sign);             // up to 2^-25 rounds to zero
  const int exponent = int(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  // Bits that the result has no place for: 13 of a normal number, more of a subnormal one.
  const int drop = exponent < -14 ? 13 + (-14 - exponent) : 13;
  uint32_t kept = mantissa >> drop;
  const uint32_t rest = mantissa & ((1u << drop) - 1), half = 1u << (drop - 1);
  kept += rest > half || (rest == half && (kept & 1));
  // A carry out of the mantissa is right in both cases: it moves into the exponent.
  return uint16_t(sign | (exponent < -14 ? kept : kept + (uint32_t(exponent + 14) << 10)));
}

inline float float16_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = float(mantissa) * 0x1p-24f;
  return sign ? -small : small;
}

}  // namespace emulation

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) { return emulation::float16_value(h.bits); }
inline __half __float2half_rn(float x) { return {emulation::float16_bits(x)}; }
inline float __bfloat162float(__nv_bfloat16 h) { return emulation::bfloat16_value(h.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {emulation::bfloat16_bits(x)}; }
