// The matrix product under linear, lora_linear and token_logprobs: MR rows by NP panels of 32 columns over the whole
// of k in registers, and the loops around it (gemm.cpp). What happens to the sums is the sink's business.
#pragma once

#include <algorithm>

#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "bf16_dot.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace dschat {

constexpr int64_t kPanel = 32;  // output columns of a panel

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Where column c of depth k stands in a panel, in values from its beginning, and how many depths a panel holds.
//   float32           [k][32], columns in order
//   bfloat16          [k][16 pairs (c, c + 16)]: one 64-byte load gives two float vectors by a shift and a mask
//   bfloat16 by dots  [k / 2][2 halves][16 columns][2 depths], k padded with zeros to pairs; with AMX to whole tiles
//   int8              the order of float32, or where rows meet it by dots that of bfloat16 by dots
DSCHAT_INLINE int64_t panel_place(const float*, int64_t k, int64_t c) { return k * kPanel + c; }
DSCHAT_INLINE int64_t panel_depth(const float*, int64_t k) { return k; }
// int8 weights, exact in whatever they are widened to: q8 meets float32 rows, q8_pair dots of bfloat16 pairs.
struct q8 {
  int8_t value;
};
struct q8_pair {
  int8_t value;
};
DSCHAT_INLINE const int8_t* bytes(const q8* p) { return reinterpret_cast<const int8_t*>(p); }
DSCHAT_INLINE const int8_t* bytes(const q8_pair* p) { return reinterpret_cast<const int8_t*>(p); }
DSCHAT_INLINE int64_t panel_place(const q8*, int64_t k, int64_t c) { return k * kPanel + c; }
DSCHAT_INLINE int64_t panel_depth(const q8*, int64_t k) { return k; }
#if defined(DSCHAT_AMX) || defined(DSCHAT_BF16_DOT)
constexpr bool kDepthPairs = true;
#if defined(DSCHAT_AMX)
constexpr int64_t kDepthGrain = kTileDepth;
#else
constexpr int64_t kDepthGrain = 2;
#endif
DSCHAT_INLINE int64_t panel_place(const bf16*, int64_t k, int64_t c) {
  return k / 2 * 64 + c / kLanes * 32 + c % kLanes * 2 + k % 2;
}
DSCHAT_INLINE int64_t panel_depth(const bf16*, int64_t k) { return (k + kDepthGrain - 1) / kDepthGrain * kDepthGrain; }
DSCHAT_INLINE int64_t panel_place(const q8_pair*, int64_t k, int64_t c) {
  return panel_place(static_cast<const bf16*>(nullptr), k, c);
}
DSCHAT_INLINE int64_t panel_depth(const q8_pair*, int64_t k) {
  return panel_depth(static_cast<const bf16*>(nullptr), k);
}
using q8_bf16 = q8_pair;  // int8 weights that bfloat16 rows meet
#else
constexpr bool kDepthPairs = false;
DSCHAT_INLINE int64_t panel_place(const bf16*, int64_t k, int64_t c) {
  return k * kPanel + (c < kLanes ? 2 * c : 2 * (c - kLanes) + 1);
}
DSCHAT_INLINE int64_t panel_depth(const bf16*, int64_t k) { return k; }
using q8_bf16 = q8;
#endif

// `count` int8 values as bfloat16, in their order; a multiple of 32.
DSCHAT_INLINE void widen(const int8_t* from, int64_t count, bf16* to) {
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < count; i += 2 * kLanes)
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(load(from + i + kLanes).v, load(from + i).v));
#else
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
#endif
}

// Receives finished sums: rows x (panels * 32) float32 of the tile whose first row and panel are given.
struct TileSink {
  virtual void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const = 0;

 protected:
  ~TileSink() = default;
};

// Rows [r0, r1) of x [rows, k] (row stride in elements) times the panels [p0, p1), on the calling thread. Weight
// panels have x's dtype, or float32, or are int8 (sums of x times the integers: the sink scales them).
void multiply_panels(DType x_type, DType w_type, const void* x, int64_t x_stride, int64_t k, const void* panels,
                     int64_t r0, int64_t r1, int64_t p0, int64_t p1, const TileSink& sink);

#if defined(DSCHAT_AMX)
// panels: bfloat16, or int8 where `quantised`.
void multiply_panels_amx(const bf16* x, int64_t x_stride, int64_t k, const void* panels, bool quantised, int64_t r0,
                         int64_t r1, int64_t p0, int64_t p1, const TileSink& sink);
#endif

// This thread's rectangle of rows x panels: the grid of threads whose largest share is smallest, panels cut first.
struct Share {
  int64_t r0, r1, p0, p1;
};
Share share_of(const Team& team, int64_t rows, int64_t panels);

// One multiply-add of a row by a panel: how many depths it takes, what it reads of the row, and the product.
// float32 panels, and bfloat16 and int8 ones widened to float32: one depth at a time.
template <typename W> struct Product {
  using Unit = float;
  static constexpr int64_t kDepth = 1;
  struct Weights {
    Vec lo, hi;
  };
  DSCHAT_INLINE static Weights weights(const float* p) { return {load(p), load(p + kLanes)}; }
  DSCHAT_INLINE static Weights weights(const bf16* p) {
    Weights w;
    load_pair(p, w.lo, w.hi);
    return w;
  }
  DSCHAT_INLINE static Weights weights(const q8* p) { return {load(bytes(p)), load(bytes(p) + kLanes)}; }
  DSCHAT_INLINE static Vec row(const Unit* a) { return set1(*a); }
  DSCHAT_INLINE static Vec add(Vec sum, Vec row, Vec weight) { return fma(row, weight, sum); }
};

#if defined(DSCHAT_BF16_DOT)
// bfloat16 by bfloat16, two depths at a time, rows as they are.
template <> struct Product<bf16> {
  using Unit = Bf16Pair;
  static constexpr int64_t kDepth = 2;
  struct Weights {
    Bf16Pairs lo, hi;
  };
  DSCHAT_INLINE static Weights weights(const bf16* p) { return {load_pairs(p), load_pairs(p + kPanel)}; }
  DSCHAT_INLINE static Bf16Pairs row(const Unit* a) { return set1(*a); }
  DSCHAT_INLINE static Vec add(Vec sum, Bf16Pairs row, Bf16Pairs weight) { return dot(sum, row, weight); }
};
template <> struct Product<q8_pair> : Product<bf16> {
  DSCHAT_INLINE static Weights weights(const q8_pair* p) { return {load_pairs(bytes(p)), load_pairs(bytes(p) + kPanel)}; }
};
#endif

// Rows are copied in tiles of kTileK depths with a fixed row stride: the stride is a compile-time constant (one address
// register serves all rows) and no multiple of 4096 bytes (rows fall in different sets).
constexpr int64_t kTileK = 128;
template <typename W> constexpr int64_t kTileUnits = kTileK / Product<W>::kDepth;
template <typename W> constexpr int64_t kTileStride = kTileUnits<W> + 16;

#if DSCHAT_VEC_REGISTERS >= 32
constexpr int kMaxRows = 12;  // 24 accumulators + 2 weight vectors + 1 broadcast
#elif DSCHAT_VEC_REGISTERS >= 8
constexpr int kMaxRows = 3;
#else
constexpr int kMaxRows = 2;
#endif

// Panels worked on at once by MR rows: few rows need several independent chains and memory streams.
template <int MR> constexpr int panels_at_once() {
  constexpr int budget = DSCHAT_VEC_REGISTERS >= 32 ? 24 : (DSCHAT_VEC_REGISTERS >= 8 ? 6 : 4);
  constexpr int fit = budget / (2 * MR);
  return fit < 1 ? 1 : (fit > 4 ? 4 : fit);
}

// f(std::integral_constant<int, rows>) for 1 <= rows <= kMaxRows.
template <int MR = kMaxRows, typename F> DSCHAT_INLINE void with_rows(int rows, F&& f) {
  if constexpr (MR > 1) {
    if (rows < MR) return with_rows<MR - 1>(rows, f);
  }
  f(std::integral_constant<int, MR>{});
}

// Units that copy_rows writes for `rows` rows.
template <typename W> inline int64_t copied_size(int64_t rows, int64_t k) {
  return rows * ((k + kTileK - 1) / kTileK) * kTileStride<W>;
}

// dst[tile][row][kTileStride] = x[row][tile * kTileK ...], widened to float32.
template <typename T> inline void copy_rows(const T* x, int64_t stride, int rows, int64_t k, float* dst) {
  for (int64_t k0 = 0; k0 < k; k0 += kTileK) {
    const int64_t len = std::min(kTileK, k - k0);
    for (int r = 0; r < rows; ++r, dst += kTileStride<float>) {
      const T* src = x + r * stride + k0;
      int64_t i = 0;
      for (; i + kLanes <= len; i += kLanes) store(dst + i, load(src + i));
      if (i < len) store(dst + i, load(src + i, int(len - i)), int(len - i));
    }
  }
}

#if defined(DSCHAT_BF16_DOT)
// The same without widening; an odd last depth is paired with a zero.
inline void copy_rows(const bf16* x, int64_t stride, int rows, int64_t k, Bf16Pair* dst) {
  for (int64_t k0 = 0; k0 < k; k0 += kTileK) {
    const int64_t len = std::min(kTileK, k - k0);
    for (int r = 0; r < rows; ++r, dst += kTileStride<bf16>) {
      std::memcpy(static_cast<void*>(dst), x + r * stride + k0, size_t(len) * sizeof(bf16));
      if (len % 2) dst[len / 2].second = bf16{0};
    }
  }
}
#endif

// Memory that this thread reads soon. Where several row blocks pass over the same panels, only the first meets them in
// memory; fetched a line a step, the next panels come in while all of them compute.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;

  DSCHAT_INLINE void step() {
    if (at < end) __builtin_prefetch(at, 0, 2), at += 64;
  }
};

// sums[MR][NP * 32] = MR rows times NP panels over k. a: copy_rows of the rows; w: first panel. Weights are fetched a
// little ahead of their use where they come from memory (kStream), else `ahead` is fetched.
// Every element is summed the same way whatever MR and NP: a chain of multiply-adds within each tile of kTileK, the
// tiles' sums added in order. (One chain over all of k would lose several times what PyTorch's blocked sums lose.)
template <typename W, int MR, int NP, bool kStream>
DSCHAT_INLINE void multiply(const typename Product<W>::Unit* a, const W* w, int64_t k, float* sums, Ahead& ahead) {
  using P = Product<W>;
  const int64_t panel = panel_depth(w, k) * kPanel;
  constexpr int64_t kStep = P::kDepth * kPanel;           // values of a panel that one product reads
  constexpr int64_t kAhead = 2048 / int64_t(sizeof(W));  // prefetch distance in each stream: 2 KiB
  for (int64_t k0 = 0; k0 < k; k0 += kTileK, a += MR * kTileStride<W>) {
    const int64_t units = (std::min(kTileK, k - k0) + P::kDepth - 1) / P::kDepth;
    Vec acc[MR][NP][2];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) acc[r][p][0] = acc[r][p][1] = zero();
    for (int64_t i = 0; i < units; ++i) {
      const W* at = w + k0 * kPanel + i * kStep;
      if (!kStream)
        for (int64_t line = 0; line < kStep * int64_t(sizeof(W)); line += 128) ahead.step();
      for (int p = 0; p < NP; ++p) {
        if (kStream)
          for (int64_t line = 0; line < kStep; line += 64 / int64_t(sizeof(W)))
            __builtin_prefetch(at + p * panel + kAhead + line);
        const auto weights = P::weights(at + p * panel);
        for (int r = 0; r < MR; ++r) {
          const auto x = P::row(a + r * kTileStride<W> + i);
          acc[r][p][0] = P::add(acc[r][p][0], x, weights.lo);
          acc[r][p][1] = P::add(acc[r][p][1], x, weights.hi);
        }
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) {
        float* sum = sums + (r * NP + p) * kPanel;
        store(sum, k0 == 0 ? acc[r][p][0] : load(sum) + acc[r][p][0]);
        store(sum + kLanes, k0 == 0 ? acc[r][p][1] : load(sum + kLanes) + acc[r][p][1]);
      }
  }
}

}  // namespace dschat
