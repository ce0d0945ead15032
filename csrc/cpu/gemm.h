// The matrix product under linear, lora_linear and token_logprobs: MR rows by NP panels of 32 columns over the whole
// of k in registers, and the loops around it (gemm.cpp). What happens to the sums is the sink's business.
#pragma once

#include <algorithm>

#include <cstdint>

#include "amx.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace dschat {

constexpr int64_t kPanel = 32;  // output columns of a panel

// Where column c of depth k stands in a panel, in values from its beginning, and how many depths a panel holds.
//   float32    [k][32], columns in order
//   bfloat16   [k][16 pairs (c, c + 16)]: one 64-byte load gives two float vectors by a shift and a mask
//   with AMX   [k / 2][2 halves][16 columns][2 depths], k padded with zeros to whole tiles of 32
DSCHAT_INLINE int64_t panel_place(const float*, int64_t k, int64_t c) { return k * kPanel + c; }
DSCHAT_INLINE int64_t panel_depth(const float*, int64_t k) { return k; }
#if defined(DSCHAT_AMX)
DSCHAT_INLINE int64_t panel_place(const bf16*, int64_t k, int64_t c) {
  return k / 2 * 64 + c / kLanes * 32 + c % kLanes * 2 + k % 2;
}
DSCHAT_INLINE int64_t panel_depth(const bf16*, int64_t k) { return (k + kTileDepth - 1) / kTileDepth * kTileDepth; }
#else
DSCHAT_INLINE int64_t panel_place(const bf16*, int64_t k, int64_t c) {
  return k * kPanel + (c < kLanes ? 2 * c : 2 * (c - kLanes) + 1);
}
DSCHAT_INLINE int64_t panel_depth(const bf16*, int64_t k) { return k; }
#endif

// Receives finished sums: rows x (panels * 32) float32 of the tile whose first row and panel are given.
struct TileSink {
  virtual void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const = 0;

 protected:
  ~TileSink() = default;
};

// Rows [r0, r1) of x [rows, k] (row stride in elements) times the panels [p0, p1), on the calling thread. Weight
// panels have x's dtype, or float32.
void multiply_panels(DType x_type, DType w_type, const void* x, int64_t x_stride, int64_t k, const void* panels,
                     int64_t r0, int64_t r1, int64_t p0, int64_t p1, const TileSink& sink);

#if defined(DSCHAT_AMX)
void multiply_panels_amx(const bf16* x, int64_t x_stride, int64_t k, const bf16* panels, int64_t r0, int64_t r1,
                         int64_t p0, int64_t p1, const TileSink& sink);
#endif

// This thread's rectangle of rows x panels: the grid of threads whose largest share is smallest, panels cut first.
struct Share {
  int64_t r0, r1, p0, p1;
};
Share share_of(const Team& team, int64_t rows, int64_t panels);

// Rows are widened to float32 in tiles of kTileK values with a fixed row stride: the stride is a compile-time
// constant (one address register serves all rows) and no multiple of 4096 bytes (rows fall in different sets).
constexpr int64_t kTileK = 128;
constexpr int64_t kTileStride = kTileK + 16;

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

DSCHAT_INLINE void load_panel_row(const float* p, Vec& lo, Vec& hi) {
  lo = load(p);
  hi = load(p + kLanes);
}
DSCHAT_INLINE void load_panel_row(const bf16* p, Vec& lo, Vec& hi) { load_pair(p, lo, hi); }

// Floats that widen_rows writes for `rows` rows.
inline int64_t widened_size(int64_t rows, int64_t k) { return rows * ((k + kTileK - 1) / kTileK) * kTileStride; }

// dst[tile][row][kTileStride] = x[row][tile * kTileK ...]
template <typename T>
inline void widen_rows(const T* x, int64_t stride, int rows, int64_t k, float* dst) {
  for (int64_t k0 = 0; k0 < k; k0 += kTileK) {
    const int64_t len = std::min(kTileK, k - k0);
    for (int r = 0; r < rows; ++r, dst += kTileStride) {
      const T* src = x + r * stride + k0;
      int64_t i = 0;
      for (; i + kLanes <= len; i += kLanes) store(dst + i, load(src + i));
      if (i < len) store(dst + i, load(src + i, int(len - i)), int(len - i));
    }
  }
}

// sums[MR][NP * 32] = MR rows times NP panels over k. a: widen_rows of the rows; w: first panel, k * 32 values each.
// Every element is summed the same way whatever MR and NP: a chain of multiply-adds within each tile of kTileK, the
// tiles' sums added in order. (One chain over all of k would lose several times what PyTorch's blocked sums lose.)
template <typename T, int MR, int NP>
DSCHAT_INLINE void multiply(const float* a, const T* w, int64_t k, float* sums) {
  const int64_t panel = k * kPanel;
  constexpr int64_t kAhead = 2048 / int64_t(sizeof(T));  // prefetch distance in each stream: 2 KiB
  for (int64_t k0 = 0; k0 < k; k0 += kTileK, a += MR * kTileStride) {
    const int64_t len = std::min(kTileK, k - k0);
    Vec acc[MR][NP][2];
    for (int r = 0; r < MR; ++r)
      for (int p = 0; p < NP; ++p) acc[r][p][0] = acc[r][p][1] = zero();
    for (int64_t i = 0; i < len; ++i) {
      const T* row = w + (k0 + i) * kPanel;
      for (int p = 0; p < NP; ++p) {
        __builtin_prefetch(row + p * panel + kAhead);
        Vec lo, hi;
        load_panel_row(row + p * panel, lo, hi);
        for (int r = 0; r < MR; ++r) {
          Vec x = set1(a[r * kTileStride + i]);
          acc[r][p][0] = fma(x, lo, acc[r][p][0]);
          acc[r][p][1] = fma(x, hi, acc[r][p][1]);
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
