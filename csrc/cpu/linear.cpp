#include "linear.h"

#include <type_traits>

#include "dispatch.h"
#include "epilogue.h"
#include "gemm_int8.h"
#include "pack_dense.h"
#include "quantise.h"

namespace dschat {
namespace {

template <typename T>
void linear_typed(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
                  const LinearEpilogue& e, void* y, int64_t y_stride) {
  if (rows == 0 || w.n == 0) return;
  const Share s = share_of(team, rows, w.panels());
  const Output<T> output(w, e, y, y_stride);
  if (w.weights == Weights::int8_dynamic)
    return multiply_panels_int8(dtype, x, x_stride, w.k, static_cast<const q8_quad*>(w.data), s.r0, s.r1, s.p0, s.p1,
                                output);
  const DType w_type = w.weights == Weights::int8 ? DType::i8 : dtype;
  multiply_panels(dtype, w_type, x, x_stride, w.k, w.data, s.r0, s.r1, s.p0, s.p1, output);
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

template <typename D> constexpr bool kQuantised = !(std::is_same_v<D, float> || std::is_same_v<D, bf16>);

// out[0..k) = the row as D stores it; int8 values are integers already.
template <typename D> inline void store_row(const float* row, int64_t k, D* out) {
  if constexpr (kQuantised<D>) {
    for (int64_t i = 0; i < k; ++i)
      if constexpr (std::is_same_v<D, q8_quad>) out[i] = D{uint8_t(int(row[i]) + 128)};
      else out[i] = D{int8_t(row[i])};
  } else {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(out + i, load(row + i));
    if (i < k) store(out + i, load(row + i, int(k - i)), int(k - i));
  }
}

// Row `index` of a part, its updates added, as D; returns the scale of int8 values. wide: k floats of working memory.
template <typename S, typename D> float packed_row(const DenseMatrix& part, int64_t index, float* wide, D* out) {
  if constexpr (std::is_same_v<S, D>) {
    if (part.stride_k == 1 && part.num_updates == 0) {
      std::memcpy(static_cast<void*>(out), static_cast<const S*>(part.data) + index * part.stride_n,
                  size_t(part.k) * sizeof(S));
      return 1.0f;
    }
  }
  fused_row<S>(part, index, wide);
  const float scale = kQuantised<D> ? quantise(wide, part.k) : 1.0f;
  store_row(wide, part.k, out);
  return scale;
}

// The part that column c of panel p belongs to, and its row there; null past the end.
struct PanelColumns {
  const DenseMatrix* parts;
  int num_parts;
  bool gated;

  const DenseMatrix* find(int64_t p, int64_t c, int64_t& index) const {
    if (gated) {
      index = p * kLanes + c % kLanes;
      return index < parts[0].n ? &parts[c < kLanes ? 0 : 1] : nullptr;
    }
    index = p * kPanel + c;
    for (int i = 0; i < num_parts; ++i) {
      if (index < parts[i].n) return &parts[i];
      index -= parts[i].n;
    }
    return nullptr;
  }
};

template <typename S, typename D>
void pack_typed(const Team& team, const DenseMatrix* parts, int num_parts, bool gated, D* panels, float* scales) {
  const int64_t k = parts[0].k;
  int64_t n = gated ? parts[0].n : 0;
  if (!gated)
    for (int i = 0; i < num_parts; ++i) n += parts[i].n;
  const int64_t per_panel = gated ? kLanes : kPanel;
  const PanelColumns columns{parts, num_parts, gated};
  const Range mine = team.range((n + per_panel - 1) / per_panel);
  float* wide = static_cast<float*>(scratch(kScratchPack, size_t(k) * (sizeof(float) + size_t(kPanel) * sizeof(D))));
  D* rows = reinterpret_cast<D*>(wide + k);
  const int64_t depth = panel_depth(panels, k);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    for (int64_t c = 0; c < kPanel; ++c) {
      int64_t index;
      const DenseMatrix* part = columns.find(p, c, index);
      float scale = 0.0f;
      if (part) scale = packed_row<S>(*part, index, wide, rows + c * k);
      else store_row(static_cast<float*>(std::memset(wide, 0, size_t(k) * sizeof(float))), k, rows + c * k);
      if (scales) scales[p * kPanel + c] = scale;
    }
    pack_rows(rows, k, kPanel, k, 0, 1, panels + p * depth * kPanel);
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

// Calls fn(S{}, D{}) for the two dtypes.
template <typename F> void dispatch_pair(DType source, DType target, F&& fn) {
  dispatch(source, [&](auto s) { dispatch(target, [&](auto d) { fn(s, d); }); });
}

}  // namespace

void linear(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
            const LinearEpilogue& e, void* y, int64_t y_stride) {
  if (dtype == DType::f32) linear_typed<float>(team, dtype, x, x_stride, rows, w, e, y, y_stride);
  else linear_typed<bf16>(team, dtype, x, x_stride, rows, w, e, y, y_stride);
}

void pack_linear(const Team& team, DType source, DType target, const DenseMatrix* parts, int num_parts, bool gated,
                 Weights weights, void* panels, float* scales) {
  dispatch_pair(source, target, [&](auto s, auto d) {
    using D = decltype(d);
    using Q = std::conditional_t<std::is_same_v<D, float>, q8, q8_bf16>;
    const auto pack = [&](auto* out) { pack_typed<decltype(s)>(team, parts, num_parts, gated, out, scales); };
    if (weights == Weights::int8_dynamic) pack(static_cast<q8_quad*>(panels));
    else if (weights == Weights::int8) pack(static_cast<Q*>(panels));
    else pack(static_cast<D*>(panels));
  });
}

void fuse_lora(const Team& team, DType source, DType target, const DenseMatrix& w, void* out) {
  dispatch_pair(source, target, [&](auto s, auto d) {
    fuse_typed<decltype(s), decltype(d)>(team, w, static_cast<decltype(d)*>(out));
  });
}

void digest_blocks(const Team& team, const void* data, int64_t bytes, uint64_t* block_digests) {
  // Independent 32-bit lanes; a step is a bijection of h and of word, so one changed word always changes its lane. The
  // rotation carries high bits down: without it two flipped signs would cancel.
  constexpr uint32_t kOdd = 0x9E3779B1u;
  const auto step = [](uint32_t h, uint32_t word) {
    h ^= word;
    return ((h << 13) | (h >> 19)) * kOdd;
  };
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
        for (int i = 0; i < kLanes; ++i) lanes[j][i] = step(lanes[j][i], words[i]);
      }
    for (; at < len; at += 4) {
      uint32_t word = 0;
      std::memcpy(&word, p + at, size_t(std::min<int64_t>(4, len - at)));
      uint32_t& lane = lanes[0][(at / 4) % kLanes];
      lane = step(lane, word);
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
