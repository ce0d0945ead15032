// Groups of 8 elements of a matrix, one a thread.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kElementThreads = 128;

struct Groups {
  int64_t rows, columns;

  int64_t a_row() const { return ceil_div(columns, kGroup); }
  unsigned blocks() const { return unsigned(ceil_div(rows * a_row(), kElementThreads)); }
};

// This thread's row and first column; false beyond the end.
__device__ __forceinline__ bool own_group(int64_t rows, int64_t columns, int64_t& row, int64_t& column) {
  const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, a_row = (columns + kGroup - 1) / kGroup;
  row = group / a_row;
  column = group % a_row * kGroup;
  return row < rows;
}

// Adds n numbers of a float32 vector, null: nothing, to x.
__device__ __forceinline__ void add_vector(const float* vector, int64_t n, float x[kGroup]) {
  if (!vector) return;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < n) x[i] += vector[i];
}

}  // namespace dschat::cuda
