// Symmetric int8 of a run of floats: scale = max |x| / 127, value = x / scale rounded to even.
#pragma once

#include <algorithm>

#include "simd.h"

namespace dschat {

// row[0..k) = the values, still floats; returns their scale. |x - scale * value| <= scale / 2. Where the scale is no normal
// number all values are zeros and the scale 0; where an x is NaN or infinite the values are zeros and the scale NaN.
inline float quantise(float* row, int64_t k) {
  Vec largest = zero(), broken = zero();  // broken: NaN where a value is not finite
  for (int64_t i = 0; i < k; i += kLanes) {
    const Vec v = load(row + i, int(std::min<int64_t>(kLanes, k - i)));
    largest = max(abs(v), largest);
    broken = fma(v, zero(), broken);
  }
  const bool finite = reduce_add(broken) == 0.0f;
  const float scale = finite ? reduce_max(largest) / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (!(scale >= std::numeric_limits<float>::min())) {
    std::fill(row, row + k, 0.0f);
    return finite ? 0.0f : scale;
  }
  const Vec divisor = set1(scale), limit = set1(127.0f);
  for (int64_t i = 0; i < k; i += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, k - i));
    store(row + i, max(min(round_even(load(row + i, n) / divisor), limit), zero() - limit), n);
  }
  return scale;
}

}  // namespace dschat
