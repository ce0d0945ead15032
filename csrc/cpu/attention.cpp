#include "attention.h"

#include <cstring>
#include <limits>
#include <utility>

#include "alibi.h"
#include "attention_core.h"
#include "int16_dot.h"
#include "scratch.h"

namespace dschat {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// The register tile: kMaxRows query rows by kMaxVecs vectors (of keys in scores, of dimensions in weigh).
#if DSCHAT_VEC_REGISTERS >= 32
constexpr int kMaxRows = 6, kMaxVecs = 4;
#elif DSCHAT_VEC_REGISTERS >= 8
constexpr int kMaxRows = 2, kMaxVecs = 2;
#else
constexpr int kMaxRows = 1, kMaxVecs = 2;
#endif

// Row of scores: one chunk, padded so that rows do not fall into the same cache sets.
constexpr int64_t kScoreStride = kChunk + kLanes;

// Memory that will be needed soon, up to a chunk's pages, fetched into L2 a few lines at a time from inside the
// arithmetic. A chunk ahead is far enough to hide the latency of memory, and near enough to be in L2 still.
class Prefetch {
 public:
  void add(const void* page, int64_t bytes) {
    if (count_ < int(kChunk / kPage)) pages_[count_++] = {static_cast<const char*>(page), bytes};
  }
  DSCHAT_INLINE void step(int64_t bytes) {
    if (at_ >= end_) {
      if (next_ >= count_) return;
      at_ = pages_[next_].first, end_ = at_ + pages_[next_].second, ++next_;
    }
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at_ + i, 0, 2);
    at_ += bytes;
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  int next_ = 0, count_ = 0;
  std::pair<const char*, int64_t> pages_[kChunk / kPage];
};

// s[r][n * 16 + lane] = dot(q_r, key n * 16 + lane) over D; k: blocks [NV][D][16]. A chain of multiply-adds within each
// tile of kDotTile dimensions, the tiles' sums added in order: one chain over a head of 256 would lose too much.
constexpr int64_t kDotTile = 64;
template <int MR, int NV, typename K>
DSCHAT_INLINE void scores(const float* q, const K* k, int64_t D, float* s, Prefetch& prefetch) {
  for (int64_t d0 = 0; d0 < D; d0 += kDotTile) {
    const int64_t d1 = std::min(D, d0 + kDotTile);
    Vec acc[MR][NV];
    for (int r = 0; r < MR; ++r)
      for (int n = 0; n < NV; ++n) acc[r][n] = zero();
    for (int64_t d = d0; d < d1; ++d) {
      prefetch.step(NV * kLanes * int64_t(sizeof(K)));
      Vec key[NV];
      for (int n = 0; n < NV; ++n) key[n] = load(k + (n * D + d) * kLanes);
      for (int r = 0; r < MR; ++r) {
        const Vec x = set1(q[r * D + d]);
        for (int n = 0; n < NV; ++n) acc[r][n] = fma(x, key[n], acc[r][n]);
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int n = 0; n < NV; ++n) {
        float* sum = s + r * kScoreStride + n * kLanes;
        store(sum, d0 == 0 ? acc[r][n] : load(sum) + acc[r][n]);
      }
  }
}

// The same of integers: q [MR][D], k [NV][D / 2][16][2].
template <int MR, int NV>
DSCHAT_INLINE void scores(const int16_t* q, const int8_t* k, int64_t D, float* s, Prefetch& prefetch) {
  Sums acc[MR][NV];
  for (int r = 0; r < MR; ++r)
    for (int n = 0; n < NV; ++n) acc[r][n] = no_sums();
  for (int64_t d = 0; d < D; d += 2) {
    prefetch.step(NV * kLanes * 2);
    Pairs key[NV];
    for (int n = 0; n < NV; ++n) key[n] = widen_pairs(k + (n * D + d) * kLanes);
    for (int r = 0; r < MR; ++r) {
      const Pairs x = same_pair(q + r * D + d);
      for (int n = 0; n < NV; ++n) acc[r][n] = add_products(acc[r][n], x, key[n]);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int n = 0; n < NV; ++n) store(s + r * kScoreStride + n * kLanes, to_floats(acc[r][n]));
}

// o[r][0 .. NV * 16) += sum over keys of p[r][key] * v[key], in the order of the keys.
template <int MR, int NV, typename V>
DSCHAT_INLINE void weigh(const float* p, const V* v, int64_t Dp, int64_t keys, float* o, Prefetch& prefetch) {
  Vec acc[MR][NV];
  for (int r = 0; r < MR; ++r)
    for (int n = 0; n < NV; ++n) acc[r][n] = load(o + r * Dp + n * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    prefetch.step(NV * kLanes * int64_t(sizeof(V)));
    Vec value[NV];
    for (int n = 0; n < NV; ++n) value[n] = load(v + j * Dp + n * kLanes);
    for (int r = 0; r < MR; ++r) {
      const Vec x = set1(p[r * kScoreStride + j]);
      for (int n = 0; n < NV; ++n) acc[r][n] = fma(x, value[n], acc[r][n]);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int n = 0; n < NV; ++n) store(o + r * Dp + n * kLanes, acc[r][n]);
}

// The same of integers: v [keys / 2][Dp][2], an even number of keys.
template <int MR, int NV>
DSCHAT_INLINE void weigh(const int16_t* p, const int8_t* v, int64_t Dp, int64_t keys, int32_t* o, Prefetch& prefetch) {
  Sums acc[MR][NV];
  for (int r = 0; r < MR; ++r)
    for (int n = 0; n < NV; ++n) acc[r][n] = load_sums(o + r * Dp + n * kLanes);
  for (int64_t j = 0; j < keys; j += 2) {
    prefetch.step(NV * kLanes * 2);
    Pairs value[NV];
    for (int n = 0; n < NV; ++n) value[n] = widen_pairs(v + j * Dp + n * kLanes * 2);
    for (int r = 0; r < MR; ++r) {
      const Pairs x = same_pair(p + r * kScoreStride + j);
      for (int n = 0; n < NV; ++n) acc[r][n] = add_products(acc[r][n], x, value[n]);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int n = 0; n < NV; ++n) store_sums(o + r * Dp + n * kLanes, acc[r][n]);
}

// Run-time sizes to templates.
template <int MR, typename Q, typename K>
void scores_rows(int vecs, const Q* q, const K* k, int64_t D, float* s, Prefetch& prefetch) {
  int n = 0;
  for (; n + kMaxVecs <= vecs; n += kMaxVecs)
    scores<MR, kMaxVecs>(q, k + n * D * kLanes, D, s + n * kLanes, prefetch);
  if constexpr (kMaxVecs > 3)
    if (vecs - n == 3) scores<MR, 3>(q, k + n * D * kLanes, D, s + n * kLanes, prefetch);
  if constexpr (kMaxVecs > 2)
    if (vecs - n == 2) scores<MR, 2>(q, k + n * D * kLanes, D, s + n * kLanes, prefetch);
  if (vecs - n == 1) scores<MR, 1>(q, k + n * D * kLanes, D, s + n * kLanes, prefetch);
}

template <int MR, typename P, typename V, typename O>
void weigh_rows(const P* p, const V* v, int64_t Dp, int64_t keys, O* o, Prefetch& prefetch) {
  constexpr int64_t kVec = sizeof(V) == 1 ? 2 * kLanes : kLanes;  // elements of a vector: of pairs, or not
  const int vecs = int(Dp / kLanes);
  int n = 0;
  for (; n + kMaxVecs <= vecs; n += kMaxVecs)
    weigh<MR, kMaxVecs>(p, v + n * kVec, Dp, keys, o + n * kLanes, prefetch);
  if constexpr (kMaxVecs > 3)
    if (vecs - n == 3) weigh<MR, 3>(p, v + n * kVec, Dp, keys, o + n * kLanes, prefetch);
  if constexpr (kMaxVecs > 2)
    if (vecs - n == 2) weigh<MR, 2>(p, v + n * kVec, Dp, keys, o + n * kLanes, prefetch);
  if (vecs - n == 1) weigh<MR, 1>(p, v + n * kVec, Dp, keys, o + n * kLanes, prefetch);
}

// x[0..n) as integers in memory up to the next multiple of 16, largest |x| the largest of 16 bits; returns their step.
// Where x is too small for one all are 0, and where `finite` is false the step is NaN.
DSCHAT_INLINE float to_int16(const float* x, int64_t n, float largest, bool finite, int16_t* to) {
  if (!finite || !(largest > 1e-34f)) {
    std::memset(to, 0, size_t(n + kLanes - 1) / kLanes * kLanes * sizeof(int16_t));
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const Vec steps = set1(32767.0f / largest);
  for (int64_t i = 0; i < n; i += kLanes) store_int16(to + i, round_even(load(x + i) * steps));
  return largest / 32767.0f;
}

// f(std::integral_constant<int, rows>) for 1 <= rows <= kMaxRows.
template <int MR = kMaxRows, typename F> DSCHAT_INLINE void with_rows(int rows, F&& f) {
  if constexpr (MR > 1) {
    if (rows < MR) return with_rows<MR - 1>(rows, f);
  }
  f(std::integral_constant<int, MR>{});
}

Vec lane_numbers() {
  float n[kLanes];
  for (int i = 0; i < kLanes; ++i) n[i] = float(i);
  return load(n);
}

DSCHAT_INLINE float exp_one(float x) {
  float lanes[kLanes];
  to_array(exp(set1(x)), lanes);
  return lanes[0];
}

inline const int32_t* table_of(const AttentionArgs& a, const AttentionTile& t) {
  return a.block_table + (a.slots ? a.slots[t.row] : t.row) * a.block_table_stride;
}

// The pages of keys of a tile in chunk c. C: of the cache.
template <typename C> Prefetch keys_ahead(const AttentionArgs& a, const AttentionTile& t, int64_t c) {
  const int64_t group = a.Hq / a.Hkv, first = first_position(a, t.row);
  const int64_t lo = std::max(visible(a, first + t.begin / group).lo, c * kChunk);
  const int64_t hi = std::min(visible(a, first + (t.end - 1) / group).hi, (c + 1) * kChunk);
  Prefetch ahead;
  for (int64_t page = lo / kPage; page * kPage < hi; ++page)
    ahead.add(static_cast<const C*>(a.k_cache) + k_page_offset<C>(table_of(a, t)[page], t.head, a.Hkv, a.D),
              (kPageScales<C> + std::min(kPage, hi - page * kPage) * a.D) * int64_t(sizeof(C)));
  return ahead;
}

// One tile at work: query rows widened to float32 and the sums of the current chunk. T: of the queries, C: of the cache.
template <typename T, typename C> class TileWorker {
  static constexpr bool kQuantised = kPageScales<C> > 0;
  static constexpr bool kIntegers = kQuantised && sizeof(T) < sizeof(float);  // see attention.h

 public:
  TileWorker(const AttentionArgs& args, const AttentionTile& tile)
      : a_(args),
        tile_(tile),
        group_(args.Hq / args.Hkv),
        Dp_(padded_head_dim(args.D)),
        rows_(int(tile.end - tile.begin)),
        first_(first_position(args, tile.row)),
        table_(table_of(args, tile)),
        De_(even(args.D)),
        widen_(!kIntegers && (kQuantised || (sizeof(C) < sizeof(float) && rows_ > kMaxRows))) {
    const int64_t D = a_.D, page_k = widen_ ? kPage * D : 0, page_v = widen_ ? kPage * Dp_ : 0;
    const int64_t integers = kIntegers ? kTileRows * (Dp_ + kScoreStride / 2 + De_ / 2) + kLanes : 0;  // of 4 bytes
    const int64_t floats = kTileRows * (D + kScoreStride + 2 * Dp_) + page_k + page_v + integers;
    float* memory = static_cast<float*>(scratch(kScratchAttention, size_t(floats) * sizeof(float)));
    // What vectors are loaded from comes first: each block starts on a cache line.
    s_ = memory;
    o_ = s_ + kTileRows * kScoreStride;
    chunk_o_ = o_ + kTileRows * Dp_;
    wide_k_ = chunk_o_ + kTileRows * Dp_;
    wide_v_ = wide_k_ + page_k;
    sums_ = reinterpret_cast<int32_t*>(wide_v_ + page_v);
    p16_ = reinterpret_cast<int16_t*>(sums_ + (kIntegers ? kTileRows * Dp_ : 0));
    q16_ = p16_ + (kIntegers ? kTileRows * kScoreStride : 0);
    q_ = wide_v_ + page_v + integers;
    for (int i = 0; i < rows_; ++i) {
      const T* src = static_cast<const T*>(a_.q) + token(i) * a_.q_stride + head(i) * D;
      for (int64_t d = 0; d < D; ++d) q_[i * D + d] = to_float(src[d]);
      if constexpr (kIntegers) round_query(i);
      seen_[i] = false;
    }
  }

  // Sums of chunk c: max_of(i), sum_of(i) and o[i][Dp] of the rows that see any of its keys, live(i) of all. `after`:
  // what is needed next.
  void chunk(int64_t c, float* o, Prefetch after) {
    const int64_t start = c * kChunk;
    for (int i = 0; i < rows_; ++i) {
      const Span seen = visible(a_, position(i));
      span_[i] = {std::max(seen.lo, start) - start, std::min(seen.hi, start + kChunk) - start};
      live_[i] = span_[i].lo < span_[i].hi;
      if (!live_[i]) span_[i].hi = span_[i].lo = span_[i].lo < kChunk ? 0 : kChunk;
    }
    const Span all = outer_span(0, rows_);
    const int64_t lo = all.lo, hi = all.hi;
    const int64_t page_begin = lo / kPage, page_end = (hi + kPage - 1) / kPage;
    const int64_t page_number = start / kPage;

    Prefetch prefetch;
    for (int64_t p = page_begin; p < page_end; ++p)
      prefetch.add(v_page(page_number + p), (kPageScales<C> + std::min(kPage, hi - p * kPage) * Dp_) * kSize);
    for (int64_t p = page_begin; p < page_end; ++p) {
      const C* k = k_page(page_number + p) + kPageScales<C>;
      const int64_t base = p * kPage, vec_end = (std::min(hi - base, kPage) + kLanes - 1) / kLanes;
      if (widen_) widen_keys(k, std::max<int64_t>(lo - base, 0) / kLanes, vec_end);
      for (int r = 0; r < rows_; r += kMaxRows) {
        const int rows = std::min(kMaxRows, rows_ - r);
        const Span keys = outer_span(r, rows);
        const int64_t from = std::max<int64_t>(keys.lo - base, 0) / kLanes;
        const int64_t to = std::min((keys.hi - base + kLanes - 1) / kLanes, kPage / kLanes);
        if (from >= to) continue;
        float* s = s_ + r * kScoreStride + base + from * kLanes;
        with_rows(rows, [&](auto mr) {
          const float* q = q_ + r * a_.D;
          if constexpr (kIntegers)
            scores_rows<mr()>(int(to - from), q16_ + r * De_, k + from * De_ * kLanes, De_, s, prefetch);
          else if (kQuantised || widen_)
            scores_rows<mr()>(int(to - from), q, wide_k_ + from * a_.D * kLanes, a_.D, s, prefetch);
          else if constexpr (!kQuantised)
            scores_rows<mr()>(int(to - from), q, k + from * a_.D * kLanes, a_.D, s, prefetch);
        });
      }
    }

    if constexpr (kQuantised)
      for (int64_t p = page_begin; p < page_end; ++p) {
        std::memcpy(k_scales_ + p * kPage, k_page(page_number + p), kPage * sizeof(float));
        std::memcpy(v_scales_ + p * kPage, v_page(page_number + p), kPage * sizeof(float));
      }
    if constexpr (kIntegers) std::memset(p16_, 0, size_t(rows_ * kScoreStride) * sizeof(int16_t));
    for (int i = 0; i < rows_; ++i)
      if (live_[i]) softmax(i, start);

    if constexpr (kIntegers) std::memset(sums_, 0, size_t(rows_ * Dp_) * sizeof(int32_t));
    else std::memset(o, 0, size_t(rows_ * Dp_) * sizeof(float));
    for (int64_t p = page_begin; p < page_end; ++p) {
      const C* v = v_page(page_number + p) + kPageScales<C>;
      const int64_t base = p * kPage;
      if (widen_) widen_values(v, std::max<int64_t>(lo - base, 0), std::min(hi - base, kPage));
      for (int r = 0; r < rows_; r += kMaxRows) {
        const int rows = std::min(kMaxRows, rows_ - r);
        if constexpr (kIntegers) weigh_integers(r, rows, base, v, after);
        else if (kQuantised || widen_) weigh_page(r, rows, base, wide_v_, o, after);
        else if constexpr (!kQuantised) weigh_page(r, rows, base, v, o, after);
      }
    }
    if constexpr (kIntegers)
      for (int i = 0; i < rows_; ++i)
        for (int64_t d = 0; d < Dp_; d += kLanes)
          store(o + i * Dp_ + d, to_floats(load_sums(sums_ + i * Dp_ + d)) * set1(p_step_[i]));
  }

  // Folds a chunk's sums into the running ones.
  void fold(int i, float m_c, float l_c, const float* o_c) {
    float* o = o_ + i * Dp_;
    if (!seen_[i]) {
      seen_[i] = true;
      m_[i] = m_c;
      l_[i] = l_c;
      if (o != o_c) std::memcpy(o, o_c, size_t(Dp_) * sizeof(float));
      return;
    }
    const float m = m_[i] > m_c ? m_[i] : m_c;
    const float old_weight = exp_one(m_[i] - m), new_weight = exp_one(m_c - m);
    l_[i] = l_[i] * old_weight + l_c * new_weight;
    m_[i] = m;
    for (int64_t d = 0; d < Dp_; d += kLanes)
      store(o + d, load(o + d) * set1(old_weight) + load(o_c + d) * set1(new_weight));
  }

  void write(int i) {
    T* out = static_cast<T*>(a_.out) + token(i) * a_.out_stride + head(i) * a_.D;
    const float* o = o_ + i * Dp_;
    const Vec l = set1(l_[i]);
    int64_t d = 0;
    for (; d + kLanes <= a_.D; d += kLanes) store(out + d, load(o + d) / l);
    if (d < a_.D) store(out + d, load(o + d) / l, int(a_.D - d));
  }

  float* running() { return o_; }
  float* chunk_sums() { return chunk_o_; }
  int rows() const { return rows_; }
  bool live(int i) const { return live_[i]; }
  float max_of(int i) const { return max_[i]; }
  float sum_of(int i) const { return sum_[i]; }

  // The pages of keys that the tile needs of chunk c.
  Prefetch keys_of(int64_t c) const { return keys_ahead<C>(a_, tile_, c); }

 private:
  static constexpr int64_t kSize = sizeof(C);
  const C* k_page(int64_t page) const {
    return static_cast<const C*>(a_.k_cache) + k_page_offset<C>(table_[page], tile_.head, a_.Hkv, a_.D);
  }
  int64_t token(int i) const { return a_.cu_seqlens[tile_.row] + (tile_.begin + i) / group_; }
  int64_t head(int i) const { return tile_.head * group_ + (tile_.begin + i) % group_; }
  int64_t position(int i) const { return first_ + (tile_.begin + i) / group_; }
  const C* v_page(int64_t page) const {
    return static_cast<const C*>(a_.v_cache) + v_page_offset<C>(table_[page], tile_.head, a_.Hkv, a_.D);
  }
  // Keys that any of the rows sees, as offsets in the chunk.
  Span outer_span(int r, int rows) const {
    Span all{kChunk, 0};
    for (int i = r; i < r + rows; ++i)
      if (live_[i]) all = {std::min(all.lo, span_[i].lo), std::max(all.hi, span_[i].hi)};
    return all;
  }

  void round_query(int i) {
    float row[kMaxHeadDim + kLanes] = {};
    std::memcpy(row, q_ + i * a_.D, size_t(a_.D) * sizeof(float));
    Vec largest = zero(), broken = zero();  // broken: NaN where a number is not finite
    for (int64_t d = 0; d < a_.D; d += kLanes) {
      largest = max(abs(load(row + d)), largest);
      broken = fma(load(row + d), zero(), broken);
    }
    const bool finite = reduce_add(broken) == 0.0f;
    q_step_[i] = to_int16(row, a_.D, finite ? reduce_max(largest) : 0.0f, finite, q16_ + i * De_);
  }

  // Blocks [begin, end) of 16 keys of a page as float32 [D][16], tokens [begin, end) of it as float32 [Dp].
  void widen_keys(const C* k, int64_t begin, int64_t end) {
    if constexpr (kQuantised) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t d = 0; d < a_.D; ++d)
          for (int j = 0; j < kLanes; ++j)
            wide_k_[(n * a_.D + d) * kLanes + j] = float(k[(n * De_ + d / 2 * 2) * kLanes + j * 2 + d % 2]);
    } else {
      for (int64_t i = begin * a_.D; i < end * a_.D; ++i) store(wide_k_ + i * kLanes, load(k + i * kLanes));
    }
  }
  void widen_values(const C* v, int64_t begin, int64_t end) {
    if constexpr (kQuantised) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t d = 0; d < Dp_; ++d) wide_v_[j * Dp_ + d] = float(v[(j / 2 * Dp_ + d) * 2 + j % 2]);
    } else {
      for (int64_t i = begin * Dp_; i < end * Dp_; i += kLanes) store(wide_v_ + i, load(v + i));
    }
  }

  // Scores to weights exp(s - max) in place, times the scales of the values they meet where those are quantised; lanes
  // outside the row's span become 0 or, where such a scale is not finite, NaN, and weigh nothing.
  void softmax(int i, int64_t start) {
    float* s = s_ + i * kScoreStride;
    const Span keys = span_[i];
    const Vec lanes = lane_numbers(), minus_inf = set1(kMinusInf);
    const Vec scale = set1(kIntegers ? a_.scale * q_step_[i] : a_.scale);
    const Vec lo = set1(float(keys.lo)), hi = set1(float(keys.hi));
    const Vec cap = set1(a_.softcap);
    const float slope = a_.alibi_slopes ? a_.alibi_slopes[head(i)] : 0.0f;
    const Vec query = set1(float(position(i) - start));
    const int64_t from = keys.lo / kLanes * kLanes, to = keys.hi;
    Vec m = minus_inf;
    for (int64_t j = from; j < to; j += kLanes) {
      Vec x = load(s + j);
      if constexpr (kQuantised) x = x * load(k_scales_ + j);
      x = x * scale;
      if (a_.softcap > 0.0f) x = cap * tanh(x / cap);
      const Vec key = lanes + set1(float(j));
      if (a_.alibi_slopes) x = add_alibi(x, slope, a_.scale, key + set1(float(start)), key - query);
      if (j < keys.lo || j + kLanes > keys.hi)
        x = select_lt(key, lo, minus_inf, select_lt(key, hi, x, minus_inf));
      store(s + j, x);
      m = max(m, x);
    }
    max_[i] = reduce_max(m);
    const Vec pivot = set1(max_[i]);
    Vec sum = zero();
    for (int64_t j = from; j < to; j += kLanes) {
      const Vec p = exp(load(s + j) - pivot);
      if constexpr (kQuantised) store(s + j, p * load(v_scales_ + j));
      else store(s + j, p);
      sum = sum + p;
    }
    sum_[i] = reduce_add(sum);
    if constexpr (kIntegers) round_weights(i, from, to);
  }

  // The weights as integers; what the row does not see is 0.
  void round_weights(int i, int64_t from, int64_t to) {
    float* s = s_ + i * kScoreStride;
    const Vec lanes = lane_numbers(), lo = set1(float(span_[i].lo)), hi = set1(float(span_[i].hi));
    Vec largest = zero(), broken = zero();
    for (int64_t j = from; j < to; j += kLanes) {
      Vec p = load(s + j);
      if (j < span_[i].lo || j + kLanes > span_[i].hi) {
        const Vec key = lanes + set1(float(j));
        p = select_lt(key, lo, zero(), select_lt(key, hi, p, zero()));
        store(s + j, p);
      }
      largest = max(p, largest);
      broken = fma(p, zero(), broken);
    }
    const bool finite = reduce_add(broken) == 0.0f;
    p_step_[i] = to_int16(s + from, to - from, finite ? reduce_max(largest) : 0.0f, finite,
                          p16_ + i * kScoreStride + from);
  }

  // One page of values in integers: keys that a row does not see have weight 0, whatever their values are.
  void weigh_integers(int r, int rows, int64_t base, const int8_t* v, Prefetch& prefetch) {
    const Span keys = clip(outer_span(r, rows), base);
    const int64_t from = keys.lo / 2 * 2, to = even(keys.hi);
    if (from >= to) return;
    with_rows(rows, [&](auto mr) {
      weigh_rows<mr()>(p16_ + r * kScoreStride + base + from, v + from * Dp_, Dp_, to - from, sums_ + r * Dp_, prefetch);
    });
  }

  // One page of values for the rows of one register tile. A key is multiplied only into rows that see it: what else
  // lies in the page may be another sequence's past, or not finite.
  template <typename V>
  void weigh_page(int r, int rows, int64_t base, const V* v, float* o, Prefetch& prefetch) {
    Span common{0, kChunk};  // keys that all of the rows see
    for (int i = r; i < r + rows; ++i)
      common = {std::max(common.lo, span_[i].lo), std::min(common.hi, span_[i].hi)};
    common = clip(common, base);
    const float* p = s_ + base;
    auto weigh_one = [&](int i, int64_t from, int64_t to) {
      if (from < to) weigh_rows<1>(p + i * kScoreStride + from, v + from * Dp_, Dp_, to - from, o + i * Dp_, prefetch);
    };
    // Each row meets its keys in order: before the common ones, common, after.
    if (common.lo >= common.hi) {
      for (int i = r; i < r + rows; ++i) {
        const Span own = clip(span_[i], base);
        weigh_one(i, own.lo, own.hi);
      }
      return;
    }
    for (int i = r; i < r + rows; ++i) weigh_one(i, clip(span_[i], base).lo, common.lo);
    with_rows(rows, [&](auto mr) {
      weigh_rows<mr()>(p + r * kScoreStride + common.lo, v + common.lo * Dp_, Dp_, common.hi - common.lo, o + r * Dp_,
                       prefetch);
    });
    for (int i = r; i < r + rows; ++i) weigh_one(i, common.hi, clip(span_[i], base).hi);
  }

  static Span clip(Span s, int64_t base) {
    return {std::max<int64_t>(s.lo - base, 0), std::min(s.hi - base, kPage)};
  }

  const AttentionArgs& a_;
  const AttentionTile& tile_;
  const int64_t group_, Dp_;
  const int rows_;
  const int64_t first_;
  const int32_t* table_;
  const int64_t De_;
  const bool widen_;  // pages are converted to float32 once for several register tiles
  float *q_, *s_, *o_, *chunk_o_, *wide_k_, *wide_v_;
  int32_t* sums_;           // [rows][Dp] of the current chunk's weights and values
  int16_t *q16_, *p16_;     // [rows][De] and [rows][kScoreStride]: queries and weights as integers
  float q_step_[kTileRows], p_step_[kTileRows];  // what these are multiples of
  Span span_[kTileRows];  // keys of the current chunk that the row sees
  bool live_[kTileRows], seen_[kTileRows];
  float max_[kTileRows], sum_[kTileRows];  // of the current chunk
  float m_[kTileRows], l_[kTileRows];      // running
  float k_scales_[kQuantised ? kChunk : 1], v_scales_[kQuantised ? kChunk : 1];  // of the current chunk
};

template <typename T, typename C>
void run_tile(const AttentionArgs& args, const AttentionTile& tile, const AttentionTile* next) {
  TileWorker<T, C> worker(args, tile);
  const Prefetch after_tile = next ? keys_ahead<C>(args, *next, next->chunk_begin) : Prefetch{};
  for (int64_t c = tile.chunk_begin; c < tile.chunk_end; ++c) {
    // The first chunk is summed in place.
    float* o = c == tile.chunk_begin ? worker.running() : worker.chunk_sums();
    worker.chunk(c, o, c + 1 < tile.chunk_end ? worker.keys_of(c + 1) : after_tile);
    for (int i = 0; i < worker.rows(); ++i)
      if (worker.live(i)) worker.fold(i, worker.max_of(i), worker.sum_of(i), o + i * padded_head_dim(args.D));
  }
  for (int i = 0; i < worker.rows(); ++i) worker.write(i);
}

template <typename T, typename C>
void run_partials(const AttentionArgs& args, const AttentionTile& tile, int64_t chunk_begin, int64_t chunk_end,
                  float* partials) {
  TileWorker<T, C> worker(args, tile);
  const int64_t chunks = tile.chunk_end - tile.chunk_begin, size = partial_size(args.D), Dp = padded_head_dim(args.D);
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    worker.chunk(c, worker.chunk_sums(), c + 1 < chunk_end ? worker.keys_of(c + 1) : Prefetch{});
    for (int i = 0; i < worker.rows(); ++i) {
      float* to = partials + (i * chunks + c - tile.chunk_begin) * size;
      to[0] = worker.max_of(i);
      to[1] = worker.live(i) ? worker.sum_of(i) : -1.0f;
      std::memcpy(to + kPartialHead, worker.chunk_sums() + i * Dp, size_t(Dp) * sizeof(float));
    }
  }
}

template <typename T, typename C>
void run_fold(const AttentionArgs& args, const AttentionTile& tile, int64_t begin, int64_t end, const float* partials) {
  TileWorker<T, C> worker(args, tile);
  const int64_t chunks = tile.chunk_end - tile.chunk_begin, size = partial_size(args.D);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t c = 0; c < chunks; ++c) {
      const float* from = partials + (i * chunks + c) * size;
      if (from[1] != -1.0f) worker.fold(int(i), from[0], from[1], from + kPartialHead);
    }
    worker.write(int(i));
  }
}

// f(an element of the queries, an element of the cache)
template <typename F> void dispatch_both(DType dtype, const AttentionArgs& args, F&& f) {
  dispatch(dtype, [&](auto t) { args.int8_cache ? f(t, int8_t{}) : f(t, t); });
}

}  // namespace

void attention_tile(DType dtype, const AttentionArgs& args, const AttentionTile& tile, const AttentionTile* next) {
  dispatch_both(dtype, args, [&](auto t, auto c) { run_tile<decltype(t), decltype(c)>(args, tile, next); });
}

void attention_partials(DType dtype, const AttentionArgs& args, const AttentionTile& tile, int64_t chunk_begin,
                        int64_t chunk_end, float* partials) {
  dispatch_both(dtype, args, [&](auto t, auto c) {
    run_partials<decltype(t), decltype(c)>(args, tile, chunk_begin, chunk_end, partials);
  });
}

void attention_fold(DType dtype, const AttentionArgs& args, const AttentionTile& tile, int64_t begin, int64_t end,
                    const float* partials) {
  dispatch_both(dtype, args, [&](auto t, auto c) {
    run_fold<decltype(t), decltype(c)>(args, tile, begin, end, partials);
  });
}

void attention(const Team& team, DType dtype, const AttentionArgs& args) {
  int64_t total = 0;
  if (team.size > 1) for_each_tile(args, [&](const AttentionTile& t) { total += tile_cost(t); });
  // A tile belongs to the thread whose share of the total cost its middle falls into.
  int64_t cost = 0;
  bool waiting = false;
  AttentionTile mine{};
  for_each_tile(args, [&](const AttentionTile& t) {
    if (team.size > 1) {
      const int64_t middle = 2 * cost + tile_cost(t);
      cost += tile_cost(t);
      if (middle * team.size / (2 * total) != team.rank) return;
    }
    if (waiting) attention_tile(dtype, args, mine, &t);
    mine = t;
    waiting = true;
  });
  if (waiting) attention_tile(dtype, args, mine, nullptr);
}

}  // namespace dschat
