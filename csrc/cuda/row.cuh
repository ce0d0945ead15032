// A row that the threads of one block walk over in groups of 8 elements, for the norms.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

// The number of threads depends on the row's length only, and with it the order of every sum over the row.
inline unsigned row_threads(int64_t columns) {
  const int64_t groups = ceil_div(columns, kGroup), threads = ceil_div(groups, kWarp) * kWarp;
  return unsigned(threads > 256 ? 256 : threads);
}

// Bytes of shared memory that keep a row as float32 between the passes over it; 0: too long, it is read again.
inline size_t row_cache_bytes(int64_t columns) {
  const int64_t bytes = ceil_div(columns, kGroup) * kGroup * 4;
  return bytes <= 40 * 1024 ? size_t(bytes) : 0;
}

// The rows h that a norm reads: x, or round(x + residual), which is written to `sum` on the first visit. A thread only
// meets its own groups again, so no barrier is needed between the passes.
template <typename T> struct RowReader {
  const T* x;
  const T* residual;  // null: h = x
  T* sum;
  float* cache;  // shared memory, or null
  int64_t columns;
  int width;

  __device__ __forceinline__ void first(int64_t begin, float h[kGroup]) const {
    const int64_t n = columns - begin;
    load_group(x + begin, n, width, h);
    if (residual) {
      float r[kGroup];
      load_group(residual + begin, n, width, r);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) h[i] = rounded<T>(h[i] + r[i]);
      store_group(sum + begin, n, width, h);
    }
    if (cache) store_as<uint4>(cache + begin, h);
  }

  __device__ __forceinline__ void again(int64_t begin, float h[kGroup]) const {
    if (cache) load_as<uint4>(cache + begin, h);
    else load_group((residual ? sum : x) + begin, columns - begin, width, h);
  }
};

// f(begin) for every group of this thread.
template <typename F> __device__ __forceinline__ void each_group(int64_t columns, F&& f) {
  for (int64_t begin = int64_t(threadIdx.x) * kGroup; begin < columns; begin += int64_t(blockDim.x) * kGroup) f(begin);
}

}  // namespace dschat::cuda
