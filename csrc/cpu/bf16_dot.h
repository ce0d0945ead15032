// Sums of products of bfloat16 pairs, in every float32 lane; subnormal factors and sums count as zero.
//
//   AVX512-BF16   sum += x[1] y[1], then sum += x[0] y[0]. A product of two bfloat16 is exact in float32, so each step
//                 rounds once.
//   ARM's BFDOT   sum += (x[0] y[0] + x[1] y[1]): both additions round to odd (the neighbour whose last bit is 1), which
//                 errs by less than one unit in the last place to either side. (A process for which the system sets
//                 FPCR.EBF has fused ones that round to nearest; Linux sets it for none.)
//
// The bits of the two differ, as those of any two instruction sets. With DSCHAT_BF16_DOT_MODEL the first is in plain C++:
// the same kernels and layouts run on any machine, and a machine that has the instruction shows that the model's bits are
// its bits. The second runs in an emulator of the processor (.ci/arm).
#pragma once

#include "amx.h"

#if defined(DSCHAT_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DSCHAT_BFDOT 1
#endif
#if (defined(__AVX512BF16__) || defined(DSCHAT_BFDOT) || defined(DSCHAT_BF16_DOT_MODEL)) && !defined(DSCHAT_AMX)
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

#elif defined(DSCHAT_BFDOT)

struct Bf16Pairs {
  bfloat16x8_t a, b, c, d;
};
DSCHAT_INLINE Bf16Pairs load_pairs(const bf16* p) {
  const bfloat16_t* q = reinterpret_cast<const bfloat16_t*>(p);
  return {vld1q_bf16(q), vld1q_bf16(q + 8), vld1q_bf16(q + 16), vld1q_bf16(q + 24)};
}
// Integers up to 256 are exact in bfloat16: the upper halves of their floats.
DSCHAT_INLINE Bf16Pairs load_pairs(const int8_t* p) {
  const Vec l = load(p), h = load(p + kLanes);
  const auto pairs = [](float32x4_t x, float32x4_t y) {
    return vreinterpretq_bf16_u16(vuzp2q_u16(vreinterpretq_u16_f32(x), vreinterpretq_u16_f32(y)));
  };
  return {pairs(l.a, l.b), pairs(l.c, l.d), pairs(h.a, h.b), pairs(h.c, h.d)};
}
DSCHAT_INLINE Bf16Pairs set1(Bf16Pair x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bfloat16x8_t q = vreinterpretq_bf16_u32(vdupq_n_u32(bits));
  return {q, q, q, q};
}
DSCHAT_INLINE Vec dot(Vec sum, Bf16Pairs x, Bf16Pairs y) {
  return quarters([](float32x4_t s, bfloat16x8_t p, bfloat16x8_t q) { return vbfdotq_f32(s, p, q); }, sum, x, y);
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
