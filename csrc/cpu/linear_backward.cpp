#include "linear_backward.h"

#include <algorithm>

#include "dispatch.h"
#include "gemm.h"

namespace dschat {
namespace {

// ------------------------------------------------------------------------------------------------ transposition

// Columns of a panel that belong to consecutive rows of W: places [begin, begin + count) of the panel are the rows
// first, first + 1, ...
struct Run {
  int64_t begin, count, first;
};

template <typename T>
void transpose_typed(const Team& team, const T* panels, int64_t n, int64_t k, bool gated, T* out) {
  const int64_t depth = gated ? 2 * n : n, padded = panel_depth(out, depth), source = panel_depth(panels, k) * kPanel;
  const int64_t per_panel = gated ? kLanes : kPanel, source_panels = (n + per_panel - 1) / per_panel;
  const Range mine = team.range((k + kPanel - 1) / kPanel);
  for (int64_t q = mine.begin; q < mine.end; ++q) {
    T* to = out + q * padded * kPanel;
    const int64_t columns = std::min(kPanel, k - q * kPanel);
    if (columns < kPanel || padded > depth) std::memset(static_cast<void*>(to), 0, size_t(padded * kPanel) * sizeof(T));
    for (int64_t p = 0; p < source_panels; ++p) {
      const T* from = panels + p * source;
      const int64_t count = std::min(per_panel, n - p * per_panel);
      const Run runs[2] = {{0, count, p * per_panel}, {kLanes, count, n + p * per_panel}};
      for (int64_t r = 0; r < (gated ? 2 : 1); ++r)
        for (int64_t c = 0; c < columns; ++c) {
          const T* row = from + panel_place(from, q * kPanel + c, 0);
          for (int64_t i = 0; i < runs[r].count; ++i)
            to[panel_place(to, runs[r].first + i, c)] = row[panel_place(from, 0, runs[r].begin + i)];
        }
    }
  }
}

// ---------------------------------------------------------------------------------------------- low-rank gradients

constexpr int64_t kSumRows = 128;
constexpr int kRowsAtOnce = DSCHAT_VEC_REGISTERS >= 32 ? 2 : 1;

// out[row][R of `rank`] = scale * sum over columns of src[row] * m[r], for `rows` rows.
template <typename T, int R, int kRows>
DSCHAT_INLINE void project_rows(const T* src, int64_t stride, int64_t columns, const float* m, float scale, float* out,
                                int64_t rank) {
  Vec sum[kRows][R];
  for (int i = 0; i < kRows; ++i)
    for (int r = 0; r < R; ++r) sum[i][r] = zero();
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    Vec s[kRows];
    for (int i = 0; i < kRows; ++i) s[i] = load(src + i * stride + j);
    for (int r = 0; r < R; ++r) {
      const Vec v = load(m + r * columns + j);
      for (int i = 0; i < kRows; ++i) sum[i][r] = fma(s[i], v, sum[i][r]);
    }
  }
  if (j < columns) {
    const int count = int(columns - j);
    for (int r = 0; r < R; ++r) {
      const Vec v = load(m + r * columns + j, count);
      for (int i = 0; i < kRows; ++i) sum[i][r] = fma(load(src + i * stride + j, count), v, sum[i][r]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int r = 0; r < R; ++r) out[i * rank + r] = scale * reduce_add(sum[i][r]);
}

template <typename T, int R>
void project(const T* src, int64_t stride, Range rows, int64_t columns, const float* m, float scale, float* out,
             int64_t rank) {
  int64_t row = rows.begin;
  for (; row + kRowsAtOnce <= rows.end; row += kRowsAtOnce)
    project_rows<T, R, kRowsAtOnce>(src + row * stride, stride, columns, m, scale, out + row * rank, rank);
  for (; row < rows.end; ++row)
    project_rows<T, R, 1>(src + row * stride, stride, columns, m, scale, out + row * rank, rank);
}

// sums[R][columns] = sum over rows of inner[row][r] * src[row], for the columns of this thread.
template <typename T, int R>
void outer(const T* src, int64_t stride, int64_t rows, Range mine, int64_t columns, const float* inner, int64_t rank,
           float* sums) {
  for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
    const int64_t r1 = std::min(rows, r0 + kSumRows);
    for (int64_t j = mine.begin; j < mine.end; j += kLanes) {
      const int count = int(std::min<int64_t>(kLanes, mine.end - j));
      Vec sum[R];
      for (int r = 0; r < R; ++r) sum[r] = zero();
      for (int64_t row = r0; row < r1; ++row) {
        const T* at = src + row * stride + j;
        const Vec v = count == kLanes ? load(at) : load(at, count);
        for (int r = 0; r < R; ++r) sum[r] = fma(set1(inner[row * rank + r]), v, sum[r]);
      }
      for (int r = 0; r < R; ++r) {
        float* to = sums + r * columns + j;
        store(to, r0 == 0 ? sum[r] : load(to, count) + sum[r], count);
      }
    }
  }
}

// f(first rank, std::integral_constant<int, R>) over all ranks, eight, four, two or one at a time.
template <typename F> inline void over_ranks(int64_t rank, F&& f) {
  int64_t r = 0;
  for (; r + 8 <= rank; r += 8) f(r, std::integral_constant<int, 8>{});
  if (r + 4 <= rank) f(r, std::integral_constant<int, 4>{}), r += 4;
  if (r + 2 <= rank) f(r, std::integral_constant<int, 2>{}), r += 2;
  if (r < rank) f(r, std::integral_constant<int, 1>{});
}

template <typename T> void grads_typed(const Team& team, const LowRankGrads& g) {
  const T *x = static_cast<const T*>(g.x), *dy = static_cast<const T*>(g.dy);
  float *of_dy = g.inner, *of_x = g.inner + g.T * g.rank;
  const Range rows = team.range(g.T);
  over_ranks(g.rank, [&](int64_t r, auto count) {
    if (g.da) project<T, count()>(dy, g.dy_stride, rows, g.n, g.b_t + r * g.n, g.scale, of_dy + r, g.rank);
    if (g.db_t) project<T, count()>(x, g.x_stride, rows, g.k, g.a + r * g.k, g.scale, of_x + r, g.rank);
  });
  team.barrier();
  over_ranks(g.rank, [&](int64_t r, auto count) {
    if (g.da)
      outer<T, count()>(x, g.x_stride, g.T, team.range(g.k, kLanes), g.k, of_dy + r, g.rank, g.da + r * g.k);
    if (g.db_t)
      outer<T, count()>(dy, g.dy_stride, g.T, team.range(g.n, kLanes), g.n, of_x + r, g.rank, g.db_t + r * g.n);
  });
}

}  // namespace

void transpose_panels(const Team& team, DType dtype, const void* panels, int64_t n, int64_t k, bool gated, void* out) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    transpose_typed(team, static_cast<const T*>(panels), n, k, gated, static_cast<T*>(out));
  });
}

void low_rank_grads(const Team& team, DType dtype, const LowRankGrads& args) {
  dispatch(dtype, [&](auto t) { grads_typed<decltype(t)>(team, args); });
}

}  // namespace dschat
