// Sums of products of bfloat16 pairs (AVX512-BF16): sum += x[1] y[1], then sum += x[0] y[0], in every float32 lane.
//
// A product of two bfloat16 is exact in float32, so each step rounds once; subnormal factors and sums count as zero.
// With DSCHAT_BF16_DOT_MODEL the instruction is these two steps in plain C++: the same kernels and layouts run on any
// machine, and a machine that has the instruction shows that the model's bits are its bits.
#pragma once

#include "amx.h"

#if (defined(__AVX512BF16__) || defined(DSCHAT_BF16_DOT_MODEL)) && !defined(DSCHAT_AMX)
#define DSCHAT_BF16_DOT 1
#endif

#if defined(DSCHAT_BF16_DOT)

#include "simd.h"

namespace dschat {

struct alignas(4) Bf16Pair {
  bf16 first, second;
};

#if defined(DSCHAT_BF16_DOT_MODEL)

struct Bf16Pairs {
  Bf16Pair pair[kLanes];
};
inline float flush_subnormal(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
inline Bf16Pairs load_pairs(const bf16* p) {
  Bf16Pairs x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline Bf16Pairs load_pairs(const int8_t* p) {
  bf16 values[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) values[i] = to_bf16(float(p[i]));
  return load_pairs(values);
}
inline Bf16Pairs set1(Bf16Pair x) {
  Bf16Pairs all;
  for (int i = 0; i < kLanes; ++i) all.pair[i] = x;
  return all;
}
inline Vec dot(Vec sum, Bf16Pairs x, Bf16Pairs y) {
  float lanes[kLanes];
  to_array(sum, lanes);
  const auto factor = [](bf16 value) { return flush_subnormal(to_float(value)); };
  for (int i = 0; i < kLanes; ++i) {
    // In double the product is exact; rounding it to float after the addition is the fused step.
    const double odd = double(factor(x.pair[i].second)) * double(factor(y.pair[i].second));
    const double even = double(factor(x.pair[i].first)) * double(factor(y.pair[i].first));
    lanes[i] = flush_subnormal(float(odd + double(flush_subnormal(lanes[i]))));
    lanes[i] = flush_subnormal(float(even + double(lanes[i])));
  }
  return load(lanes);
}

#else

using Bf16Pairs = __m512bh;
DSCHAT_INLINE Bf16Pairs load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
// Integers up to 256 are exact in bfloat16.
DSCHAT_INLINE Bf16Pairs load_pairs(const int8_t* p) { return _mm512_cvtne2ps_pbh(load(p + kLanes).v, load(p).v); }
DSCHAT_INLINE Bf16Pairs set1(Bf16Pair x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}
DSCHAT_INLINE Vec dot(Vec sum, Bf16Pairs x, Bf16Pairs y) { return {_mm512_dpbf16_ps(sum.v, x, y)}; }

#endif

}  // namespace dschat

#endif  // DSCHAT_BF16_DOT
