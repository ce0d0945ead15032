#include "attention_backward.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "alibi.h"
#include "dispatch.h"
#include "scratch.h"

namespace dschat {
namespace {

#if DSCHAT_VEC_REGISTERS >= 32
constexpr int kMaxRows = 6, kMaxVecs = 4;
#elif DSCHAT_VEC_REGISTERS >= 8
constexpr int kMaxRows = 2, kMaxVecs = 2;
#else
constexpr int kMaxRows = 1, kMaxVecs = 2;
#endif
constexpr int64_t kTile = 48;  // query rows whose scores against all keys are held at once

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// c[r][n * 16 + lane] (+)= sum over j of a[r * row + j * column] * b[j * ldb + n * 16 + lane]
struct Product {
  const float* a;
  int64_t row, column;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t depth;
  bool add;

  template <int MR, int NV> void tile(int64_t r0, int64_t n0) const {
    const float* x = a + r0 * row;
    const float* y = b + n0;
    float* z = c + r0 * ldc + n0;
    Vec acc[MR][NV];
    for (int r = 0; r < MR; ++r)
      for (int n = 0; n < NV; ++n) acc[r][n] = add ? load(z + r * ldc + n * kLanes) : zero();
    for (int64_t j = 0; j < depth; ++j) {
      Vec v[NV];
      for (int n = 0; n < NV; ++n) v[n] = load(y + j * ldb + n * kLanes);
      for (int r = 0; r < MR; ++r) {
        const Vec s = set1(x[r * row + j * column]);
        for (int n = 0; n < NV; ++n) acc[r][n] = fma(s, v[n], acc[r][n]);
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int n = 0; n < NV; ++n) store(z + r * ldc + n * kLanes, acc[r][n]);
  }

  template <int MR> void strip(int64_t r0, int64_t vecs) const {
    int64_t n = 0;
    for (; n + kMaxVecs <= vecs; n += kMaxVecs) tile<MR, kMaxVecs>(r0, n * kLanes);
    for (; n < vecs; ++n) tile<MR, 1>(r0, n * kLanes);
  }

  // rows x (vecs * 16) results.
  void run(int64_t rows, int64_t vecs) const {
    int64_t r = 0;
    for (; r + kMaxRows <= rows; r += kMaxRows) strip<kMaxRows>(r, vecs);
    for (; r < rows; ++r) strip<1>(r, vecs);
  }
};

// Rows of one head as float32 [n][Dp], zero beyond D; n tokens, each `stride` elements apart.
template <typename T> void widen(const T* src, int64_t stride, int64_t n, int64_t D, int64_t Dp, float* dst) {
  for (int64_t i = 0; i < n; ++i, src += stride, dst += Dp) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store(dst + d, load(src + d));
    if (d < D) store(dst + d, load(src + d, int(D - d)));
  }
}

template <typename T> void narrow(const float* src, int64_t n, int64_t D, int64_t Dp, T* dst, int64_t stride) {
  for (int64_t i = 0; i < n; ++i, src += Dp, dst += stride) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store(dst + d, load(src + d));
    if (d < D) store(dst + d, load(src + d), int(D - d));
  }
}

// dst[d][n] = src[n][d]; columns beyond n are zero.
void transpose(const float* src, int64_t n, int64_t D, int64_t Dp, float* dst, int64_t ld) {
  for (int64_t i0 = 0; i0 < ld; i0 += kLanes)
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = i0; i < i0 + kLanes; ++i) dst[d * ld + i] = i < n ? src[i * Dp + d] : 0.0f;
}

template <typename T> void one_head(const AttentionBackwardArgs& a, int64_t row, int64_t head) {
  const int64_t first = a.cu_seqlens[row], L = a.cu_seqlens[row + 1] - first;
  const int64_t group = a.Hq / a.Hkv, D = a.D, Dp = padded(D), Lp = padded(L), ld = Lp + kLanes;
  const int64_t floats = 5 * Lp * Dp + 3 * kTile * Dp + (a.softcap > 0.0f ? 3 : 2) * kTile * ld;
  float* memory = static_cast<float*>(scratch(kScratchAttention, size_t(floats) * sizeof(float)));
  float* k = memory;             // [L][Dp]
  float* k_t = k + Lp * Dp;      // [D][Lp]
  float* v_t = k_t + Lp * Dp;    // [D][Lp]
  float* dk = v_t + Lp * Dp;     // [L][Dp]
  float* dv = dk + Lp * Dp;      // [L][Dp]
  float* q = dv + Lp * Dp;       // [kTile][Dp]
  float* g = q + kTile * Dp;     // [kTile][Dp], gradient of the output
  float* dq = g + kTile * Dp;    // [kTile][Dp]
  float* p = dq + kTile * Dp;    // [kTile][ld], scores, then weights
  float* ds = p + kTile * ld;    // [kTile][ld], dP, then ds
  float* slope = ds + kTile * ld;  // [kTile][ld], 1 - tanh^2

  widen(static_cast<const T*>(a.v) + first * a.v_stride + head * D, a.v_stride, L, D, Dp, k);
  transpose(k, L, D, Dp, v_t, Lp);
  widen(static_cast<const T*>(a.k) + first * a.k_stride + head * D, a.k_stride, L, D, Dp, k);
  transpose(k, L, D, Dp, k_t, Lp);
  std::memset(dk, 0, size_t(2 * Lp * Dp) * sizeof(float));

  float numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = float(i);
  const Vec lanes = load(numbers), minus_inf = set1(-std::numeric_limits<float>::infinity());
  const Vec scale = set1(a.scale), cap = set1(a.softcap), one = set1(1.0f);

  // Query rows: token * group + head of the group.
  for (int64_t begin = 0; begin < L * group; begin += kTile) {
    const int64_t n = std::min(kTile, L * group - begin);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = first + (begin + i) / group, h = head * group + (begin + i) % group;
      widen(static_cast<const T*>(a.q) + t * a.q_stride + h * D, 0, 1, D, Dp, q + i * Dp);
      widen(static_cast<const T*>(a.dout) + t * a.dout_stride + h * D, 0, 1, D, Dp, g + i * Dp);
    }
    // Keys that any of the rows sees, in whole vectors: [from, from + vecs * 16).
    const int64_t first_token = begin / group, last_token = (begin + n - 1) / group;
    const int64_t seen = a.window > 0 ? std::max<int64_t>(0, first_token - a.window + 1) : 0;
    const int64_t from = seen / kLanes * kLanes, vecs = (last_token + kLanes - from) / kLanes;
    Product{q, Dp, 1, k_t + from, Lp, p, ld, D, false}.run(n, vecs);
    Product{g, Dp, 1, v_t + from, Lp, ds, ld, D, false}.run(n, vecs);

    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = (begin + i) / group;
      const int64_t lo = a.window > 0 ? std::max<int64_t>(0, t - a.window + 1) : 0;
      const Vec low = set1(float(lo - from)), high = set1(float(t + 1 - from));
      const float alibi = a.alibi_slopes ? a.alibi_slopes[head * group + (begin + i) % group] : 0.0f;
      float *s = p + i * ld, *e = ds + i * ld, *bend = slope + i * ld;
      Vec m = minus_inf;
      for (int64_t j = 0; j < vecs * kLanes; j += kLanes) {
        Vec x = load(s + j) * scale;
        if (a.softcap > 0.0f) {
          const Vec y = tanh(x / cap);
          x = cap * y;
          store(bend + j, one - y * y);
        }
        const Vec key = lanes + set1(float(j));
        if (a.alibi_slopes) x = add_alibi(x, alibi, a.scale, key + set1(float(from)), key + one - high);
        x = select_lt(key, low, minus_inf, select_lt(key, high, x, minus_inf));
        store(s + j, x);
        m = max(m, x);
      }
      const Vec pivot = set1(reduce_max(m));
      Vec sum = zero(), dot = zero();
      for (int64_t j = 0; j < vecs * kLanes; j += kLanes) {
        const Vec w = exp(load(s + j) - pivot);
        store(s + j, w);
        sum = sum + w;
        dot = fma(w, load(e + j), dot);
      }
      const Vec norm = set1(1.0f / reduce_add(sum)), mean = set1(reduce_add(dot)) * norm;
      for (int64_t j = 0; j < vecs * kLanes; j += kLanes) {
        const Vec w = load(s + j) * norm;
        Vec x = w * (load(e + j) - mean) * scale;
        if (a.softcap > 0.0f) x = x * load(bend + j);
        store(s + j, w);
        store(e + j, x);
      }
    }

    // Keys beyond the sequence have weight 0 and rows of zeros in k.
    const int64_t keys = std::min(vecs * kLanes, L - from);
    Product{ds, ld, 1, k + from * Dp, Dp, dq, Dp, keys, false}.run(n, Dp / kLanes);
    Product{ds, 1, ld, q, Dp, dk + from * Dp, Dp, n, true}.run(keys, Dp / kLanes);
    Product{p, 1, ld, g, Dp, dv + from * Dp, Dp, n, true}.run(keys, Dp / kLanes);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = first + (begin + i) / group, h = head * group + (begin + i) % group;
      narrow(dq + i * Dp, 1, D, Dp, static_cast<T*>(a.dq) + (t * a.Hq + h) * D, 0);
    }
  }
  narrow(dk, L, D, Dp, static_cast<T*>(a.dk) + (first * a.Hkv + head) * D, a.Hkv * D);
  narrow(dv, L, D, Dp, static_cast<T*>(a.dv) + (first * a.Hkv + head) * D, a.Hkv * D);
}

}  // namespace

void attention_backward(const Team& team, DType dtype, const AttentionBackwardArgs& a) {
  auto cost_of = [&](int64_t row) {
    const int64_t n = a.cu_seqlens[row + 1] - a.cu_seqlens[row];
    return n * (64 + (a.window > 0 ? std::min(n, 2 * a.window) : n));
  };
  int64_t total = 0;
  for (int64_t row = 0; row < a.rows; ++row) total += a.Hkv * cost_of(row);
  int64_t cost = 0;
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t head = 0; head < a.Hkv; ++head) {
      const int64_t own = cost_of(row), middle = 2 * cost + own;
      cost += own;
      // A unit belongs to the thread whose share of the total cost its middle falls into.
      if (own == 0 || middle * team.size / (2 * total) != team.rank) continue;
      dispatch(dtype, [&](auto t) { one_head<decltype(t)>(a, row, head); });
    }
}

}  // namespace dschat
