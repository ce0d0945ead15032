// Where a token's key and value lie in one layer of the paged cache; dschat_kernels/cache.py allocates it.
//
//   k  [pages, Hkv, kPage / 16, D, 16]   16 keys side by side
//   v  [pages, Hkv, kPage, Dp]           Dp = D rounded up to 16; the lanes from D on are never written
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

constexpr int kPage = 64;  // tokens of a page
constexpr int kLanes = 16;
constexpr int kMaxHeadDim = 256;

__host__ __device__ __forceinline__ int64_t padded_head_dim(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

__device__ __forceinline__ int64_t k_page_offset(int64_t page, int64_t head, int64_t heads, int64_t dim) {
  return (page * heads + head) * kPage * dim;
}
__device__ __forceinline__ int64_t v_page_offset(int64_t page, int64_t head, int64_t heads, int64_t dim) {
  return (page * heads + head) * kPage * padded_head_dim(dim);
}

// The position bias of key j for a query at position p: of a negative slope as Falcon rounds it.
__device__ __forceinline__ float alibi(float slope, float scale, int32_t j, int32_t p) {
  if (!(slope < 0.0f)) return slope * float(j - p);
  return scale * rounded<bf16>(-slope * rounded<bf16>(float(j)));
}

}  // namespace dschat::cuda
