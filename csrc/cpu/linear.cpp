#include "linear.h"

#include "gemm.h"

namespace dschat {
namespace {

// Everything an epilogue needs; T is the dtype of x, y and the residual.
template <typename T> struct Output {
  const PackedMatrix& w;
  const LinearEpilogue& e;
  void* y;
  int64_t y_stride;

  // One vector of finished columns [column, column + 16) of a row.
  template <Activation A> DSCHAT_INLINE void finish(int64_t row, int64_t column, Vec v) const {
    const int count = int(std::min<int64_t>(kLanes, w.n - column));
    if (count <= 0) return;
    if (e.float_output) {
      store(static_cast<float*>(y) + row * y_stride + column, v, count);
      return;
    }
    v = round_to<T>(v);
    if (A != Activation::none && !w.gated) v = round_to<T>(activate<A>(v));
    if (e.residual) v = load(static_cast<const T*>(e.residual) + row * e.residual_stride + column, count) + v;
    store(static_cast<T*>(y) + row * y_stride + column, v, count);
  }

  // sums: rows x (panels * 32) accumulators of the tile at (row, panel).
  template <Activation A>
  __attribute__((noinline)) void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
    for (int r = 0; r < rows; ++r) {
      for (int p = 0; p < panels; ++p, sums += kPanel) {
        Vec lo = load(sums), hi = load(sums + kLanes);
        if (w.bias) {
          lo = lo + load(w.bias + (panel + p) * kPanel);
          hi = hi + load(w.bias + (panel + p) * kPanel + kLanes);
        }
        if (w.gated) {
          finish<A>(row + r, (panel + p) * kLanes, activate<A>(round_to<T>(lo)) * round_to<T>(hi));
        } else {
          finish<A>(row + r, (panel + p) * kPanel, lo);
          finish<A>(row + r, (panel + p) * kPanel + kLanes, hi);
        }
      }
    }
  }

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const {
    switch (e.activation) {
      case Activation::none: return write<Activation::none>(sums, row, rows, panel, panels);
      case Activation::gelu: return write<Activation::gelu>(sums, row, rows, panel, panels);
      case Activation::gelu_tanh: return write<Activation::gelu_tanh>(sums, row, rows, panel, panels);
      case Activation::relu: return write<Activation::relu>(sums, row, rows, panel, panels);
      case Activation::silu: return write<Activation::silu>(sums, row, rows, panel, panels);
      case Activation::quick_gelu: return write<Activation::quick_gelu>(sums, row, rows, panel, panels);
    }
  }
};

template <typename T> struct Job {
  const T* x;
  int64_t x_stride;
  int64_t rows;
  const PackedMatrix& w;
  Output<T> out;

  template <int MR, int NP> void tile(const float* a, int64_t row, int64_t panel) const {
    alignas(64) float sums[MR * NP * kPanel];
    multiply<T, MR, NP>(a, static_cast<const T*>(w.data) + panel * w.k * kPanel, w.k, sums);
    out.write(sums, row, MR, panel, NP);
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

  // Rows [r0, r1) times panels [p0, p1) on this thread. Rows are taken in groups whose widened copy stays in L2;
  // within a group a few panels at a time stay in L2 while all row blocks pass over them.
  void run(int64_t r0, int64_t r1, int64_t p0, int64_t p1) const {
    constexpr int64_t kGroupBytes = 512 * 1024;
    const int64_t row_bytes = widened_size(1, w.k) * int64_t(sizeof(float));
    const int64_t blocks_in_group = std::max<int64_t>(1, kGroupBytes / (row_bytes * kMaxRows));
    for (int64_t g0 = r0; g0 < r1; g0 += blocks_in_group * kMaxRows) {
      const int64_t g1 = std::min(r1, g0 + blocks_in_group * kMaxRows);
      const int64_t blocks = (g1 - g0 + kMaxRows - 1) / kMaxRows;
      auto cut = [&](int64_t b) { return g0 + (g1 - g0) * b / blocks; };  // even row blocks
      float* a = static_cast<float*>(scratch(kScratchGemm, size_t(widened_size(g1 - g0, w.k)) * sizeof(float)));
      for (int64_t b = 0; b < blocks; ++b)
        widen_rows(x + cut(b) * x_stride, x_stride, int(cut(b + 1) - cut(b)), w.k, a + widened_size(cut(b) - g0, w.k));
      const int64_t step = std::max<int64_t>(1, 4 / std::max<int64_t>(1, blocks));
      for (int64_t p = p0; p < p1; p += (blocks == 1 ? p1 - p0 : step)) {
        const int64_t pe = blocks == 1 ? p1 : std::min(p1, p + step);
        for (int64_t b = 0; b < blocks; ++b)
          block(int(cut(b + 1) - cut(b)), a + widened_size(cut(b) - g0, w.k), cut(b), p, pe);
      }
    }
  }
};

template <typename T>
void linear_typed(const Team& team, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
                  const LinearEpilogue& e, void* y, int64_t y_stride) {
  if (rows == 0 || w.n == 0) return;
  Job<T> job{static_cast<const T*>(x), x_stride, rows, w, {w, e, y, y_stride}};
  // A grid of row parts by panel parts; the smallest largest share wins, panels are cut first.
  const int64_t panels = w.panels();
  int64_t best_rows = 1, best = INT64_MAX;
  for (int64_t parts = 1; parts <= team.size; ++parts) {
    if (team.size % parts) continue;
    const int64_t columns = team.size / parts;
    const int64_t share = ((rows + parts - 1) / parts) * ((panels + columns - 1) / columns);
    if (share < best) best = share, best_rows = parts;
  }
  const int64_t columns = team.size / best_rows;
  const int64_t i = team.rank / columns, j = team.rank % columns;
  const int64_t r0 = rows * i / best_rows, r1 = rows * (i + 1) / best_rows;
  const int64_t p0 = panels * j / columns, p1 = panels * (j + 1) / columns;
  if (r0 < r1 && p0 < p1) job.run(r0, r1, p0, p1);
}

// ------------------------------------------------------------------------------------------------ packing

template <typename S> DSCHAT_INLINE float element(const DenseMatrix& w, int64_t n, int64_t k) {
  return to_float(static_cast<const S*>(w.data)[n * w.stride_n + k * w.stride_k]);
}

// out[0..k) = W[n] + sum of updates, float32. Ranks are added in order before the scale is applied.
template <typename S> void fused_row(const DenseMatrix& w, int64_t n, float* out) {
  if (w.stride_k == 1) {
    const S* row = static_cast<const S*>(w.data) + n * w.stride_n;
    int64_t k = 0;
    for (; k + kLanes <= w.k; k += kLanes) store(out + k, load(row + k));
    if (k < w.k) store(out + k, load(row + k, int(w.k - k)), int(w.k - k));
  } else {
    for (int64_t k = 0; k < w.k; ++k) out[k] = element<S>(w, n, k);
  }
  for (int u = 0; u < w.num_updates; ++u) {
    const LowRank& d = w.updates[u];
    const float* b = d.b + n * d.rank;
    const Vec scale = set1(d.scale);
    for (int64_t k = 0; k < w.k; k += kLanes) {
      const int count = int(std::min<int64_t>(kLanes, w.k - k));
      Vec sum = zero();
      if (count == kLanes) {
        for (int64_t r = 0; r < d.rank; ++r) sum = fma(set1(b[r]), load(d.a + r * w.k + k), sum);
        store(out + k, fma(scale, sum, load(out + k)));
      } else {
        for (int64_t r = 0; r < d.rank; ++r) sum = fma(set1(b[r]), load(d.a + r * w.k + k, count), sum);
        store(out + k, fma(scale, sum, load(out + k, count)), count);
      }
    }
  }
}

DSCHAT_INLINE int64_t panel_place(float*, int c) { return c; }
DSCHAT_INLINE int64_t panel_place(bf16*, int c) { return c < kLanes ? 2 * c : 2 * (c - kLanes) + 1; }

template <typename S, typename D>
void pack_typed(const Team& team, const DenseMatrix* parts, int num_parts, bool gated, D* panels) {
  const int64_t k = parts[0].k;
  int64_t n = gated ? parts[0].n : 0;
  if (!gated)
    for (int i = 0; i < num_parts; ++i) n += parts[i].n;
  const int64_t per_panel = gated ? kLanes : kPanel;
  const Range mine = team.range((n + per_panel - 1) / per_panel);
  constexpr int64_t kBlock = 64;  // columns of k interleaved at a time: 32 rows x 64 floats stay in L1
  float* rows = static_cast<float*>(scratch(kScratchPack, size_t(kPanel * k) * sizeof(float)));
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    for (int c = 0; c < kPanel; ++c) {
      float* row = rows + c * k;
      const DenseMatrix* part = nullptr;
      int64_t index;
      if (gated) {
        index = p * kLanes + c % kLanes;
        if (index < n) part = &parts[c < kLanes ? 0 : 1];
      } else {
        index = p * kPanel + c;
        for (int i = 0; i < num_parts && index < n; ++i) {
          if (index < parts[i].n) {
            part = &parts[i];
            break;
          }
          index -= parts[i].n;
        }
      }
      if (part) fused_row<S>(*part, index, row);
      else std::fill(row, row + k, 0.0f);
    }
    D* out = panels + p * k * kPanel;
    for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
      const int64_t k1 = std::min(k, k0 + kBlock);
      for (int c = 0; c < kPanel; ++c) {
        const int64_t place = panel_place(out, c);
        for (int64_t i = k0; i < k1; ++i) out[i * kPanel + place] = from_float<D>(rows[c * k + i]);
      }
    }
  }
}

template <typename S, typename D> void fuse_typed(const Team& team, const DenseMatrix& w, D* out) {
  const Range mine = team.range(w.n);
  float* row = static_cast<float*>(scratch(kScratchPack, size_t(w.k) * sizeof(float)));
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    fused_row<S>(w, n, row);
    for (int64_t k = 0; k < w.k; ++k) out[n * w.k + k] = from_float<D>(row[k]);
  }
}

// Calls fn<S, D>() for the two dtypes.
template <typename F> void dispatch_pair(DType source, DType target, F&& fn) {
  if (source == DType::f32 && target == DType::f32) fn(float{}, float{});
  else if (source == DType::f32) fn(float{}, bf16{});
  else if (target == DType::f32) fn(bf16{}, float{});
  else fn(bf16{}, bf16{});
}

}  // namespace

void linear(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
            const LinearEpilogue& e, void* y, int64_t y_stride) {
  if (dtype == DType::f32) linear_typed<float>(team, x, x_stride, rows, w, e, y, y_stride);
  else linear_typed<bf16>(team, x, x_stride, rows, w, e, y, y_stride);
}

void pack_linear(const Team& team, DType source, DType target, const DenseMatrix* parts, int num_parts, bool gated,
                 void* panels) {
  dispatch_pair(source, target, [&](auto s, auto d) {
    pack_typed<decltype(s), decltype(d)>(team, parts, num_parts, gated, static_cast<decltype(d)*>(panels));
  });
}

void fuse_lora(const Team& team, DType source, DType target, const DenseMatrix& w, void* out) {
  dispatch_pair(source, target, [&](auto s, auto d) {
    fuse_typed<decltype(s), decltype(d)>(team, w, static_cast<decltype(d)*>(out));
  });
}

void digest_blocks(const Team& team, const void* data, int64_t bytes, uint64_t* block_digests) {
  // Sixteen independent 32-bit lanes; a step h = (h ^ word) * odd is a bijection of h and of word, so one changed
  // word always changes its lane.
  constexpr uint32_t kOdd = 0x9E3779B1u;
  const Range mine = team.range((bytes + kDigestBlock - 1) / kDigestBlock);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    const char* p = static_cast<const char*>(data) + b * kDigestBlock;
    const int64_t len = std::min(kDigestBlock, bytes - b * kDigestBlock);
    uint32_t lanes[4][kLanes];
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kLanes; ++i) lanes[j][i] = 0x85EBCA6Bu * uint32_t(j * kLanes + i + 1);
    int64_t at = 0;
    for (; at + 256 <= len; at += 256)
      for (int j = 0; j < 4; ++j) {
        uint32_t words[kLanes];
        std::memcpy(words, p + at + j * 64, 64);
        for (int i = 0; i < kLanes; ++i) lanes[j][i] = (lanes[j][i] ^ words[i]) * kOdd;
      }
    for (; at < len; at += 4) {
      uint32_t word = 0;
      std::memcpy(&word, p + at, size_t(std::min<int64_t>(4, len - at)));
      uint32_t& lane = lanes[0][(at / 4) % kLanes];
      lane = (lane ^ word) * kOdd;
    }
    uint64_t h = uint64_t(len) * 0x9E3779B97F4A7C15ull;
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kLanes; ++i) {
        h = (h ^ lanes[j][i]) * 0xD6E8FEB86659FD93ull;
        h ^= h >> 32;
      }
    block_digests[b] = h;
  }
}

}  // namespace dschat
