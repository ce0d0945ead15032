#include "attention_decode.h"

#include "attention_core.h"

namespace dschat {

int64_t attention_decode_splits(int threads, const AttentionArgs& args, int64_t requested) {
  int64_t tiles = 0, most = 1;
  for_each_tile(args, [&](const AttentionTile& t) {
    ++tiles;
    most = std::max(most, t.chunk_end - t.chunk_begin);
  });
  if (requested > 0) return std::min(requested, most);
  // Four tiles a thread are balanced well enough as they are.
  if (threads == 1 || tiles == 0 || tiles >= 4 * threads) return 1;
  return std::min<int64_t>(most, (4 * threads + tiles - 1) / tiles);
}

int64_t attention_decode_partials(const AttentionArgs& args, int64_t splits) {
  int64_t floats = 0;
  if (splits > 1)
    for_each_tile(args, [&](const AttentionTile& t) {
      floats += (t.end - t.begin) * (t.chunk_end - t.chunk_begin) * partial_size(args.D);
    });
  return floats;
}

void attention_decode(const Team& team, DType dtype, const AttentionArgs& args, int64_t splits, float* partials) {
  if (splits <= 1) return attention(team, dtype, args);
  // A unit of work is one key range of one tile.
  int64_t total = 0, rows = 0;
  for_each_tile(args, [&](const AttentionTile& t) {
    total += splits * tile_cost(t);
    rows += t.end - t.begin;
  });
  int64_t cost = 0;
  float* to = partials;
  for_each_tile(args, [&](const AttentionTile& t) {
    const int64_t chunks = t.chunk_end - t.chunk_begin;
    for (int64_t s = 0; s < splits; ++s, cost += tile_cost(t)) {
      if ((2 * cost + tile_cost(t)) * team.size / (2 * total) != team.rank) continue;
      const int64_t begin = t.chunk_begin + chunks * s / splits, end = t.chunk_begin + chunks * (s + 1) / splits;
      if (begin < end) attention_partials(dtype, args, t, begin, end, to);
    }
    to += (t.end - t.begin) * chunks * partial_size(args.D);
  });
  team.barrier();
  const Range share = team.range(rows);
  int64_t row = 0;
  const float* from = partials;
  for_each_tile(args, [&](const AttentionTile& t) {
    const int64_t begin = std::max(share.begin, row), end = std::min(share.end, row + t.end - t.begin);
    if (begin < end) attention_fold(dtype, args, t, begin - row, end - row, from);
    row += t.end - t.begin;
    from += (t.end - t.begin) * (t.chunk_end - t.chunk_begin) * partial_size(args.D);
  });
}

}  // namespace dschat
