// A linear layer with a low-rank side path, and the fusion of such an update into a weight; see
// dschat_kernels/ops/lora_linear.py. The side path is float32 throughout.
#include "cuda/launch.h"
#include "cuda/linear.cuh"

namespace dschat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kFuseRows = 8;
constexpr int kFuseRanks = kThreads / kFuseRows;  // of `b` in shared memory, one number a thread
constexpr int kFusePitch = kFuseRows + 4;         // 4 rows of 8 ranks lie in 32 banks

// side[row, r] = scale * x[row] . a[r]; a warp takes every fourth r.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    side_inputs(const T* x, int64_t x_stride, const float* a, float* side, int64_t k, int64_t rank, float scale) {
  const int lane = int(threadIdx.x) % kWarp;
  const T* row = x + blockIdx.x * x_stride;
  for (int64_t r = threadIdx.x / kWarp; r < rank; r += kThreads / kWarp) {
    float sum = 0.0f;
    for (int64_t i = lane; i < k; i += kWarp) sum = fmaf(to_float(row[i]), a[r * k + i], sum);
    sum = warp_sum(sum);
    if (lane == 0) side[blockIdx.x * rank + r] = sum * scale;
  }
}

// out[n, k] = round(weight + scale * sum over r of b[n, r] a[r, k]); a block has kFuseRows rows, which read `a` once.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fuse(const T* weight, int64_t row_stride, int64_t column_stride, const float* a, const float* b, T* out, int64_t n,
         int64_t k, int64_t rank, float scale) {
  DSCHAT_SHARED(uint4, memory, kFuseRanks * kFusePitch / 4);
  float* left = reinterpret_cast<float*>(memory);
  const int64_t row0 = int64_t(blockIdx.x) * kFuseRows, column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const int thread = int(threadIdx.x), own_row = thread / 8 % kFuseRows, own_rank = thread / 64 * 8 + thread % 8;
  float sum[kFuseRows] = {};
  for (int64_t begin = 0; begin < rank; begin += kFuseRanks) {
    const bool there = row0 + own_row < n && begin + own_rank < rank;
    left[own_rank * kFusePitch + own_row] = there ? b[(row0 + own_row) * rank + begin + own_rank] : 0.0f;
    __syncthreads();
    if (column < k) {
      const int count = int(min(int64_t(kFuseRanks), rank - begin));
#pragma unroll 4
      for (int r = 0; r < count; ++r) {
        const float right = a[(begin + r) * k + column];
        float factors[kFuseRows];
        load_as<uint4>(left + r * kFusePitch, factors);
#pragma unroll
        for (int i = 0; i < kFuseRows; ++i) sum[i] = fmaf(factors[i], right, sum[i]);
      }
    }
    __syncthreads();
  }
  if (column >= k) return;
#pragma unroll
  for (int i = 0; i < kFuseRows; ++i) {
    const int64_t row = row0 + i;
    if (row < n)
      out[row * k + column] =
          from_float<T>(fmaf(scale, sum[i], to_float(weight[row * row_stride + column * column_stride])));
  }
}

}  // namespace

// side is scratch of rows * rank numbers.
extern "C" int launch_lora_linear(int type, const void* x, int64_t x_stride, int64_t rows, const void* weight,
                                  const float* bias, int64_t n, int64_t k, const float* a, const float* b, int64_t rank,
                                  float scale, float* side, void* y, void* stream) {
  if (rows == 0 || n == 0) return launched();
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    DSCHAT_LAUNCH(side_inputs<T>, dim3(unsigned(rows)), dim3(kThreads), 0, stream, static_cast<const T*>(x), x_stride, a,
                  side, k, rank, scale);
    const Epilogue<T> epilogue{bias, nullptr, 0, y, n, n, false, false, Activation::none, side, b, rank, nullptr};
    launch_tiles(operand<T>(x, x_stride, k), rows, operand<T>(weight, k, k), epilogue, stream);
  }));
}

extern "C" int launch_fuse_lora(int type, const void* weight, int64_t n, int64_t k, int64_t row_stride,
                                int64_t column_stride, const float* a, const float* b, int64_t rank, float scale,
                                void* out, void* stream) {
  if (n * k == 0) return launched();
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    DSCHAT_LAUNCH(fuse<T>, dim3(unsigned(ceil_div(n, kFuseRows)), unsigned(ceil_div(k, kThreads))), dim3(kThreads), 0,
                  stream, static_cast<const T*>(weight), row_stride, column_stride, a, b, static_cast<T*>(out), n, k, rank,
                  scale);
  }));
}

}  // namespace dschat::cuda
