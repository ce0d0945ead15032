// What the backward of a linear layer on packed weights needs.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"

namespace dschat {

// From the panels of W [n, k] (linear.h) those of W^T: a product with them is dx = dy W. The depths of W^T are W's rows in
// order; of a gated pair the n gate rows, then the n up rows. `out` holds ceil(k / 32) panels of panel_depth(n or 2 n).
void transpose_panels(const Team& team, DType dtype, const void* panels, int64_t n, int64_t k, bool gated, void* out);

// Gradients of the factors of scale * B A in y = x (W + scale * B A)^T, all in float32:
//   da   = scale (dy B)^T x      [rank, k]
//   db_t = scale (x A^T)^T dy    [rank, n], the transposed gradient of B
// Rows are summed in blocks of 128 and the blocks' sums added in order, whatever the number of threads.
struct LowRankGrads {
  const void* x = nullptr;  // [T, k], dtype
  int64_t x_stride = 0;
  const void* dy = nullptr;  // [T, n], dtype
  int64_t dy_stride = 0;
  int64_t T = 0, n = 0, k = 0, rank = 0;
  const float* a = nullptr;    // [rank, k]
  const float* b_t = nullptr;  // [rank, n], B transposed
  float scale = 1.0f;
  float* inner = nullptr;  // 2 * T * rank floats of working memory, shared by the team
  float* da = nullptr;     // null: not wanted
  float* db_t = nullptr;   // null: not wanted
};

// SPMD; one barrier inside, none at the end.
void low_rank_grads(const Team& team, DType dtype, const LowRankGrads& args);

}  // namespace dschat
