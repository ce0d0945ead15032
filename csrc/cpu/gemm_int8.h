// int8 rows by int8 panels: the matrix product of "int8_dynamic" weights.
#pragma once

#include "gemm.h"

namespace dschat {

// Depths of a row that share a scale: one scale a row would lose several times as much to the few large values that
// activations have.
constexpr int64_t kQuantGroup = 64;

// Weights of panels that int8 rows meet, stored as value + 128: [k / 4][2 halves][16 columns][4 depths], k padded to fours.
struct q8_quad {
  uint8_t value;
};
DSCHAT_INLINE int64_t panel_place(const q8_quad*, int64_t k, int64_t c) {
  return k / 4 * 128 + c / kLanes * 64 + c % kLanes * 4 + k % 4;
}
DSCHAT_INLINE int64_t panel_depth(const q8_quad*, int64_t k) { return (k + 3) / 4 * 4; }

// Rows [r0, r1) of x, quantised group by group as quantise.h says, times the panels [p0, p1), on the calling thread.
// sum over groups g in order of fma(scale_g, sum of the integers' products in g, sum so far): the integer sums are exact,
// so a row's bits depend on nothing but the row.
void multiply_panels_int8(DType x_type, const void* x, int64_t x_stride, int64_t k, const q8_quad* panels, int64_t r0,
                          int64_t r1, int64_t p0, int64_t p1, const TileSink& sink);

}  // namespace dschat
