#include "gemm_int8.h"

#include "int16_dot.h"
#include "quantise.h"

// Four products of bytes a lane. AVX512-VNNI is asked for by function, not by build: machines of one instruction set level
// may or may not have it.
#if defined(__AVX512F__) && defined(__x86_64__)
#define DSCHAT_QUAD_DOT 1
#define DSCHAT_QUAD_TARGET __attribute__((target("avx512vnni")))
#elif defined(DSCHAT_NEON)
#define DSCHAT_QUAD_DOT 1
#define DSCHAT_QUAD_TARGET
#endif

namespace dschat {
namespace {

// Quantised rows. x86's instruction multiplies unsigned bytes by signed ones: weights are stored as value + 128, and
// sum (w + 128) q = sum w q + 128 sum q, so an accumulator begins at -128 sum q.
struct Rows {
  int8_t* values;    // [rows][stride]
  int32_t* begins;   // [rows][groups]
  float* scales;     // [rows][groups]
  int64_t stride, groups, quads;

  static int64_t row_stride(int64_t k) { return (k + kQuantGroup - 1) / kQuantGroup * kQuantGroup + 64; }
  static int64_t row_bytes(int64_t k) { return row_stride(k) + (k + kQuantGroup - 1) / kQuantGroup * 8; }

  Rows(void* memory, int64_t rows, int64_t k)
      : values(static_cast<int8_t*>(memory)),
        stride(row_stride(k)),
        groups((k + kQuantGroup - 1) / kQuantGroup),
        quads((k + 3) / 4) {
    begins = reinterpret_cast<int32_t*>(values + rows * stride);
    scales = reinterpret_cast<float*>(begins + rows * groups);
  }

  Rows from(int64_t row) const {
    Rows r = *this;
    r.values += row * stride, r.begins += row * groups, r.scales += row * groups;
    return r;
  }

  template <typename T> void fill(const T* x, int64_t x_stride, int64_t rows, int64_t k) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        Vec v[kVecs];
        for (int64_t i = 0, at = g * kQuantGroup; i < kVecs; ++i, at += kLanes)
          v[i] = load(x + r * x_stride + std::min(at, k), int(std::max<int64_t>(0, std::min<int64_t>(kLanes, k - at))));
        int32_t sum = 0;
        scales[r * groups + g] = quantise_group(v, values + r * stride + g * kQuantGroup, sum);
        begins[r * groups + g] = -128 * sum;
      }
  }

 private:
  static constexpr int kVecs = int(kQuantGroup / kLanes);

  // quantise.h's rule for one group; sum: of the values, which are exact in whatever order they are added.
  static float quantise_group(const Vec* v, int8_t* to, int32_t& sum) {
#if defined(__AVX512F__)
    // The same without a store of every step: maxima and integers do not mind the order.
    const __m512 most = _mm512_set1_ps(std::numeric_limits<float>::max());
    Vec largest = abs(v[0]);
    for (int i = 1; i < kVecs; ++i) largest = max(largest, abs(v[i]));
    bool finite = true;
    for (int i = 0; i < kVecs; ++i) finite &= _mm512_cmp_ps_mask(abs(v[i]).v, most, _CMP_LE_OQ) == 0xffff;
    const float scale = _mm512_reduce_max_ps(largest.v) / 127.0f;
    if (finite && scale >= std::numeric_limits<float>::min()) {
      const __m512 divisor = _mm512_set1_ps(scale);
      __m512i total = _mm512_setzero_si512();
      for (int i = 0; i < kVecs; ++i) {
        // |v| / scale is at most 127 (1 + 2^-22): it rounds to 127.
        const __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(v[i].v, divisor));
        total = _mm512_add_epi32(total, q);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * kLanes), _mm512_cvtepi32_epi8(q));
      }
      sum = _mm512_reduce_add_epi32(total);
      return scale;
    }
#endif
    alignas(64) float group[kQuantGroup];
    for (int i = 0; i < kVecs; ++i) store(group + i * kLanes, v[i]);
    const float step = quantise(group, kQuantGroup);
    for (int64_t j = 0; j < kQuantGroup; ++j) {
      to[j] = int8_t(group[j]);
      sum += to[j];
    }
    return step;
  }
};

constexpr int64_t kQuadsInGroup = kQuantGroup / 4;
// Rows at once, and panels at once by MR rows: with more, compilers keep accumulators in memory.
#if defined(DSCHAT_NEON)
constexpr int kInt8Rows = 2;
template <int MR> constexpr int int8_panels_at_once() { return kInt8Rows / MR; }
#else
constexpr int kInt8Rows = 8;
template <int MR> constexpr int int8_panels_at_once() { return MR <= 2 ? 4 : (MR <= 4 ? 2 : 1); }
#endif

// sums[MR][NP * 32] = MR rows times NP panels, whose bytes are fetched ahead where they come from memory (kStream).
template <int MR, int NP, bool kStream>
void multiply_plain(const Rows& rows, const uint8_t* w, int64_t panel, float* sums, Ahead& ahead) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    const int64_t q0 = g * kQuadsInGroup, q1 = std::min(rows.quads, q0 + kQuadsInGroup);
    for (int p = 0; p < NP; ++p)
      for (int r = 0; r < MR; ++r) {
        int32_t acc[kPanel];
        std::fill(acc, acc + kPanel, rows.begins[r * rows.groups + g]);
        for (int64_t q = q0; q < q1; ++q) {
          const uint8_t* at = w + p * panel + q * 128;
          const int8_t* x = rows.values + r * rows.stride + q * 4;
          for (int c = 0; c < kPanel; ++c)
            for (int j = 0; j < 4; ++j) acc[c] += int32_t(at[c * 4 + j]) * int32_t(x[j]);
        }
        float exact[kPanel];  // below 2^24
        for (int c = 0; c < kPanel; ++c) exact[c] = float(acc[c]);
        const Vec scale = set1(rows.scales[r * rows.groups + g]);
        float* sum = sums + (r * NP + p) * kPanel;
        for (int h = 0; h < kPanel; h += kLanes)
          store(sum + h, fma(load(exact + h), scale, g == 0 ? zero() : load(sum + h)));
      }
  }
  (void)ahead;
}

#if defined(DSCHAT_QUAD_DOT)
#if defined(DSCHAT_NEON)
struct Quads {
  int8x16_t v[4];
};
DSCHAT_INLINE Sums first_sums(int32_t) { return no_sums(); }  // weights are signed again: nothing to take away
DSCHAT_INLINE Quads load_quads(const uint8_t* p) {
  Quads w;
  for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(128)));
  return w;
}
DSCHAT_INLINE int8x16_t same_quad(const int8_t* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}
DSCHAT_INLINE Sums add_quads(Sums s, Quads w, int8x16_t x) {
  for (int i = 0; i < 4; ++i) s.v[i] = vdotq_s32(s.v[i], w.v[i], x);
  return s;
}
#else
using Quads = __m512i;
DSCHAT_INLINE Sums first_sums(int32_t begin) { return {_mm512_set1_epi32(begin)}; }
DSCHAT_INLINE Quads load_quads(const uint8_t* p) { return _mm512_loadu_si512(p); }
DSCHAT_INLINE Quads same_quad(const int8_t* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}
DSCHAT_QUAD_TARGET DSCHAT_INLINE Sums add_quads(Sums s, Quads w, Quads x) { return {_mm512_dpbusd_epi32(s.v, w, x)}; }
#endif

// Loops over accumulators are unrolled, so that these stay in registers.
#define DSCHAT_UNROLL _Pragma("GCC unroll 16")
template <int MR, int NP, bool kStream>
DSCHAT_QUAD_TARGET void multiply_quads(const Rows& rows, const uint8_t* w, int64_t panel, float* sums, Ahead& ahead) {
  constexpr int64_t kAhead = 2048;
  const int64_t stride = rows.stride, groups = rows.groups;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t q0 = g * kQuadsInGroup, q1 = std::min(rows.quads, q0 + kQuadsInGroup);
    const int32_t* begins = rows.begins + g;
    Sums acc[MR][NP][2];
    DSCHAT_UNROLL for (int r = 0; r < MR; ++r)
      DSCHAT_UNROLL for (int p = 0; p < NP; ++p) acc[r][p][0] = acc[r][p][1] = first_sums(begins[r * groups]);
    for (int64_t q = q0; q < q1; ++q) {
      if (!kStream) ahead.step();  // half a panel a block: all of it while two or more blocks pass
      const int8_t* x = rows.values + q * 4;
      for (int p = 0; p < NP; ++p) {
        const uint8_t* at = w + p * panel + q * 128;
        if (kStream) __builtin_prefetch(at + kAhead), __builtin_prefetch(at + kAhead + 64);
        const Quads lo = load_quads(at), hi = load_quads(at + 64);
        for (int r = 0; r < MR; ++r) {
          const auto four = same_quad(x + r * stride);
          acc[r][p][0] = add_quads(acc[r][p][0], lo, four);
          acc[r][p][1] = add_quads(acc[r][p][1], hi, four);
        }
      }
    }
    DSCHAT_UNROLL for (int r = 0; r < MR; ++r) {
      const Vec scale = set1(rows.scales[r * groups + g]);
      DSCHAT_UNROLL for (int p = 0; p < NP; ++p)
        DSCHAT_UNROLL for (int h = 0; h < 2; ++h) {
          float* sum = sums + (r * NP + p) * kPanel + h * kLanes;
          store(sum, fma(to_floats(acc[r][p][h]), scale, g == 0 ? zero() : load(sum)));
        }
    }
  }
}
#endif

bool has_quad_dot() {
#if defined(DSCHAT_NEON)
  return true;
#elif defined(DSCHAT_QUAD_DOT)
  static const bool yes = __builtin_cpu_supports("avx512vnni");
  return yes;
#else
  return false;
#endif
}

struct Int8Job {
  const uint8_t* w;
  int64_t panel;  // bytes
  const TileSink& sink;
  bool quad_dot;

  template <int MR, int NP, bool kStream> void tile(const Rows& rows, int64_t row, int64_t p, Ahead& ahead) const {
    alignas(64) float sums[MR * NP * kPanel];
#if defined(DSCHAT_QUAD_DOT)
    if (quad_dot) multiply_quads<MR, NP, kStream>(rows, w + p * panel, panel, sums, ahead);
    else
#endif
      multiply_plain<MR, NP, kStream>(rows, w + p * panel, panel, sums, ahead);
    sink.write(sums, row, MR, p, NP);
  }

  // Whole of the work of a single row block.
  template <int MR> void stream(const Rows& rows, int64_t row, int64_t p0, int64_t p1) const {
    constexpr int NP = int8_panels_at_once<MR>();
    Ahead none;
    int64_t p = p0;
    for (; p + NP <= p1; p += NP) tile<MR, NP, true>(rows, row, p, none);
    for (; p < p1; ++p) tile<MR, 1, true>(rows, row, p, none);
  }
};

}  // namespace

void multiply_panels_int8(DType x_type, const void* x, int64_t x_stride, int64_t k, const q8_quad* panels, int64_t r0,
                          int64_t r1, int64_t p0, int64_t p1, const TileSink& sink) {
  if (r0 >= r1 || p0 >= p1) return;
  const int64_t panel = panel_depth(panels, k) * kPanel;
  const Int8Job job{reinterpret_cast<const uint8_t*>(panels), panel, sink, has_quad_dot()};
  const int64_t limit = std::max<int64_t>(1, 512 * 1024 / (Rows::row_bytes(k) * kInt8Rows)) * kInt8Rows;  // stays in L2
  for (int64_t g0 = r0; g0 < r1; g0 += limit) {
    const int64_t count = std::min(limit, r1 - g0), blocks = (count + kInt8Rows - 1) / kInt8Rows;
    const Rows rows(scratch(kScratchGemm, size_t(count * Rows::row_bytes(k))), count, k);
    if (x_type == DType::f32) rows.fill(static_cast<const float*>(x) + g0 * x_stride, x_stride, count, k);
    else rows.fill(static_cast<const bf16*>(x) + g0 * x_stride, x_stride, count, k);
    if (blocks == 1) {
      with_rows<kInt8Rows>(int(count), [&](auto mr) { job.stream<mr()>(rows, g0, p0, p1); });
      continue;
    }
    const auto cut = [&](int64_t b) { return count * b / blocks; };
    for (int64_t p = p0; p < p1; ++p) {
      const char* next = reinterpret_cast<const char*>(job.w + (p + 1) * panel);
      Ahead ahead{next, p + 1 < p1 ? next + panel : next};
      for (int64_t b = 0; b < blocks; ++b)
        with_rows<kInt8Rows>(int(cut(b + 1) - cut(b)),
                  [&](auto mr) { job.tile<mr(), 1, false>(rows.from(cut(b)), g0 + cut(b), p, ahead); });
    }
  }
}

}  // namespace dschat
