// The fixed order in which every row statistic is summed: four vectors of lanes take turns, are added pairwise and then
// folded by the tree of reduce_add. It depends on the length of the row only.
#pragma once

#include "simd.h"

namespace dschat {

// Calls term(j, n, sum) for every group of n <= 16 columns that starts at column j; term must add its lanes to sum and
// leave lanes from n on unchanged (partial loads give zeros there).
template <typename F> DSCHAT_INLINE float row_sum(int64_t columns, F&& term) {
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) term(j + k * kLanes, kLanes, sum[k]);
  for (int k = 0; j < columns; j += kLanes, ++k) term(j, int(columns - j < kLanes ? columns - j : kLanes), sum[k]);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Two sums in one pass.
template <typename F> DSCHAT_INLINE void row_sums(int64_t columns, float& first, float& second, F&& term) {
  Vec a[2] = {zero(), zero()}, b[2] = {zero(), zero()};
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    for (int k = 0; k < 2; ++k) term(j + k * kLanes, kLanes, a[k], b[k]);
  for (int k = 0; j < columns; j += kLanes, ++k)
    term(j, int(columns - j < kLanes ? columns - j : kLanes), a[k], b[k]);
  first = reduce_add(a[0] + a[1]);
  second = reduce_add(b[0] + b[1]);
}

// Calls f(j, n) for every group of n <= 16 columns; n is the constant kLanes but for the last.
template <typename F> DSCHAT_INLINE void for_columns(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) f(j, kLanes);
  if (j < end) f(j, int(end - j));
}

// Partial loads cost several instructions on some ISAs; a full group takes the plain one.
template <typename T> DSCHAT_INLINE Vec load_group(const T* p, int n) { return n == kLanes ? load(p) : load(p, n); }
template <typename T> DSCHAT_INLINE void store_group(T* p, Vec v, int n) {
  if (n == kLanes) store(p, v);
  else store(p, v, n);
}

}  // namespace dschat
