// Where a token's key and value lie in one layer of the paged cache (dschat_kernels/cache.py allocates it).
//
//   k  [pages, Hkv, kPage / 16, D, 16]   16 keys side by side: a score vector is one lane per key
//   v  [pages, Hkv, kPage, Dp]           Dp = D rounded up to 16: an output vector is one lane per dimension
//
// The lanes of v from D to Dp are never written after the cache was zeroed.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dschat {

constexpr int64_t kPage = 64;    // tokens of a page
constexpr int64_t kChunk = 256;  // keys that attention reduces in one go; cut at absolute positions
constexpr int64_t kMaxHeadDim = 256;

inline int64_t padded_head_dim(int64_t D) { return (D + kLanes - 1) / kLanes * kLanes; }
inline int64_t k_page_offset(int64_t page, int64_t head, int64_t Hkv, int64_t D) {
  return (page * Hkv + head) * kPage * D;
}
inline int64_t v_page_offset(int64_t page, int64_t head, int64_t Hkv, int64_t D) {
  return (page * Hkv + head) * kPage * padded_head_dim(D);
}

}  // namespace dschat
