// rms_norm and its gradient. SPMD: every thread of the team calls with the same arguments; no barrier at the end.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dschat {

// Where the result is rounded (s = scale, n = h * rstd):
//   llama   y = round(round(n) * s)     gemma   y = round(n * s)
enum class NormRounding : int { llama = 0, gemma = 1 };

//   h    = residual ? round(x + residual) : x          [rows, hidden], written to residual_out when residual is given
//   rstd = 1 / sqrt(mean(h^2) + eps)                   [rows] float32, written when rstd is not null
//   y    = h * rstd * scale                            [rows, hidden]
//
// scale [hidden] is float32 whatever the model's dtype: the caller widens weight, or weight_offset + weight, which is
// exact. x has rows of `hidden` elements x_stride apart; everything else is contiguous. x, residual and residual_out
// are of x_type, y of y_type. y_type may differ from x_type only as (bf16 -> f32, llama): a bfloat16 activation times a
// float32 weight. y may be x, and residual_out may be x or residual.
void rms_norm(const Team& team, DType x_type, DType y_type, const void* x, const void* residual, const float* scale,
              void* y, void* residual_out, float* rstd, int64_t rows, int64_t hidden, int64_t x_stride, float eps,
              NormRounding rounding);

//   g  = dy * scale,  n = h * rstd
//   dx = rstd * (g - n mean(g n)) (+ d_residual_out)                  [rows, hidden] of x_type, rounded once
//   dscale = sum over rows of dy * n  (n rounded first for llama)     [hidden] float32
//
// dy is of y_type; h, dx and d_residual_out (may be null) are of x_type; all contiguous. dscale may be null; if not,
// partial is float32 scratch of row_blocks(rows) * hidden.
void rms_norm_backward(const Team& team, DType x_type, DType y_type, const void* dy, const void* d_residual_out,
                       const void* h, const float* scale, const float* rstd, void* dx, float* dscale, float* partial,
                       int64_t rows, int64_t hidden, NormRounding rounding);

}  // namespace dschat
