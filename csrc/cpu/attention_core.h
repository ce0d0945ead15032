// What attention and attention_decode share: the cut into tiles and the sums of one chunk of keys (attention.cpp).
//
// The query rows of one sequence and kv head are its tokens times the heads of the group, token after token, so that
// all of them use the same keys; a tile is up to kTileRows consecutive ones. In a tile positions never fall, so
// the keys seen (lo .. hi of Span) move in one direction.
#pragma once

#include <algorithm>

#include "attention.h"
#include "dispatch.h"

namespace dschat {

constexpr int64_t kTileRows = 48;

struct AttentionTile {
  int64_t row;          // sequence
  int64_t head;         // kv head
  int64_t begin, end;   // query rows: token * group + head of the group
  int64_t chunk_begin, chunk_end;  // chunks of keys that any of its rows sees
};

struct Span {
  int64_t lo, hi;
};

// Keys that the query at position p sees.
inline Span visible(const AttentionArgs& a, int64_t p) {
  return {a.window > 0 ? std::max<int64_t>(0, p - a.window + 1) : 0, p + 1};
}

// Position of the first query token of a row.
inline int64_t first_position(const AttentionArgs& a, int64_t row) {
  return a.kv_lens[row] - (a.cu_seqlens[row + 1] - a.cu_seqlens[row]);
}

// A measure of the time a tile takes: reading the keys, and arithmetic on them.
inline int64_t tile_cost(const AttentionTile& t) {
  return 1 + (t.chunk_end - t.chunk_begin) * (6 + t.end - t.begin);
}

// Calls f(tile) for every tile in a fixed order.
template <typename F> inline void for_each_tile(const AttentionArgs& a, F&& f) {
  const int64_t group = a.Hq / a.Hkv;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t query_rows = (a.cu_seqlens[row + 1] - a.cu_seqlens[row]) * group, first = first_position(a, row);
    for (int64_t head = 0; head < a.Hkv; ++head)
      for (int64_t begin = 0; begin < query_rows; begin += kTileRows) {
        const int64_t end = std::min(begin + kTileRows, query_rows);
        const int64_t lo = visible(a, first + begin / group).lo, hi = visible(a, first + (end - 1) / group).hi;
        f(AttentionTile{row, head, begin, end, lo / kChunk, (hi + kChunk - 1) / kChunk});
      }
  }
}

// Sums of one chunk for one query row: maximum, sum of weights and, at kPartialHead, the weighted values [Dp].
constexpr int64_t kPartialHead = 16;
inline int64_t partial_size(int64_t D) { return kPartialHead + padded_head_dim(D); }

// Computes a tile from beginning to end and writes its output. `next`: the tile that this thread does afterwards (its
// first page is prefetched) or null.
void attention_tile(DType dtype, const AttentionArgs& args, const AttentionTile& tile, const AttentionTile* next);

// Writes the sums of chunks [chunk_begin, chunk_end) of the tile: chunk c of its i-th row goes to
// partials + (i * chunks_of_tile + c - tile.chunk_begin) * partial_size(D). A chunk the row does not see gets sum -1.
void attention_partials(DType dtype, const AttentionArgs& args, const AttentionTile& tile, int64_t chunk_begin,
                        int64_t chunk_end, float* partials);

// Folds the chunks of the tile's rows [begin, end) (counted from the tile's first) and writes the output.
void attention_fold(DType dtype, const AttentionArgs& args, const AttentionTile& tile, int64_t begin, int64_t end,
                    const float* partials);

}  // namespace dschat
