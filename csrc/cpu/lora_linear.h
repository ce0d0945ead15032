// y = round(x W^T + b + scale (x A^T) B^T): a packed linear with its low-rank side path, nothing written in between.
#pragma once

#include "linear.h"

namespace dschat {

// x [rows, w.k] and y [rows, w.n] of dtype; w packed, not gated. a: packed float32 matrix [rank, w.k]; b: packed float32
// matrix [w.n, rank] (both in linear.h's layout). The side path stays float32: t = x A^T by multiply-adds over k,
// then acc += (scale t)_r B_r over r = 0, 1, ... on the finished base sum.
void lora_linear(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
                 const PackedMatrix& a, const PackedMatrix& b, float scale, void* y, int64_t y_stride);

}  // namespace dschat
