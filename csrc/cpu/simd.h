// Sixteen float lanes on every ISA, so that packed layouts, lane trees and therefore results do not depend on
// how wide the machine's registers are. All arithmetic is float32; bfloat16 exists only in memory.
//
//   avx512    one zmm          avx2    two ymm          neon    four q          portable    a plain array
//
// The build passes -ffp-contract=off: a multiply-add is fused exactly where the source says fma().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(DSCHAT_NEON)
#include <arm_neon.h>
#endif

#define DSCHAT_INLINE inline __attribute__((always_inline))

namespace dschat {

enum class DType : int { f32 = 0, bf16 = 1, i8 = 8 };  // i8: of packed weights only

// bfloat16 as stored: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

DSCHAT_INLINE float to_float(float x) { return x; }
DSCHAT_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN (quiet).
DSCHAT_INLINE bf16 to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return bf16{uint16_t(u >> 16)};
}

template <typename T> DSCHAT_INLINE T from_float(float x);
template <> DSCHAT_INLINE float from_float<float>(float x) { return x; }
template <> DSCHAT_INLINE bf16 from_float<bf16>(float x) { return to_bf16(x); }

// The value that x has after being stored as T and loaded again.
template <typename T> DSCHAT_INLINE float round_to(float x) { return to_float(from_float<T>(x)); }

constexpr int kLanes = 16;

#if defined(__AVX512F__)
// ------------------------------------------------------------------------------------------------ AVX-512
#define DSCHAT_VEC_REGISTERS 32  // registers of kLanes floats that a kernel may count on
struct Vec {
  __m512 v;
};
DSCHAT_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
DSCHAT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
DSCHAT_INLINE Vec load(const bf16* p) {
  __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
}
DSCHAT_INLINE Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
DSCHAT_INLINE __mmask16 lane_mask(int n) { return __mmask16((1u << n) - 1u); }
// The first n (0..16) lanes; the others are zero and their memory is not touched.
DSCHAT_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
DSCHAT_INLINE Vec load(const bf16* p, int n) {
  __m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane_mask(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
}
// Rounded to bfloat16, still as float32: the upper halves are the result, the lower ones are left over.
DSCHAT_INLINE __m512i rounded_bits(Vec a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}
DSCHAT_INLINE __m256i upper_halves(__m512i bits) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)); }
DSCHAT_INLINE __m256i pack_bf16(Vec a) { return upper_halves(rounded_bits(a)); }
DSCHAT_INLINE Vec round_bf16(Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(rounded_bits(a), _mm512_set1_epi32(int(0xffff0000u))))};
}
DSCHAT_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
DSCHAT_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(a)); }
DSCHAT_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }
DSCHAT_INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, lane_mask(n), pack_bf16(a)); }
DSCHAT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
DSCHAT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
DSCHAT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
DSCHAT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
DSCHAT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
DSCHAT_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// max/min return b when a lane of either is NaN (the hardware's rule, kept on every ISA).
DSCHAT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
DSCHAT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
DSCHAT_INLINE Vec round_even(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DSCHAT_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// a < b ? x : y, lane by lane (false for NaN).
DSCHAT_INLINE Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// x 2^n for integral-valued lanes.
DSCHAT_INLINE Vec ldexp(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
DSCHAT_INLINE void to_array(Vec a, float* out) { _mm512_storeu_ps(out, a.v); }
// Two vectors from 32 bfloat16 stored as pairs: lanes of `lo` at even places, of `hi` at odd places.
DSCHAT_INLINE void load_pair(const bf16* p, Vec& lo, Vec& hi) {
  __m512i u = _mm512_loadu_si512(p);
  lo.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
  hi.v = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000u))));
}
#define DSCHAT_ISA_NAME "avx512"

#elif defined(__AVX2__)
// --------------------------------------------------------------------------------------------------- AVX2
#define DSCHAT_VEC_REGISTERS 8
struct Vec {
  __m256 a, b;
};
DSCHAT_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DSCHAT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DSCHAT_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
DSCHAT_INLINE Vec load(const bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
}
DSCHAT_INLINE __m256 widen_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
DSCHAT_INLINE Vec load(const int8_t* p) { return {widen_int8(p), widen_int8(p + 8)}; }
DSCHAT_INLINE __m256i round_bf16(__m256 f) {  // results in the low halves of the 32-bit lanes
  __m256i u = _mm256_castps_si256(f);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  __m256 nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan));
}
DSCHAT_INLINE __m256i pack_bf16(Vec x) {
  __m256i p = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  return _mm256_permute4x64_epi64(p, 0xd8);
}
DSCHAT_INLINE Vec round_bf16(Vec x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(round_bf16(x.a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(round_bf16(x.b), 16))};
}
DSCHAT_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
DSCHAT_INLINE void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x)); }
DSCHAT_INLINE Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
DSCHAT_INLINE Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
DSCHAT_INLINE Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
DSCHAT_INLINE Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
DSCHAT_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
DSCHAT_INLINE Vec sqrt(Vec x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
DSCHAT_INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
DSCHAT_INLINE Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
DSCHAT_INLINE Vec round_even(Vec x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
DSCHAT_INLINE Vec abs(Vec x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
DSCHAT_INLINE Vec select_lt(Vec l, Vec r, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(l.a, r.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(l.b, r.b, _CMP_LT_OQ))};
}
DSCHAT_INLINE __m256 pow2i_half(__m256 n) {
  __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
DSCHAT_INLINE Vec pow2i(Vec n) { return {pow2i_half(n.a), pow2i_half(n.b)}; }
DSCHAT_INLINE void to_array(Vec x, float* out) { store(out, x); }
DSCHAT_INLINE void load_pair(const bf16* p, Vec& lo, Vec& hi) {
  __m256i u0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m256i u1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  lo = {_mm256_castsi256_ps(_mm256_slli_epi32(u0, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(u1, 16))};
  hi = {_mm256_castsi256_ps(_mm256_and_si256(u0, upper)), _mm256_castsi256_ps(_mm256_and_si256(u1, upper))};
}
#define DSCHAT_ISA_NAME "avx2"

#elif defined(DSCHAT_NEON)
// --------------------------------------------------------------------------------------------------- NEON
#define DSCHAT_VEC_REGISTERS 8
struct Vec {
  float32x4_t a, b, c, d;
};
// f of every quarter.
template <typename F, typename... V> DSCHAT_INLINE Vec quarters(F f, V... x) {
  return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}
DSCHAT_INLINE Vec set1(float x) {
  const float32x4_t q = vdupq_n_f32(x);
  return {q, q, q, q};
}
DSCHAT_INLINE Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
DSCHAT_INLINE const uint16_t* halves(const bf16* p) { return reinterpret_cast<const uint16_t*>(p); }
DSCHAT_INLINE Vec load(const bf16* p) {
  const uint16x8_t none = vdupq_n_u16(0), l = vld1q_u16(halves(p)), h = vld1q_u16(halves(p) + 8);
  return {vreinterpretq_f32_u16(vzip1q_u16(none, l)), vreinterpretq_f32_u16(vzip2q_u16(none, l)),
          vreinterpretq_f32_u16(vzip1q_u16(none, h)), vreinterpretq_f32_u16(vzip2q_u16(none, h))};
}
DSCHAT_INLINE Vec load(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t l = vmovl_s8(vget_low_s8(x)), h = vmovl_high_s8(x);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(l))), vcvtq_f32_s32(vmovl_high_s16(l)),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(h))), vcvtq_f32_s32(vmovl_high_s16(h))};
}
// Rounded to bfloat16, still as float32: the upper halves are the result, the lower ones are left over.
DSCHAT_INLINE uint32x4_t rounded_bits(float32x4_t x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(x, x), r, vorrq_u32(u, vdupq_n_u32(0x400000)));
}
DSCHAT_INLINE Vec round_bf16(Vec x) {
  const auto upper = [](float32x4_t q) {
    return vreinterpretq_f32_u32(vandq_u32(rounded_bits(q), vdupq_n_u32(0xffff0000u)));
  };
  return quarters(upper, x);
}
DSCHAT_INLINE void store(float* p, Vec x) {
  vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d);
}
DSCHAT_INLINE void store(bf16* p, Vec x) {
  const auto upper = [](float32x4_t l, float32x4_t h) {
    return vuzp2q_u16(vreinterpretq_u16_u32(rounded_bits(l)), vreinterpretq_u16_u32(rounded_bits(h)));
  };
  uint16_t* to = reinterpret_cast<uint16_t*>(p);
  vst1q_u16(to, upper(x.a, x.b)), vst1q_u16(to + 8, upper(x.c, x.d));
}
#define DSCHAT_QUARTERS(op) quarters([](float32x4_t p, float32x4_t q) { return op(p, q); }, x, y)
DSCHAT_INLINE Vec operator+(Vec x, Vec y) { return DSCHAT_QUARTERS(vaddq_f32); }
DSCHAT_INLINE Vec operator-(Vec x, Vec y) { return DSCHAT_QUARTERS(vsubq_f32); }
DSCHAT_INLINE Vec operator*(Vec x, Vec y) { return DSCHAT_QUARTERS(vmulq_f32); }
DSCHAT_INLINE Vec operator/(Vec x, Vec y) { return DSCHAT_QUARTERS(vdivq_f32); }
#undef DSCHAT_QUARTERS
DSCHAT_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
DSCHAT_INLINE Vec sqrt(Vec x) {
  return quarters([](float32x4_t q) { return vsqrtq_f32(q); }, x);
}
// Not FMAX and FMIN, whose result is NaN when either lane is.
DSCHAT_INLINE Vec max(Vec x, Vec y) {
  return quarters([](float32x4_t p, float32x4_t q) { return vbslq_f32(vcgtq_f32(p, q), p, q); }, x, y);
}
DSCHAT_INLINE Vec min(Vec x, Vec y) {
  return quarters([](float32x4_t p, float32x4_t q) { return vbslq_f32(vcltq_f32(p, q), p, q); }, x, y);
}
DSCHAT_INLINE Vec round_even(Vec x) {
  return quarters([](float32x4_t q) { return vrndnq_f32(q); }, x);
}
DSCHAT_INLINE Vec abs(Vec x) {
  return quarters([](float32x4_t q) { return vabsq_f32(q); }, x);
}
DSCHAT_INLINE Vec select_lt(Vec l, Vec r, Vec x, Vec y) {
  const auto choose = [](float32x4_t lq, float32x4_t rq, float32x4_t xq, float32x4_t yq) {
    return vbslq_f32(vcltq_f32(lq, rq), xq, yq);
  };
  return quarters(choose, l, r, x, y);
}
DSCHAT_INLINE Vec pow2i(Vec n) {
  const auto power = [](float32x4_t q) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(q), vdupq_n_s32(127)), 23));
  };
  return quarters(power, n);
}
DSCHAT_INLINE void to_array(Vec x, float* out) { store(out, x); }
DSCHAT_INLINE void load_pair(const bf16* p, Vec& lo, Vec& hi) {
  const Vec pairs = load(reinterpret_cast<const float*>(p));
  const auto first = [](float32x4_t q) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(q), 16)); };
  const auto second = [](float32x4_t q) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(q), vdupq_n_u32(0xffff0000u)));
  };
  lo = quarters(first, pairs), hi = quarters(second, pairs);
}
#define DSCHAT_ISA_NAME "neon"

#else
// ----------------------------------------------------------------------------------------------- portable
// The compiler's own vectors: it lowers them to whatever the target has (SSE2, NEON, scalars).
#define DSCHAT_VEC_REGISTERS 4
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
struct Vec {
  Floats v;
};
#define DSCHAT_EACH for (int i = 0; i < kLanes; ++i)
DSCHAT_INLINE Vec set1(float x) {
  Vec r;
  DSCHAT_EACH r.v[i] = x;
  return r;
}
DSCHAT_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r.v, p, sizeof(r.v));
  return r;
}
DSCHAT_INLINE Vec load(const bf16* p) {
  Vec r;
  DSCHAT_EACH r.v[i] = to_float(p[i]);
  return r;
}
DSCHAT_INLINE Vec load(const int8_t* p) {
  Vec r;
  DSCHAT_EACH r.v[i] = float(p[i]);
  return r;
}
DSCHAT_INLINE void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof(x.v)); }
DSCHAT_INLINE Vec round_bf16(Vec x) {
  DSCHAT_EACH x.v[i] = round_to<bf16>(x.v[i]);
  return x;
}
DSCHAT_INLINE void store(bf16* p, Vec x) { DSCHAT_EACH p[i] = to_bf16(x.v[i]); }
DSCHAT_INLINE Vec operator+(Vec x, Vec y) { return {x.v + y.v}; }
DSCHAT_INLINE Vec operator-(Vec x, Vec y) { return {x.v - y.v}; }
DSCHAT_INLINE Vec operator*(Vec x, Vec y) { return {x.v * y.v}; }
DSCHAT_INLINE Vec operator/(Vec x, Vec y) { return {x.v / y.v}; }
// Where no instruction fuses them, multiply and add round separately: std::fma would be a library call a lane.
DSCHAT_INLINE Vec fma(Vec x, Vec y, Vec z) {
#if defined(__aarch64__)
  DSCHAT_EACH z.v[i] = __builtin_fmaf(x.v[i], y.v[i], z.v[i]);
  return z;
#else
  return {x.v * y.v + z.v};
#endif
}
DSCHAT_INLINE Vec sqrt(Vec x) {
  DSCHAT_EACH x.v[i] = __builtin_sqrtf(x.v[i]);
  return x;
}
DSCHAT_INLINE Vec max(Vec x, Vec y) { return {x.v > y.v ? x.v : y.v}; }
DSCHAT_INLINE Vec min(Vec x, Vec y) { return {x.v < y.v ? x.v : y.v}; }
// Adding and taking away 1.5 * 2^23 rounds to even; larger values are integers already.
DSCHAT_INLINE Vec round_even(Vec x) {
  const Floats magic = Floats{} + 12582912.0f, limit = Floats{} + 4194304.0f;
  Floats r = (x.v + magic) - magic;
  Floats a = x.v < 0.0f ? -x.v : x.v;
  return {a < limit ? r : x.v};
}
DSCHAT_INLINE Vec abs(Vec x) {
  Ints bits;
  std::memcpy(&bits, &x.v, sizeof(bits));
  bits &= 0x7fffffff;
  std::memcpy(&x.v, &bits, sizeof(bits));
  return x;
}
DSCHAT_INLINE Vec select_lt(Vec l, Vec r, Vec x, Vec y) { return {l.v < r.v ? x.v : y.v}; }
DSCHAT_INLINE Vec pow2i(Vec n) {
  n = max(set1(-126.0f), n);  // what an integer cannot hold may not be converted
  Ints bits = (__builtin_convertvector(n.v, Ints) + 127) << 23;
  Vec r;
  std::memcpy(&r.v, &bits, sizeof(bits));
  return r;
}
DSCHAT_INLINE void to_array(Vec x, float* out) { store(out, x); }
DSCHAT_INLINE void load_pair(const bf16* p, Vec& lo, Vec& hi) {
  Ints pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  Ints low = pairs << 16, high = pairs & int32_t(0xffff0000u);
  std::memcpy(&lo.v, &low, sizeof(low));
  std::memcpy(&hi.v, &high, sizeof(high));
}
#undef DSCHAT_EACH
#define DSCHAT_ISA_NAME "portable"
#endif

// ------------------------------------------------------------------------------- what follows is ISA-free

DSCHAT_INLINE Vec zero() { return set1(0.0f); }

#if !defined(__AVX512F__)
// The first n (0..16) lanes, as above.
template <typename T> DSCHAT_INLINE Vec load(const T* p, int n) {
  alignas(32) T t[kLanes] = {};
  std::memcpy(t, p, size_t(n) * sizeof(T));
  return load(t);
}
template <typename T> DSCHAT_INLINE void store(T* p, Vec x, int n) {
  alignas(32) T t[kLanes];
  store(t, x);
  std::memcpy(p, t, size_t(n) * sizeof(T));
}
// x 2^n for integral-valued lanes with -126 <= n <= 128, anything below. 2^128 is no float, so the power is split in two.
DSCHAT_INLINE Vec ldexp(Vec x, Vec n) {
  const Vec half = round_even(n * set1(0.5f));
  return x * pow2i(half) * pow2i(n - half);
}
#endif

// The fixed tree of every lane reduction: halves are folded 16 -> 8 -> 4 -> 2 -> 1.
DSCHAT_INLINE float reduce_add(Vec x) {
  float t[kLanes];
  to_array(x, t);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

// Exact whatever the order. Lanes must not be NaN.
DSCHAT_INLINE float reduce_max(Vec x) {
  float t[kLanes];
  to_array(x, t);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = t[i] > t[i + width] ? t[i] : t[i + width];
  return t[0];
}

template <typename T> DSCHAT_INLINE Vec round_to(Vec x);
template <> DSCHAT_INLINE Vec round_to<float>(Vec x) { return x; }
template <> DSCHAT_INLINE Vec round_to<bf16>(Vec x) { return round_bf16(x); }

// e^x. Below -87.3 (where the result would be subnormal) exactly 0, above 88.7 infinity, NaN stays NaN.
// Cody-Waite reduction to |r| <= ln2/2 and the minimax polynomial of Cephes expf; error under 2 ulp. From 88.7 on the
// power of two overflows by itself; the bound of 89 keeps infinity out of the reduction.
DSCHAT_INLINE Vec exp(Vec x) {
  const Vec bounded = min(set1(89.0f), x);
  const Vec n = round_even(bounded * set1(1.44269504088896341f));
  Vec r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return select_lt(x, set1(-87.33654f), zero(), ldexp(p, n));
}

// tanh: odd polynomial (Cephes tanhf) under 0.625, else 1 - 2 / (e^2|x| + 1) with the sign put back.
DSCHAT_INLINE Vec tanh(Vec x) {
  Vec a = abs(x);
  Vec s = x * x;
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, s, set1(2.06390887954e-2f));
  p = fma(p, s, set1(-5.37397155531e-2f));
  p = fma(p, s, set1(1.33314422036e-1f));
  p = fma(p, s, set1(-3.33332819422e-1f));
  Vec small = fma(p * s, x, x);
  Vec e = exp(a + a);
  Vec big = set1(1.0f) - set1(2.0f) / (e + set1(1.0f));
  big = select_lt(x, zero(), zero() - big, big);
  return select_lt(a, set1(0.625f), small, big);
}

// erf: an odd polynomial up to 475/512, beyond it 1 - exp(polynomial) with the sign put back; under 2 ulp. The minimax
// coefficients are Norbert Juffa's (https://stackoverflow.com/a/35148199).
DSCHAT_INLINE Vec erf(Vec x) {
  Vec s = x * x;
  Vec p = set1(-5.96761703e-4f);
  p = fma(p, s, set1(4.99119423e-3f));
  p = fma(p, s, set1(-2.67681349e-2f));
  p = fma(p, s, set1(1.12819925e-1f));
  p = fma(p, s, set1(-3.76125336e-1f));
  p = fma(p, s, set1(1.28379166e-1f));
  Vec small = fma(p, x, x);
  Vec t = min(set1(8.0f), abs(x));  // NaN is kept
  s = t * t;
  Vec q = fma(set1(-1.72853470e-5f), t, set1(3.83197126e-4f));
  q = fma(q, s, fma(set1(-3.88396438e-3f), t, set1(2.42546219e-2f)));
  q = fma(q, t, set1(-1.06777877e-1f));
  q = fma(q, t, set1(-6.34846687e-1f));
  q = fma(q, t, set1(-1.28717512e-1f));
  Vec big = set1(1.0f) - exp(fma(q, t, zero() - t));
  big = select_lt(x, zero(), zero() - big, big);
  return select_lt(t, set1(0.927734375f), small, big);
}

}  // namespace dschat
