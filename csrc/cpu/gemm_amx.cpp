// bfloat16 products on AMX tiles: multiply_panels for bfloat16 rows and panels where the build has AMX.
//
// Rows are copied to tiles of 16 rows x 32 values, zero-filled past the last row and past k; a panel's tile is 16 pairs of
// k by 16 columns (gemm.h: panel_place). A C tile sums all of k in one order, and each of its rows by itself, so a row's
// bits depend neither on the rows beside it nor on how many there are.
#include "amx.h"

#if defined(DSCHAT_AMX)

#include <algorithm>

#include "gemm.h"

namespace dschat {
namespace {

constexpr int64_t kTileValues = kTileRows * kTileDepth;

struct AmxJob {
  const bf16* x;
  int64_t x_stride;
  int64_t k;
  const void* w;
  bool quantised;
  const TileSink& sink;

  int64_t tiles() const { return (k + kTileDepth - 1) / kTileDepth; }

  // a[tile][16][32] for up to 16 rows.
  void copy_rows(int64_t row, int rows, bf16* a) const {
    for (int64_t k0 = 0; k0 < k; k0 += kTileDepth)
      for (int r = 0; r < kTileRows; ++r, a += kTileDepth) {
        const int64_t len = r < rows ? std::min(kTileDepth, k - k0) : 0;
        if (len) std::memcpy(a, x + (row + r) * x_stride + k0, size_t(len) * sizeof(bf16));
        if (len < kTileDepth) std::memset(a + len, 0, size_t(kTileDepth - len) * sizeof(bf16));
      }
  }

  // Panel p of bfloat16; an int8 one is widened into the given half (0, 1) of this thread's scratch.
  const bf16* panel(int64_t p, int half) const {
    const int64_t values = tiles() * kTileDepth * kPanel;
    if (!quantised) return static_cast<const bf16*>(w) + p * values;
    bf16* wide = static_cast<bf16*>(scratch(kScratchWiden, size_t(2 * values) * sizeof(bf16))) + half * values;
    widen(static_cast<const int8_t*>(w) + p * values, values, wide);
    return wide;
  }

  // Two row tiles (the second may be absent: then it is the first again and its sums are dropped) by one panel.
  // Registers: 0-3 sums, 4-5 rows, 6-7 weights.
  void two_by_one(const bf16* a0, const bf16* a1, const bf16* panel, float* sums) const {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t t = 0; t < tiles(); ++t) {
      const bf16* b = panel + t * kTileDepth * kPanel;
      __builtin_prefetch(b + 8 * kTileDepth * kPanel);
      tile_load<6>(b, 128);
      tile_load<7>(b + 32, 128);
      tile_load<4>(a0 + t * kTileValues, 64);
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      tile_load<5>(a1 + t * kTileValues, 64);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    tile_store<0>(sums, 128);
    tile_store<1>(sums + kLanes, 128);
    tile_store<2>(sums + kTileRows * kPanel, 128);
    tile_store<3>(sums + kTileRows * kPanel + kLanes, 128);
  }

  // One row tile by two panels: two streams of weights, four independent sums. The second may be the first again.
  void one_by_two(const bf16* a, const bf16* panel0, const bf16* panel1, float* sums0, float* sums1) const {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t t = 0; t < tiles(); ++t) {
      const int64_t at = t * kTileDepth * kPanel;
      for (int line = 0; line < 16; ++line) {  // the 1 KiB tile that comes eight tiles later in each stream
        __builtin_prefetch(panel0 + at + 4 * kTileDepth * kPanel + line * 64);
        __builtin_prefetch(panel1 + at + 4 * kTileDepth * kPanel + line * 64);
      }
      tile_load<4>(a + t * kTileValues, 64);
      tile_load<6>(panel0 + at, 128);
      tile_dot<0, 4, 6>();
      tile_load<7>(panel0 + at + 32, 128);
      tile_dot<1, 4, 7>();
      tile_load<5>(panel1 + at, 128);
      tile_dot<2, 4, 5>();
      tile_load<6>(panel1 + at + 32, 128);
      tile_dot<3, 4, 6>();
    }
    tile_store<0>(sums0, 128);
    tile_store<1>(sums0 + kLanes, 128);
    tile_store<2>(sums1, 128);
    tile_store<3>(sums1 + kLanes, 128);
  }

  void run(int64_t r0, int64_t r1, int64_t p0, int64_t p1) const {
    TileScope scope;
    constexpr int64_t kGroup = 256;  // rows whose copies stay in L2
    const int64_t row_tile = tiles() * kTileValues;
    alignas(64) float sums[2][kTileRows * kPanel];
    for (int64_t g0 = r0; g0 < r1; g0 += kGroup) {
      const int64_t g1 = std::min(r1, g0 + kGroup), blocks = (g1 - g0 + kTileRows - 1) / kTileRows;
      bf16* a = static_cast<bf16*>(scratch(kScratchGemm, size_t(blocks * row_tile) * sizeof(bf16)));
      auto rows_of = [&](int64_t b) { return int(std::min<int64_t>(kTileRows, g1 - g0 - b * kTileRows)); };
      for (int64_t b = 0; b < blocks; ++b) copy_rows(g0 + b * kTileRows, rows_of(b), a + b * row_tile);
      if (blocks == 1) {
        for (int64_t p = p0; p < p1; p += 2) {
          const int64_t second = std::min(p + 1, p1 - 1);
          const bf16* first = panel(p, 0);
          one_by_two(a, first, second == p ? first : panel(second, 1), sums[0], sums[1]);
          sink.write(sums[0], g0, rows_of(0), p, 1);
          if (second != p) sink.write(sums[1], g0, rows_of(0), second, 1);
        }
        continue;
      }
      for (int64_t p = p0; p < p1; ++p) {
        const bf16* values = panel(p, 0);
        for (int64_t b = 0; b < blocks; b += 2) {
          const int64_t second = std::min(b + 1, blocks - 1);
          two_by_one(a + b * row_tile, a + second * row_tile, values, sums[0]);
          sink.write(sums[0], g0 + b * kTileRows, rows_of(b), p, 1);
          if (second != b) sink.write(sums[1], g0 + second * kTileRows, rows_of(second), p, 1);
        }
      }
    }
  }
};

}  // namespace

void multiply_panels_amx(const bf16* x, int64_t x_stride, int64_t k, const void* panels, bool quantised, int64_t r0,
                         int64_t r1, int64_t p0, int64_t p1, const TileSink& sink) {
  AmxJob{x, x_stride, k, panels, quantised, sink}.run(r0, r1, p0, p1);
}

}  // namespace dschat

#endif  // DSCHAT_AMX
