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

// value = `vectors` vectors of row + sum of W's updates of row n, from depth k on, float32. Ranks are added in order
// before the scale is applied. count: lanes of a vector that are there.
template <int vectors, typename X>
DSCHAT_INLINE void fused_vectors(const X* row, const DenseMatrix& w, int64_t n, int64_t k, int count,
                                 Vec (&value)[vectors]) {
  const auto at = [&](const auto* p, int v) {
    return count == kLanes ? load(p + k + v * kLanes) : load(p + k + v * kLanes, count);
  };
  for (int v = 0; v < vectors; ++v) value[v] = at(row, v);
  for (int u = 0; u < w.num_updates; ++u) {
    const LowRank& d = w.updates[u];
    Vec sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = zero();
    for (int64_t r = 0; r < d.rank; ++r) {
      const Vec factor = set1(d.b[n * d.rank + r]);
      for (int v = 0; v < vectors; ++v) sum[v] = fma(factor, at(d.a + r * w.k, v), sum[v]);
    }
    const Vec scale = set1(d.scale);
    for (int v = 0; v < vectors; ++v) value[v] = fma(scale, sum[v], value[v]);
  }
}

// `rows` rows of W + sum of updates from row n on, as D; out [rows, w.k]. A piece of A meets all rows while in L1.
// from: row n of W, or a copy of it in float32; its rows are `stride` values apart.
template <typename X, typename D>
void fused_rows(const X* from, int64_t stride, const DenseMatrix& w, int64_t n, int64_t rows, D* out) {
  constexpr int kVectors = 8;
  int64_t k = 0;
  for (; k + kVectors * kLanes <= w.k; k += kVectors * kLanes)
    for (int64_t i = 0; i < rows; ++i) {
      Vec value[kVectors];
      fused_vectors(from + i * stride, w, n + i, k, kLanes, value);
      for (int v = 0; v < kVectors; ++v) store(out + i * w.k + k + v * kLanes, value[v]);
    }
  for (; k < w.k; k += kLanes)
    for (int64_t i = 0; i < rows; ++i) {
      Vec value[1];
      const int count = int(std::min<int64_t>(kLanes, w.k - k));
      fused_vectors(from + i * stride, w, n + i, k, count, value);
      if (count == kLanes) store(out + i * w.k + k, value[0]);
      else store(out + i * w.k + k, value[0], count);
    }
}

// out[0..k) = W[n] + sum of updates, float32.
template <typename S> void fused_row(const DenseMatrix& w, int64_t n, float* out) {
  if (w.stride_k == 1) return fused_rows(static_cast<const S*>(w.data) + n * w.stride_n, 0, w, n, 1, out);
  for (int64_t k = 0; k < w.k; ++k) out[k] = element<S>(w, n, k);
  fused_rows(static_cast<const float*>(out), 0, w, n, 1, out);
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

// Independent 32-bit lanes; a step is a bijection of h and of word, so one changed word always changes its lane. The
// rotation carries high bits down: without it two flipped signs would cancel.
DSCHAT_INLINE uint32_t digest_step(uint32_t h, uint32_t word) {
  h ^= word;
  return ((h << 13) | (h >> 19)) * 0x9E3779B1u;
}

uint64_t digest_block(const char* p, int64_t len) {
  constexpr int kChains = 4;
  uint32_t lanes[kChains][kLanes];
  for (int j = 0; j < kChains; ++j)
    for (int i = 0; i < kLanes; ++i) lanes[j][i] = 0x85EBCA6Bu * uint32_t(j * kLanes + i + 1);
  constexpr int64_t kChainBytes = sizeof(lanes[0]);
  int64_t at = 0;
  for (; at + int64_t(sizeof(lanes)) <= len; at += int64_t(sizeof(lanes)))
    for (int j = 0; j < kChains; ++j) {
      uint32_t words[kLanes];
      std::memcpy(words, p + at + j * kChainBytes, size_t(kChainBytes));
      for (int i = 0; i < kLanes; ++i) lanes[j][i] = digest_step(lanes[j][i], words[i]);
    }
  for (; at < len; at += 4) {
    uint32_t word = 0;
    std::memcpy(&word, p + at, size_t(std::min<int64_t>(4, len - at)));
    uint32_t& lane = lanes[0][(at / 4) % kLanes];
    lane = digest_step(lane, word);
  }
  for (int j = 1; j < kChains; ++j)
    for (int i = 0; i < kLanes; ++i) lanes[0][i] = digest_step(lanes[0][i], lanes[j][i]);
  uint64_t h = uint64_t(len) * 0x9E3779B97F4A7C15ull;
  for (int i = 0; i < kLanes; ++i) {
    h = (h ^ lanes[0][i]) * 0xD6E8FEB86659FD93ull;
    h ^= h >> 32;
  }
  return h;
}

static_assert(kDigestRows == kLanes);

// The block of a part's digest that begins with row `index`.
void digest_half(const DenseMatrix& part, int64_t index, int64_t bytes, uint64_t* digests) {
  const char* data = static_cast<const char*>(part.data) + index * part.k * bytes;
  digests[index / kDigestRows] = digest_block(data, std::min(kDigestRows, part.n - index) * part.k * bytes);
}

// Half a panel that is 16 rows of one part from `index` on, packed without working memory where nothing is to be
// computed, else through `buffer` [16, k].
template <typename S, typename D>
void pack_half(const DenseMatrix& part, int64_t index, D* buffer, int64_t c0, D* panel) {
  const S* from = static_cast<const S*>(part.data) + index * part.stride_n;
  // The next half is fetched while this one is computed.
  const char* next = reinterpret_cast<const char*>(from + kLanes * part.stride_n);
  for (int64_t i = 0; i < kLanes * part.k * int64_t(sizeof(S)); i += 64) __builtin_prefetch(next + i, 0, 2);
  if constexpr (std::is_same_v<S, D>)
    if (part.num_updates == 0)
      return pack_into_panel<Stores::streaming>(from, part.stride_n, kLanes, part.k, c0, panel);
  fused_rows(from, part.stride_n, part, index, kLanes, buffer);
  pack_into_panel<Stores::streaming>(buffer, part.k, kLanes, part.k, c0, panel);
}

template <typename S, typename D>
void pack_typed(const Team& team, const DenseMatrix* parts, int num_parts, bool gated, D* panels, float* scales,
                uint64_t* const* digests) {
  const int64_t k = parts[0].k;
  int64_t n = gated ? parts[0].n : 0;
  if (!gated)
    for (int i = 0; i < num_parts; ++i) n += parts[i].n;
  const int64_t per_panel = gated ? kLanes : kPanel;
  const PanelColumns columns{parts, num_parts, gated};
  const Range mine = team.range((n + per_panel - 1) / per_panel);
  float* wide = static_cast<float*>(scratch(kScratchPack, size_t(k) * (sizeof(float) + size_t(kLanes) * sizeof(D))));
  D* rows = reinterpret_cast<D*>(wide + k);
  const int64_t depth = panel_depth(panels, k);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    D* panel = panels + p * depth * kPanel;
    if (depth > k) std::memset(static_cast<void*>(panel), 0, size_t(depth * kPanel) * sizeof(D));
    for (int64_t c0 = 0; c0 < kPanel; c0 += kLanes) {
      int64_t index;
      const DenseMatrix* part = columns.find(p, c0, index);
      if (part && digests) digest_half(*part, index, int64_t(sizeof(S)), digests[part - parts]);
      if constexpr (!kQuantised<D>)
        if (part && part->stride_k == 1 && index + kLanes <= part->n) {
          pack_half<S>(*part, index, rows, c0, panel);
          continue;
        }
      for (int64_t c = 0; c < kLanes; ++c) {
        part = columns.find(p, c0 + c, index);
        float scale = 0.0f;
        if (part) scale = packed_row<S>(*part, index, wide, rows + c * k);
        else store_row(static_cast<float*>(std::memset(wide, 0, size_t(k) * sizeof(float))), k, rows + c * k);
        if (scales) scales[p * kPanel + c0 + c] = scale;
      }
      pack_into_panel<Stores::streaming>(rows, k, kLanes, k, c0, panel);
    }
  }
  fence_stores();
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
                 Weights weights, void* panels, float* scales, uint64_t* const* digests) {
  dispatch_pair(source, target, [&](auto s, auto d) {
    using D = decltype(d);
    using Q = std::conditional_t<std::is_same_v<D, float>, q8, q8_bf16>;
    const auto pack = [&](auto* out) { pack_typed<decltype(s)>(team, parts, num_parts, gated, out, scales, digests); };
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

bool digests_while_packing(const DenseMatrix* parts, int num_parts, bool gated) {
  for (int i = 0; i < num_parts; ++i) {
    if (parts[i].stride_k != 1 || parts[i].stride_n != parts[i].k) return false;
    if (!gated && i + 1 < num_parts && parts[i].n % kDigestRows != 0) return false;
  }
  return true;
}

void digest_buffers(const Team& team, const DigestBuffer* buffers, int64_t count, uint64_t* block_digests) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += buffers[i].bytes;
  const Range mine = team.range(total);  // a block is its first byte's thread's
  int64_t first = 0;
  for (int64_t i = 0; i < count; ++i) {
    const DigestBuffer& buffer = buffers[i];
    for (int64_t at = 0; at < buffer.bytes; at += buffer.block, ++block_digests)
      if (first + at >= mine.begin && first + at < mine.end)
        *block_digests = digest_block(static_cast<const char*>(buffer.data) + at,
                                      std::min(buffer.block, buffer.bytes - at));
    first += buffer.bytes;
  }
}

uint64_t finish_digest(const uint64_t* block_digests, int64_t count) {
  uint64_t h = 0;
  for (int64_t i = 0; i < count; ++i) h = (h ^ block_digests[i]) * 0x9E3779B97F4A7C15ull + 1;
  return h;
}

}  // namespace dschat
