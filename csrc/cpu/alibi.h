// Position biases of attention; the formula is in attention.h.
#pragma once

#include "simd.h"

namespace dschat {

DSCHAT_INLINE Vec round_to_bf16(Vec x) {
  bf16 t[kLanes];
  store(t, x);
  return load(t);
}

// The scores x with their biases, of keys at the positions `key`, `distance` behind the query (0 and below).
DSCHAT_INLINE Vec add_alibi(Vec x, float slope, float scale, Vec key, Vec distance) {
  if (!(slope < 0.0f)) return fma(set1(slope), distance, x);
  return fma(set1(scale), round_to_bf16(set1(-slope) * round_to_bf16(key)), x);
}

}  // namespace dschat
