// Sums over rows, for gradients of vectors: blocks of kRowBlock rows are summed in order, then the blocks in order, so
// the bits depend on the number of rows only.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kRowBlock = 64;
constexpr int kColumnThreads = 128;

// partial[block, column] = sum of term(row, column) over the rows of the block; term is a struct with a device
// operator().
template <typename Term>
__global__ void __launch_bounds__(kColumnThreads)
    partial_sums(Term term, float* partial, int64_t rows, int64_t columns) {
  const int64_t column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t begin = int64_t(blockIdx.x) * kRowBlock, end = min(rows, begin + kRowBlock);
  float sum = 0.0f;
  for (int64_t row = begin; row < end; ++row) sum += term(row, column);
  partial[blockIdx.x * columns + column] = sum;
}

static __global__ void __launch_bounds__(kColumnThreads)
    total_sums(const float* partial, float* total, int64_t blocks, int64_t columns) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * columns + column];
  total[column] = sum;
}

// total[columns]; partial is scratch of ceil(rows / kRowBlock) * columns numbers.
template <typename Term>
void column_sums(Term term, float* partial, float* total, int64_t rows, int64_t columns, void* stream) {
  if (columns == 0) return;
  const int64_t blocks = ceil_div(rows, kRowBlock);
  const unsigned across = unsigned(ceil_div(columns, kColumnThreads));
  if (blocks)
    DSCHAT_LAUNCH(partial_sums<Term>, dim3(unsigned(blocks), across), dim3(kColumnThreads), 0, stream, term, partial, rows,
                  columns);
  DSCHAT_LAUNCH(total_sums, dim3(across), dim3(kColumnThreads), 0, stream, partial, total, blocks, columns);
}

}  // namespace dschat::cuda
