// layer_norm and its gradient. SPMD: every thread of the team calls with the same arguments; no barrier at the end.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dschat {

//   h    = residual ? round(x + residual) : x           [rows, hidden], written to residual_out when residual is given
//   mean = sum(h) / hidden                              [rows] float32, written when not null
//   rstd = 1 / sqrt(sum((h - mean)^2) / hidden + eps)   [rows] float32, written when not null
//   y    = round((h - mean) * rstd * weight + bias)     [rows, hidden]
//
// The variance is summed around the mean in a second pass: sum(h^2) / hidden - mean^2 cancels when |mean| >> std.
// weight and bias [hidden] are float32 whatever the model's dtype (the caller widens them, which is exact) and may be
// null. x has rows of `hidden` elements x_stride apart; everything else is contiguous and of the same dtype as x.
// y may be x, and residual_out may be x or residual.
void layer_norm(const Team& team, DType type, const void* x, const void* residual, const float* weight,
                const float* bias, void* y, void* residual_out, float* mean, float* rstd, int64_t rows, int64_t hidden,
                int64_t x_stride, float eps);

//   g  = dy * weight,  n = (h - mean) * rstd
//   dx = rstd * (g - mean(g) - n mean(g n)) (+ d_residual_out)      [rows, hidden], rounded once
//   dweight = sum over rows of dy * n,  dbias = sum over rows of dy  [hidden] float32
//
// All contiguous; d_residual_out, weight, dweight and dbias may be null. partial is float32 scratch of
// row_blocks(rows) * hidden for each of dweight and dbias that is asked for.
void layer_norm_backward(const Team& team, DType type, const void* dy, const void* d_residual_out, const void* h,
                         const float* weight, const float* mean, const float* rstd, void* dx, float* dweight,
                         float* dbias, float* partial, int64_t rows, int64_t hidden);

}  // namespace dschat
