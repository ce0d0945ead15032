#include "rope_append.h"

#include <cstring>

#include "dispatch.h"
#include "quantise.h"

namespace dschat {
namespace {

// One head: dst[0..D) = rotation of src[0..D) by the angles of one position. dst may be src.
template <typename T>
DSCHAT_INLINE void rotate(const T* src, T* dst, const float* cos, const float* sin, int64_t D, int64_t rotary_dim,
                          RopeStyle style, float sign) {
  const int64_t half = rotary_dim / 2;
  if (style == RopeStyle::half) {
    const Vec signs = set1(sign);
    for (int64_t i = 0; i < half; i += kLanes) {
      const int n = int(half - i < kLanes ? half - i : kLanes);
      const Vec x1 = load(src + i, n), x2 = load(src + half + i, n);
      const Vec c = load(cos + i, n), s = load(sin + i, n) * signs;
      store(dst + i, x1 * c - x2 * s, n);
      store(dst + half + i, x2 * c + x1 * s, n);
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float x1 = to_float(src[2 * i]), x2 = to_float(src[2 * i + 1]);
      const float c = cos[i], s = sin[i] * sign;
      dst[2 * i] = from_float<T>(x1 * c - x2 * s);
      dst[2 * i + 1] = from_float<T>(x2 * c + x1 * s);
    }
  }
  if (dst != src && rotary_dim < D) std::memcpy(dst + rotary_dim, src + rotary_dim, size_t(D - rotary_dim) * sizeof(T));
}

// The key of a head into its place of a page.
template <typename T> DSCHAT_INLINE void put_key(const T* key, int64_t D, int64_t place, T* page) {
  T* lane = page + place / kLanes * D * kLanes + place % kLanes;
  for (int64_t d = 0; d < D; ++d) lane[d * kLanes] = key[d];
}
template <typename T> DSCHAT_INLINE void put_value(const T* value, int64_t D, int64_t place, T* page) {
  std::memcpy(page + place * padded_head_dim(D), value, size_t(D) * sizeof(T));
}

// The integers and, into the page, the scale of a row.
template <typename T> DSCHAT_INLINE void quantised(const T* x, int64_t D, int64_t place, int8_t* page, float* row) {
  for (int64_t d = 0; d < D; ++d) row[d] = to_float(x[d]);
  reinterpret_cast<float*>(page)[place] = quantise(row, D);
}
template <typename T> DSCHAT_INLINE void put_key(const T* key, int64_t D, int64_t place, int8_t* page) {
  float row[kMaxHeadDim];
  quantised(key, D, place, page, row);
  int8_t* lane = page + kPageScales<int8_t> + place / kLanes * even(D) * kLanes + place % kLanes * 2;
  for (int64_t d = 0; d < D; ++d) lane[d / 2 * 2 * kLanes + d % 2] = int8_t(row[d]);
}
template <typename T> DSCHAT_INLINE void put_value(const T* value, int64_t D, int64_t place, int8_t* page) {
  float row[kMaxHeadDim];
  quantised(value, D, place, page, row);
  int8_t* to = page + kPageScales<int8_t> + place / 2 * padded_head_dim(D) * 2 + place % 2;
  for (int64_t d = 0; d < D; ++d) to[d * 2] = int8_t(row[d]);
}

// C: of the cache.
template <typename T, typename C> void run(const Team& team, const RopeAppendArgs& a) {
  const T* q = static_cast<const T*>(a.q);
  const T* k = static_cast<const T*>(a.k);
  const T* v = static_cast<const T*>(a.v);
  T* q_out = static_cast<T*>(a.q_out);
  C* k_cache = static_cast<C*>(a.k_cache);
  C* v_cache = static_cast<C*>(a.v_cache);
  const int64_t D = a.D, half = a.rotary_dim / 2;
  // One unit of work is one head of one token: q heads first, then the kv heads (k and v together).
  const int64_t q_heads = q ? a.Hq : 0, heads = q_heads + (k ? a.Hkv : 0);
  if (heads == 0) return;
  const Range share = team.range(a.T * heads);
  for (int64_t unit = share.begin; unit < share.end; ++unit) {
    const int64_t t = unit / heads, h = unit % heads;
    const int64_t position = a.positions[t];
    const float* cos = a.cos ? a.cos + position * half : nullptr;
    const float* sin = a.cos ? a.sin + position * half : nullptr;
    if (h < q_heads) {
      const T* src = q + t * a.q_stride + h * D;
      T* dst = q_out + t * a.q_out_stride + h * D;
      if (cos) rotate(src, dst, cos, sin, D, a.rotary_dim, a.style, 1.0f);
      else if (dst != src) std::memcpy(dst, src, size_t(D) * sizeof(T));
      continue;
    }
    const int64_t head = h - q_heads, place = position % kPage;
    const int64_t page = a.block_table[a.seq_of_token[t] * a.block_table_stride + position / kPage];
    const T* key = k + t * a.k_stride + head * D;
    T rotated[kMaxHeadDim];
    if (cos) {
      rotate(key, rotated, cos, sin, D, a.rotary_dim, a.style, 1.0f);
      key = rotated;
    }
    put_key(key, D, place, k_cache + k_page_offset<C>(page, head, a.Hkv, D));
    put_value(v + t * a.v_stride + head * D, D, place, v_cache + v_page_offset<C>(page, head, a.Hkv, D));
  }
}

}  // namespace

void rope_append(const Team& team, DType dtype, const RopeAppendArgs& args) {
  dispatch(dtype, [&](auto t) {
    using Element = decltype(t);
    args.int8_cache ? run<Element, int8_t>(team, args) : run<Element, Element>(team, args);
  });
}

void rope(const Team& team, DType dtype, const void* x, int64_t x_stride, void* y, int64_t y_stride, const float* cos,
          const float* sin, const int32_t* positions, int64_t T, int64_t H, int64_t D, int64_t rotary_dim,
          RopeStyle style, float sign) {
  dispatch(dtype, [&](auto t) {
    using Element = decltype(t);
    const int64_t half = rotary_dim / 2;
    const Range share = team.range(T * H);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t token = unit / H, h = unit % H, angle = positions[token] * half;
      rotate(static_cast<const Element*>(x) + token * x_stride + h * D,
             static_cast<Element*>(y) + token * y_stride + h * D, cos + angle, sin + angle, D, rotary_dim, style, sign);
    }
  });
}

}  // namespace dschat
