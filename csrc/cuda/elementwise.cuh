// Groups of elements of a matrix (kGroup of its type), one a thread.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kElementThreads = 128;

template <typename T> struct Groups {
  int64_t rows, columns;

  int64_t a_row() const { return ceil_div(columns, kGroup<T>); }
  unsigned blocks() const { return unsigned(ceil_div(rows * a_row(), kElementThreads)); }
};

// This thread's row and first column; false beyond the end.
template <typename T>
__device__ __forceinline__ bool own_group(int64_t rows, int64_t columns, int64_t& row, int64_t& column) {
  const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, a_row = (columns + kGroup<T> - 1) / kGroup<T>;
  row = group / a_row;
  column = group % a_row * kGroup<T>;
  return row < rows;
}

}  // namespace dschat::cuda
