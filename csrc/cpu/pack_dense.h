// A dense row-major matrix as panels of gemm.h without a change of its values: for products with a matrix that is used
// once or twice and so is not worth a pack of its own. (Packs with updates, parts and dtypes: pack_linear.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace dschat {

// Two depths of bfloat16 lie side by side both in a row of the matrix and in a panel: they move as one word.
template <typename T> constexpr bool kMovesPairs = kDepthPairs && sizeof(T) == 2;

// Panels [p0, p1) of x -> x W^T: output columns are the `count` rows of w [count, depth], `stride` values from row to
// row. Columns past count and depths past `depth` are zero.
template <typename T>
inline void pack_rows(const T* w, int64_t stride, int64_t count, int64_t depth, int64_t p0, int64_t p1, T* panels) {
  constexpr int64_t kBlock = 64;  // depths interleaved at a time: 32 rows x 64 values stay in L1
  const int64_t padded = panel_depth(panels, depth);
  for (int64_t p = p0; p < p1; ++p) {
    T* out = panels + p * padded * kPanel;
    const int64_t columns = std::min(kPanel, count - p * kPanel);
    if (columns < kPanel || padded > depth) std::memset(static_cast<void*>(out), 0, size_t(padded * kPanel) * sizeof(T));
    const T* rows = w + p * kPanel * stride;
    for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
      int64_t k = k0;
      const int64_t k1 = std::min(depth, k0 + kBlock);
      if constexpr (kMovesPairs<T>) {
        for (; k + 1 < k1; k += 2)
          for (int64_t c = 0; c < columns; ++c)
            std::memcpy(static_cast<void*>(out + panel_place(out, k, c)), rows + c * stride + k, 2 * sizeof(T));
      }
      for (; k < k1; ++k)
        for (int64_t c = 0; c < columns; ++c) out[panel_place(out, k, c)] = rows[c * stride + k];
    }
  }
}

// Panels [p0, p1) of x -> x W: output columns are the `width` columns of w [depth, width], depths are its rows.
template <typename T>
inline void pack_columns(const T* w, int64_t stride, int64_t depth, int64_t width, int64_t p0, int64_t p1, T* panels) {
  const int64_t padded = panel_depth(panels, depth);
  for (int64_t p = p0; p < p1; ++p) {
    T* out = panels + p * padded * kPanel;
    const int64_t columns = std::min(kPanel, width - p * kPanel);
    if (columns < kPanel || padded > depth) std::memset(static_cast<void*>(out), 0, size_t(padded * kPanel) * sizeof(T));
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = w + k * stride + p * kPanel;
      T* line = out + panel_place(out, k, 0);
      if (columns == kPanel) {
        const int64_t step = panel_place(out, 0, 1), half = panel_place(out, 0, kLanes);
        for (int64_t c = 0; c < kLanes; ++c) line[c * step] = row[c];
        for (int64_t c = 0; c < kLanes; ++c) line[half + c * step] = row[kLanes + c];
      } else {
        for (int64_t c = 0; c < columns; ++c) out[panel_place(out, k, c)] = row[c];
      }
    }
  }
}

}  // namespace dschat
