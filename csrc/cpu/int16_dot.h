// Exact sums of products of small integers, sixteen at once: sum[i] += x[2 i] y[2 i] + x[2 i + 1] y[2 i + 1] in int32, of
// bytes against 16-bit integers. No rounding, so neither order nor instruction set matters; who calls keeps below 2^31.
#pragma once

#include "simd.h"

namespace dschat {

#if defined(__AVX512BW__)
struct Sums {  // int32[16]
  __m512i v;
};
struct Pairs {  // int16[16][2]
  __m512i v;
};
DSCHAT_INLINE Sums no_sums() { return {_mm512_setzero_si512()}; }
DSCHAT_INLINE Sums load_sums(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
DSCHAT_INLINE void store_sums(int32_t* p, Sums s) { _mm512_storeu_si512(p, s.v); }
DSCHAT_INLINE Vec to_floats(Sums s) { return {_mm512_cvtepi32_ps(s.v)}; }
DSCHAT_INLINE Pairs widen_pairs(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
DSCHAT_INLINE Pairs same_pair(const int16_t* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return {_mm512_set1_epi32(bits)};
}
DSCHAT_INLINE Sums add_products(Sums s, Pairs x, Pairs y) {
  return {_mm512_add_epi32(s.v, _mm512_madd_epi16(x.v, y.v))};
}
// Integral lanes of at most 16 bits.
DSCHAT_INLINE void store_int16(int16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

#elif defined(__AVX2__)
struct Sums {
  __m256i a, b;
};
struct Pairs {
  __m256i a, b;
};
DSCHAT_INLINE Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
DSCHAT_INLINE Sums load_sums(const int32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
DSCHAT_INLINE void store_sums(int32_t* p, Sums s) {
  __m256i* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, s.a);
  _mm256_storeu_si256(q + 1, s.b);
}
DSCHAT_INLINE Vec to_floats(Sums s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }
DSCHAT_INLINE Pairs widen_pairs(const int8_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(q)), _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1))};
}
DSCHAT_INLINE Pairs same_pair(const int16_t* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return {_mm256_set1_epi32(bits), _mm256_set1_epi32(bits)};
}
DSCHAT_INLINE Sums add_products(Sums s, Pairs x, Pairs y) {
  return {_mm256_add_epi32(s.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(s.b, _mm256_madd_epi16(x.b, y.b))};
}
DSCHAT_INLINE void store_int16(int16_t* p, Vec x) {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

#elif defined(DSCHAT_NEON)
struct Sums {
  int32x4_t v[4];
};
struct Pairs {  // apart, so that multiply-adds of their own add to the sums: [8 pairs]
  int16x8_t first[2], second[2];
};
DSCHAT_INLINE Sums no_sums() { return {}; }
DSCHAT_INLINE Sums load_sums(const int32_t* p) { return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}}; }
DSCHAT_INLINE void store_sums(int32_t* p, Sums s) {
  for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, s.v[i]);
}
DSCHAT_INLINE Vec to_floats(Sums s) {
  return {vcvtq_f32_s32(s.v[0]), vcvtq_f32_s32(s.v[1]), vcvtq_f32_s32(s.v[2]), vcvtq_f32_s32(s.v[3])};
}
DSCHAT_INLINE Pairs widen_pairs(const int8_t* p) {
  const int8x16x2_t x = vld2q_s8(p);
  const auto widen = [](int8x16_t q, int16x8_t* to) { to[0] = vmovl_s8(vget_low_s8(q)), to[1] = vmovl_high_s8(q); };
  Pairs pairs;
  widen(x.val[0], pairs.first), widen(x.val[1], pairs.second);
  return pairs;
}
DSCHAT_INLINE Pairs same_pair(const int16_t* p) {
  const int16x8_t first = vdupq_n_s16(p[0]), second = vdupq_n_s16(p[1]);
  return {{first, first}, {second, second}};
}
DSCHAT_INLINE Sums add_products(Sums s, Pairs x, Pairs y) {
  const auto add = [&s](const int16x8_t* p, const int16x8_t* q) {
    for (int i = 0; i < 2; ++i) {
      s.v[2 * i] = vmlal_s16(s.v[2 * i], vget_low_s16(p[i]), vget_low_s16(q[i]));
      s.v[2 * i + 1] = vmlal_high_s16(s.v[2 * i + 1], p[i], q[i]);
    }
  };
  add(x.first, y.first), add(x.second, y.second);
  return s;
}
DSCHAT_INLINE void store_int16(int16_t* p, Vec x) {
  const auto pack = [](float32x4_t l, float32x4_t h) {
    return vcombine_s16(vqmovn_s32(vcvtq_s32_f32(l)), vqmovn_s32(vcvtq_s32_f32(h)));
  };
  vst1q_s16(p, pack(x.a, x.b)), vst1q_s16(p + 8, pack(x.c, x.d));
}

#else
struct Sums {
  int32_t v[kLanes];
};
struct Pairs {
  int16_t v[2 * kLanes];
};
DSCHAT_INLINE Sums no_sums() { return {}; }
DSCHAT_INLINE Sums load_sums(const int32_t* p) {
  Sums s;
  std::memcpy(s.v, p, sizeof(s.v));
  return s;
}
DSCHAT_INLINE void store_sums(int32_t* p, const Sums& s) { std::memcpy(p, s.v, sizeof(s.v)); }
DSCHAT_INLINE Vec to_floats(const Sums& s) {
  float t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = float(s.v[i]);
  return load(t);
}
DSCHAT_INLINE Pairs widen_pairs(const int8_t* p) {
  Pairs x;
  for (int i = 0; i < 2 * kLanes; ++i) x.v[i] = p[i];
  return x;
}
DSCHAT_INLINE Pairs same_pair(const int16_t* p) {
  Pairs x;
  for (int i = 0; i < 2 * kLanes; ++i) x.v[i] = p[i % 2];
  return x;
}
DSCHAT_INLINE Sums add_products(Sums s, const Pairs& x, const Pairs& y) {
  for (int i = 0; i < kLanes; ++i)
    s.v[i] += int32_t(x.v[2 * i]) * y.v[2 * i] + int32_t(x.v[2 * i + 1]) * y.v[2 * i + 1];
  return s;
}
DSCHAT_INLINE void store_int16(int16_t* p, Vec x) {
  float t[kLanes];
  to_array(x, t);
  for (int i = 0; i < kLanes; ++i) p[i] = int16_t(t[i]);
}
#endif

}  // namespace dschat
