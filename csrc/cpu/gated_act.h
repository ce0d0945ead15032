// The gate of a gated MLP (SwiGLU, GeGLU, ReGLU) and its gradient. SPMD: every thread of the team calls with the same
// arguments; no barrier at the end.
#pragma once

#include "activation.h"
#include "parallel.h"
#include "simd.h"

namespace dschat {

//   y = round(act(gate + gate_bias) * (up + up_bias))      gate, up, y [rows, columns]; biases [columns] float32 or null
//
// gate and up have rows gate_stride and up_stride elements apart: two tensors, or one packed [rows, 2 columns] with
// up = gate + columns. y is contiguous and may be gate or up when these are contiguous too. Nothing is rounded between.
void gated_act(const Team& team, DType type, Activation activation, const void* gate, const void* up,
               const float* gate_bias, const float* up_bias, void* y, int64_t rows, int64_t columns,
               int64_t gate_stride, int64_t up_stride);

//   dgate = round(dy * u * act'(g)),  dup = round(dy * act(g)),  the biases' gradients are the sums over rows before
//   rounding, float32;  g = gate + gate_bias, u = up + up_bias
//
// dgate and dup have rows grad_stride apart. dgate_bias and dup_bias may be null; partial is float32 scratch of
// row_blocks(rows) * columns for each that is not.
void gated_act_backward(const Team& team, DType type, Activation activation, const void* dy, const void* gate,
                        const void* up, const float* gate_bias, const float* up_bias, void* dgate, void* dup,
                        float* dgate_bias, float* dup_bias, float* partial, int64_t rows, int64_t columns,
                        int64_t gate_stride, int64_t up_stride, int64_t grad_stride);

}  // namespace dschat
