#include "gemm.h"

namespace dschat {
namespace {

// W: dtype of the panels.
template <typename W> struct Job {
  DType x_type;
  const void* x;
  int64_t x_stride;
  int64_t k;
  const W* w;
  const TileSink& sink;

  template <int MR, int NP> void tile(const float* a, int64_t row, int64_t panel) const {
    alignas(64) float sums[MR * NP * kPanel];
    multiply<W, MR, NP>(a, w + panel * k * kPanel, k, sums);
    sink.write(sums, row, MR, panel, NP);
  }

  template <int MR> void panels(const float* a, int64_t row, int64_t begin, int64_t end) const {
    constexpr int NP = panels_at_once<MR>();
    int64_t p = begin;
    for (; p + NP <= end; p += NP) tile<MR, NP>(a, row, p);
    for (; p < end; ++p) tile<MR, 1>(a, row, p);
  }

  // MR rows times the panels [begin, end).
  void block(int mr, const float* a, int64_t row, int64_t begin, int64_t end) const {
    switch (mr) {
#define DSCHAT_CASE(N) \
  case N: \
    if constexpr (N <= kMaxRows) panels<N>(a, row, begin, end); \
    break;
      DSCHAT_CASE(1) DSCHAT_CASE(2) DSCHAT_CASE(3) DSCHAT_CASE(4) DSCHAT_CASE(5) DSCHAT_CASE(6)
      DSCHAT_CASE(7) DSCHAT_CASE(8) DSCHAT_CASE(9) DSCHAT_CASE(10) DSCHAT_CASE(11) DSCHAT_CASE(12)
#undef DSCHAT_CASE
    }
  }

  void widen(int64_t begin, int64_t end, float* dst) const {
    const int64_t first = begin * x_stride;
    const int rows = int(end - begin);
    if (x_type == DType::f32) widen_rows(static_cast<const float*>(x) + first, x_stride, rows, k, dst);
    else widen_rows(static_cast<const bf16*>(x) + first, x_stride, rows, k, dst);
  }

  // Rows [r0, r1) times panels [p0, p1) on this thread. Rows are taken in groups whose widened copy stays in L2;
  // within a group a few panels at a time stay in L2 while all row blocks pass over them.
  void run(int64_t r0, int64_t r1, int64_t p0, int64_t p1) const {
    constexpr int64_t kGroupBytes = 512 * 1024;
    const int64_t row_bytes = widened_size(1, k) * int64_t(sizeof(float));
    const int64_t blocks_in_group = std::max<int64_t>(1, kGroupBytes / (row_bytes * kMaxRows));
    for (int64_t g0 = r0; g0 < r1; g0 += blocks_in_group * kMaxRows) {
      const int64_t g1 = std::min(r1, g0 + blocks_in_group * kMaxRows);
      const int64_t blocks = (g1 - g0 + kMaxRows - 1) / kMaxRows;
      auto cut = [&](int64_t b) { return g0 + (g1 - g0) * b / blocks; };  // even row blocks
      float* a = static_cast<float*>(scratch(kScratchGemm, size_t(widened_size(g1 - g0, k)) * sizeof(float)));
      for (int64_t b = 0; b < blocks; ++b)
        widen(cut(b), cut(b + 1), a + widened_size(cut(b) - g0, k));
      const int64_t step = std::max<int64_t>(1, 4 / std::max<int64_t>(1, blocks));
      for (int64_t p = p0; p < p1; p += (blocks == 1 ? p1 - p0 : step)) {
        const int64_t pe = blocks == 1 ? p1 : std::min(p1, p + step);
        for (int64_t b = 0; b < blocks; ++b)
          block(int(cut(b + 1) - cut(b)), a + widened_size(cut(b) - g0, k), cut(b), p, pe);
      }
    }
  }
};

}  // namespace

void multiply_panels(DType x_type, DType w_type, const void* x, int64_t x_stride, int64_t k, const void* panels,
                     int64_t r0, int64_t r1, int64_t p0, int64_t p1, const TileSink& sink) {
  if (r0 >= r1 || p0 >= p1) return;
  if (w_type == DType::f32)
    Job<float>{x_type, x, x_stride, k, static_cast<const float*>(panels), sink}.run(r0, r1, p0, p1);
  else
#if defined(DSCHAT_AMX)
    multiply_panels_amx(static_cast<const bf16*>(x), x_stride, k, static_cast<const bf16*>(panels), r0, r1, p0, p1, sink);
#else
    Job<bf16>{x_type, x, x_stride, k, static_cast<const bf16*>(panels), sink}.run(r0, r1, p0, p1);
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
