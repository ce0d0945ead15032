#if defined(DSCHAT_NEON) && !defined(__clang__)
// Before it allocates registers GCC would load all of a panel's weights first, and accumulators would go to memory.
#pragma GCC optimize("no-schedule-insns")
#endif
#include "gemm.h"

#include <type_traits>

namespace dschat {
namespace {

// W: dtype of the panels.
template <typename W> struct Job {
  using Unit = typename Product<W>::Unit;
  DType x_type;
  const void* x;
  int64_t x_stride;
  int64_t k;
  const W* w;
  const TileSink& sink;

  int64_t panel_values() const { return panel_depth(w, k) * kPanel; }

  // values: of NP panels from `panel` on, as they are or widened.
  template <int MR, int NP, bool kStream, typename V>
  void tile(const Unit* a, const V* values, int64_t row, int64_t panel, Ahead& ahead) const {
    alignas(64) float sums[MR * NP * kPanel];
    multiply<V, MR, NP, kStream>(a, values, k, sums, ahead);
    sink.write(sums, row, MR, panel, NP);
  }

  // Whole of the work of a single row block: panels come from memory, each once.
  template <int MR> void stream(const Unit* a, int64_t row, int64_t begin, int64_t end) const {
    constexpr int NP = panels_at_once<MR>();
    Ahead none;
    int64_t p = begin;
    for (; p + NP <= end; p += NP) tile<MR, NP, true>(a, w + p * panel_values(), row, p, none);
    for (; p < end; ++p) tile<MR, 1, true>(a, w + p * panel_values(), row, p, none);
  }

  // A panel for several row blocks: int8 ones that dots meet are widened once for all.
  auto shared_panel(int64_t panel) const {
    const W* values = w + panel * panel_values();
    if constexpr (std::is_same_v<W, q8_pair>) {
      bf16* wide = static_cast<bf16*>(scratch(kScratchWiden, size_t(panel_values()) * sizeof(bf16)));
      widen(bytes(values), panel_values(), wide);
      return static_cast<const bf16*>(wide);
    } else {
      return values;
    }
  }

  void copy(int64_t begin, int64_t end, Unit* dst) const {
    const int64_t first = begin * x_stride;
    const int rows = int(end - begin);
    if constexpr (std::is_same_v<Unit, float>) {
      if (x_type == DType::f32) return copy_rows(static_cast<const float*>(x) + first, x_stride, rows, k, dst);
    }
    copy_rows(static_cast<const bf16*>(x) + first, x_stride, rows, k, dst);
  }

  // Rows [r0, r1) times panels [p0, p1) on this thread. Rows are taken in groups whose copy stays in L2; within a
  // group one panel at a time stays there while all row blocks pass over it.
  void run(int64_t r0, int64_t r1, int64_t p0, int64_t p1) const {
    constexpr int64_t kGroupBytes = 512 * 1024;
    const int64_t row_bytes = copied_size<W>(1, k) * int64_t(sizeof(Unit));
    const int64_t blocks_in_group = std::max<int64_t>(1, kGroupBytes / (row_bytes * kMaxRows));
    for (int64_t g0 = r0; g0 < r1; g0 += blocks_in_group * kMaxRows) {
      const int64_t g1 = std::min(r1, g0 + blocks_in_group * kMaxRows);
      const int64_t blocks = (g1 - g0 + kMaxRows - 1) / kMaxRows;
      auto cut = [&](int64_t b) { return g0 + (g1 - g0) * b / blocks; };  // even row blocks
      Unit* a = static_cast<Unit*>(scratch(kScratchGemm, size_t(copied_size<W>(g1 - g0, k)) * sizeof(Unit)));
      auto copy_of = [&](int64_t b) { return a + copied_size<W>(cut(b) - g0, k); };
      for (int64_t b = 0; b < blocks; ++b) copy(cut(b), cut(b + 1), copy_of(b));
      if (blocks == 1) {
        with_rows(int(g1 - g0), [&](auto mr) { stream<mr()>(a, g0, p0, p1); });
        continue;
      }
      for (int64_t p = p0; p < p1; ++p) {
        const char* next = reinterpret_cast<const char*>(w + (p + 1) * panel_values());
        Ahead ahead{next, p + 1 < p1 ? next + panel_values() * int64_t(sizeof(W)) : next};
        const auto* values = shared_panel(p);
        for (int64_t b = 0; b < blocks; ++b)
          with_rows(int(cut(b + 1) - cut(b)),
                    [&](auto mr) { tile<mr(), 1, false>(copy_of(b), values, cut(b), p, ahead); });
      }
    }
  }
};

}  // namespace

void multiply_panels(DType x_type, DType w_type, const void* x, int64_t x_stride, int64_t k, const void* panels,
                     int64_t r0, int64_t r1, int64_t p0, int64_t p1, const TileSink& sink) {
  if (r0 >= r1 || p0 >= p1) return;
  const auto run = [&](auto w) {
    using W = decltype(w);
    Job<W>{x_type, x, x_stride, k, static_cast<const W*>(panels), sink}.run(r0, r1, p0, p1);
  };
  if (w_type == DType::f32) return run(float{});
  if (w_type == DType::i8 && x_type == DType::f32) return run(q8{});
#if defined(DSCHAT_AMX)
  multiply_panels_amx(static_cast<const bf16*>(x), x_stride, k, panels, w_type == DType::i8, r0, r1, p0, p1, sink);
#else
  if (w_type == DType::i8) return run(q8_bf16{});
  run(bf16{});
#endif
}

Share share_of(const Team& team, int64_t rows, int64_t panels) {
  int64_t row_parts = 1, best = INT64_MAX;
  for (int64_t parts = 1; parts <= team.size; ++parts) {
    if (team.size % parts) continue;
    const int64_t columns = team.size / parts;
    const int64_t share = ((rows + parts - 1) / parts) * ((panels + columns - 1) / columns);
    if (share < best) best = share, row_parts = parts;
  }
  const int64_t columns = team.size / row_parts;
  const int64_t i = team.rank / columns, j = team.rank % columns;
  return {rows * i / row_parts, rows * (i + 1) / row_parts, panels * j / columns, panels * (j + 1) / columns};
}

}  // namespace dschat
