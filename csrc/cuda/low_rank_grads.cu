// Gradients of the factors of a low-rank side path; see dschat_kernels/ops/lora_linear.py. float32 throughout: x and dy
// are widened as they are read, which is once for eight of the rank in either kernel.
#include "cuda/low_rank_grads.h"

#include "cuda/column_sum.cuh"

namespace dschat::cuda {
namespace {

constexpr int kRanks = 8;         // of the rank at a time
constexpr int kWarps = 4, kWarpRows = 2;
constexpr int kOuterRows = 256;   // rows of a partial sum
constexpr int kOuterThreads = 128;

template <typename T> struct Matrix {
  const T* data;
  int64_t stride, columns;
  int width;  // of accesses

  __device__ __forceinline__ const T* row(int64_t i) const { return data + i * stride; }
};

template <typename T> Matrix<T> matrix(const void* data, int64_t stride, int64_t columns) {
  return {static_cast<const T*>(data), stride, columns, access_width({data}, {stride * int64_t(sizeof(T))})};
}

// out[row, r] = scale * x[row] . m[r]. A warp has kWarpRows rows; a lane adds up every 32nd group of columns.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    project(Matrix<T> x, int64_t rows, Matrix<float> m, int64_t rank, float scale, float* out) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t row0 = (int64_t(blockIdx.x) * kWarps + int64_t(threadIdx.x) / kWarp) * kWarpRows;
  for (int64_t r0 = 0; r0 < rank; r0 += kRanks) {
    float sum[kWarpRows][kRanks] = {};
    for (int64_t begin = int64_t(lane) * kGroup<T>; begin < x.columns; begin += kWarp * kGroup<T>) {
      float left[kWarpRows][kGroup<T>];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i)
        load_group(x.row(row0 + i) + begin, row0 + i < rows ? x.columns - begin : 0, x.width, left[i]);
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        float right[kGroup<T>];
        load_group(m.row(r0 + r) + begin, r0 + r < rank ? m.columns - begin : 0, m.width, right);
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
          for (int c = 0; c < kGroup<T>; ++c) sum[i][r] = fmaf(left[i][c], right[c], sum[i][r]);
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const float total = warp_sum(sum[i][r]) * scale;
        if (lane == r && row0 + i < rows && r0 + r < rank) out[(row0 + i) * rank + r0 + r] = total;
      }
  }
}

// partial[block, r, column] = sum over the block's rows, in order, of inner[row, r] * x[row, column].
template <typename T>
__global__ void __launch_bounds__(kOuterThreads)
    outer(Matrix<T> x, int64_t rows, const float* inner, int64_t rank, float* partial) {
  DSCHAT_SHARED(float, factors, kOuterRows * kRanks);
  const int64_t row0 = int64_t(blockIdx.x) * kOuterRows, r0 = int64_t(blockIdx.z) * kRanks;
  const int64_t column = int64_t(blockIdx.y) * kOuterThreads + threadIdx.x;
  const int count = int(min(int64_t(kOuterRows), rows - row0)), ranks = int(min(int64_t(kRanks), rank - r0));
  for (int i = int(threadIdx.x); i < count * kRanks; i += kOuterThreads)
    factors[i] = i % kRanks < ranks ? inner[(row0 + i / kRanks) * rank + r0 + i % kRanks] : 0.0f;
  __syncthreads();
  if (column >= x.columns) return;
  float sum[kRanks] = {};
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float v = to_float(x.row(row0 + i)[column]);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) sum[r] = fmaf(factors[i * kRanks + r], v, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kRanks; ++r)
    if (r < ranks) partial[(blockIdx.x * rank + r0 + r) * x.columns + column] = sum[r];
}

// out[rank, columns] = sum over rows of inner[row, r] * x[row].
template <typename T>
void outer_sums(const Matrix<T>& x, int64_t rows, const float* inner, int64_t rank, float* partial, float* out,
                void* stream) {
  const int64_t blocks = ceil_div(rows, kOuterRows), sums = rank * x.columns;
  if (sums == 0) return;
  if (blocks)
    DSCHAT_LAUNCH(outer<T>,
                  dim3(unsigned(blocks), unsigned(ceil_div(x.columns, kOuterThreads)), unsigned(ceil_div(rank, kRanks))),
                  dim3(kOuterThreads), 0, stream, x, rows, inner, rank, partial);
  DSCHAT_LAUNCH(total_sums, dim3(unsigned(ceil_div(sums, kColumnThreads))), dim3(kColumnThreads), 0, stream, partial, out,
                blocks, sums);
}

template <typename T>
void inner_products(const Matrix<T>& x, int64_t rows, const float* m, int64_t rank, float scale, float* out,
                    void* stream) {
  if (rows == 0) return;
  DSCHAT_LAUNCH(project<T>, dim3(unsigned(ceil_div(rows, kWarps * kWarpRows))), dim3(kWarps * kWarp), 0, stream, x, rows,
                matrix<float>(m, x.columns, x.columns), rank, scale, out);
}

}  // namespace

// a [rank, k], b_t [rank, n]. inner [2, tokens, rank]: scale dy B, which the gradient of x needs too, and scale x A^T.
// partial is scratch of ceil(tokens / kOuterRows) * rank * max(n, k) numbers.
extern "C" int launch_low_rank_grads(int type, const void* x, int64_t x_stride, const void* dy, int64_t dy_stride,
                                     int64_t tokens, int64_t n, int64_t k, int64_t rank, const float* a,
                                     const float* b_t, float scale, float* inner, float* da, float* db_t,
                                     float* partial, void* stream) {
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    const Matrix<T> of_x = matrix<T>(x, x_stride, k), of_dy = matrix<T>(dy, dy_stride, n);
    float* second = inner + tokens * rank;
    inner_products(of_dy, tokens, b_t, rank, scale, inner, stream);
    inner_products(of_x, tokens, a, rank, scale, second, stream);
    outer_sums(of_x, tokens, inner, rank, partial, da, stream);
    outer_sums(of_dy, tokens, second, rank, partial, db_t, stream);
  }));
}

}  // namespace dschat::cuda
