// Bias and activation, and their gradient. SPMD: every thread of the team calls with the same arguments; no barrier at
// the end.
#pragma once

#include "activation.h"
#include "parallel.h"
#include "simd.h"

namespace dschat {

//   y = round(act(x + bias))      x, y [rows, columns];  bias [columns] float32 or null
//
// x has rows x_stride apart, y is contiguous and may be x. The sum is not rounded before the activation.
void bias_act(const Team& team, DType type, Activation activation, const void* x, const float* bias, void* y,
              int64_t rows, int64_t columns, int64_t x_stride);

//   dx = round(dy * act'(x + bias)),   dbias = sum over rows of dx before it is rounded, float32
//
// dy, dx contiguous. dbias may be null; if not, partial is float32 scratch of row_blocks(rows) * columns.
void bias_act_backward(const Team& team, DType type, Activation activation, const void* dy, const void* x,
                       const float* bias, void* dx, float* dbias, float* partial, int64_t rows, int64_t columns,
                       int64_t x_stride);

}  // namespace dschat
