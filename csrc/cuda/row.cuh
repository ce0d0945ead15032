// A row that the threads of one block walk over in groups (kGroup of its type), for the norms.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

// The number of threads depends on the row's length and type only, and with it the order of every sum over the row.
template <typename T> unsigned row_threads(int64_t columns) {
  const int64_t groups = ceil_div(columns, kGroup<T>), threads = ceil_div(groups, kWarp) * kWarp;
  return unsigned(threads > 256 ? 256 : threads);
}

// Bytes of shared memory that keep a row between the passes over it; 0: too long, it is read again.
template <typename T> size_t row_cache_bytes(int64_t columns) {
  const int64_t bytes = ceil_div(columns, kGroup<T>) * 16;
  return bytes <= 40 * 1024 ? size_t(bytes) : 0;
}

// The rows h that a norm reads: x, or round(x + residual), which is written to `sum` on the first visit. A thread only
// meets its own groups again, so no barrier is needed between the passes.
template <typename T> struct RowReader {
  const T* x;
  const T* residual;  // null: h = x
  T* sum;
  T* cache;  // shared memory of row_cache_bytes, or null
  int64_t columns;
  int width;

  __device__ __forceinline__ void first(int64_t begin, float (&h)[kGroup<T>]) const {
    const int64_t n = columns - begin;
    load_group(x + begin, n, width, h);
    if (residual) {
      float r[kGroup<T>];
      load_group(residual + begin, n, width, r);
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) h[i] = rounded<T>(h[i] + r[i]);
      store_group(sum + begin, n, width, h);
    }
    if (cache) store_group(cache + begin, kGroup<T>, 16, h);  // h is of values of T: nothing is rounded
  }

  __device__ __forceinline__ void again(int64_t begin, float (&h)[kGroup<T>]) const {
    if (cache) load_group(cache + begin, kGroup<T>, 16, h);
    else load_group((residual ? sum : x) + begin, columns - begin, width, h);
  }
};

// f(begin) for every group of this thread.
template <typename T, typename F> __device__ __forceinline__ void each_group(int64_t columns, F&& f) {
  for (int64_t begin = int64_t(threadIdx.x) * kGroup<T>; begin < columns; begin += int64_t(blockDim.x) * kGroup<T>)
    f(begin);
}

}  // namespace dschat::cuda
