// Sums over rows (gradients of norm weights and biases) whose order does not depend on the number of threads: rows are
// cut in blocks of kRowBlock, a block is summed row by row into its own partial row by one thread, and the partial rows
// are added in order of the blocks.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dschat {

constexpr int64_t kRowBlock = 32;

inline int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// partial [blocks, columns] -> out [columns]; the caller has placed a barrier after the partials.
template <typename T>
inline void add_partials(const Team& team, const float* partial, int64_t blocks, int64_t columns, T* out) {
  const Range share = team.range(columns, kLanes);
  for (int64_t j = share.begin; j < share.end; j += kLanes) {
    const int n = int(share.end - j < kLanes ? share.end - j : kLanes);
    Vec sum = zero();
    for (int64_t b = 0; b < blocks; ++b) sum = sum + load(partial + b * columns + j, n);
    store(out + j, sum, n);
  }
}

}  // namespace dschat
