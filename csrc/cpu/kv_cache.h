// Where a token's key and value lie in one layer of the paged cache (dschat_kernels/cache.py allocates it).
//
//   k  [pages, Hkv, kPage / 16, D, 16]   16 keys side by side: a score vector is one lane per key
//   v  [pages, Hkv, kPage, Dp]           Dp = D rounded up to 16: an output vector is one lane per dimension
//
// The lanes of v from D to Dp are never written after the cache was zeroed.
//
// In a cache of a byte a number (int8_t) a page of a head begins with kPage float32 scales, one a token: value = scale *
// integer, quantised as quantise.h says over the D numbers of a token's key or value. The integers follow in pairs, which
// is how they are multiplied (int16_dot.h); scales and integers of a page lie together, so what copies pages knows
// nothing of them.
//
//   k  [pages, Hkv] of  scales [kPage], [kPage / 16, De / 2, 16, 2]    De = D rounded up to 2
//   v  [pages, Hkv] of  scales [kPage], [kPage / 2, Dp, 2]
#pragma once

#include <cstdint>

#include "simd.h"

namespace dschat {

constexpr int64_t kPage = 64;    // tokens of a page
constexpr int64_t kChunk = 256;  // keys that attention reduces in one go; cut at absolute positions
constexpr int64_t kMaxHeadDim = 256;

inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }
inline int64_t padded_head_dim(int64_t D) { return (D + kLanes - 1) / kLanes * kLanes; }

// Elements in front of a page's numbers.
template <typename C> constexpr int64_t kPageScales = 0;
template <> inline constexpr int64_t kPageScales<int8_t> = kPage * int64_t(sizeof(float));

template <typename C> inline int64_t k_page_offset(int64_t page, int64_t head, int64_t Hkv, int64_t D) {
  return (page * Hkv + head) * (kPageScales<C> + kPage * (kPageScales<C> > 0 ? even(D) : D));
}
template <typename C> inline int64_t v_page_offset(int64_t page, int64_t head, int64_t Hkv, int64_t D) {
  return (page * Hkv + head) * (kPageScales<C> + kPage * padded_head_dim(D));
}

}  // namespace dschat
