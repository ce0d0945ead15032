// Sums over rows (gradients of norm weights and biases) whose order does not depend on the number of threads: rows are
// cut in blocks of kRowBlock, a block is summed row by row into its own partial row by one thread, and the partial rows
// are added in order of the blocks.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dschat {

constexpr int64_t kRowBlock = 32;

inline int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

constexpr int64_t kTileColumns = 512;  // so that one long row is shared by the threads too

// f(row, begin, end) over all tiles of [rows, columns], for work without sums over rows.
template <typename F> inline void for_tiles(const Team& team, int64_t rows, int64_t columns, F&& f) {
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const Range share = team.range(rows * tiles);
  for (int64_t t = share.begin; t < share.end; ++t) {
    const int64_t begin = t % tiles * kTileColumns;
    f(t / tiles, begin, begin + kTileColumns < columns ? begin + kTileColumns : columns);
  }
}

// f(row, block, begin, end) over the same tiles; the rows of a block come in order and on one thread, column tile by
// column tile, so that f can sum them into partial row `block`.
template <typename F> inline void for_row_blocks(const Team& team, int64_t rows, int64_t columns, F&& f) {
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const Range share = team.range(row_blocks(rows) * tiles);
  for (int64_t t = share.begin; t < share.end; ++t) {
    const int64_t block = t / tiles, begin = t % tiles * kTileColumns;
    const int64_t end = begin + kTileColumns < columns ? begin + kTileColumns : columns;
    const int64_t last = (block + 1) * kRowBlock < rows ? (block + 1) * kRowBlock : rows;
    for (int64_t row = block * kRowBlock; row < last; ++row) f(row, block, begin, end);
  }
}

// partial [blocks, columns] -> out [columns]; the caller has placed a barrier after the partials.
inline void add_partials(const Team& team, const float* partial, int64_t blocks, int64_t columns, float* out) {
  const Range share = team.range(columns, kLanes);
  for (int64_t j = share.begin; j < share.end; j += kLanes) {
    const int n = int(share.end - j < kLanes ? share.end - j : kLanes);
    Vec sum = zero();
    for (int64_t b = 0; b < blocks; ++b) sum = sum + load(partial + b * columns + j, n);
    store(out + j, sum, n);
  }
}

}  // namespace dschat
