// One token a row from logits, with its log-probability; see dschat_kernels/ops/sample.py. One block a row.
//
// Thresholds are found by a search over the bits of z, three at a time from the top: each step adds up, for the eight
// values of the digit, the weight (or number) of the entries that agree with the digits so far. All sums have a fixed
// order. The random numbers are those of csrc/cpu/random.h.
#include "cuda/launch.h"
#include "cuda/logsumexp.cuh"

namespace dschat::cuda {
namespace {

constexpr int kThreads = 1024;  // rows are few: each needs as many loads in flight as it can have
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 8;
constexpr int64_t kNotFinite = -1, kAllMasked = -2;  // in place of a token

struct Options {
  float inverse;
  bool greedy;
  int64_t top_k;
  double top_p, min_p;
  uint64_t seed;
};

// Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Uniform in [0, 1) with 53 random bits; key = seed, counter = (stream, position).
__device__ double philox_uniform(uint64_t seed, uint64_t stream, uint64_t position) {
  uint32_t c0 = uint32_t(stream), c1 = uint32_t(stream >> 32), c2 = uint32_t(position), c3 = uint32_t(position >> 32);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return double((uint64_t(c0 >> 5) << 26) | (c1 >> 6)) * 0x1p-53;
}

// Unsigned numbers in the order of the floats; both zeros are one.
__device__ __forceinline__ uint32_t order_key(float z) {
  const uint32_t bits = __float_as_uint(z + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Shared {
  double numbers[kWarp];
  double masses[kWarps];
  ChunkSum chunks[kWarps];
  float weights[kVocabChunk];
  int counts[kWarps];
  int32_t index;
};

// What the filters keep: keys above `key`, and of those equal to it the entries up to `index`; of weight >= min_p.
struct Rule {
  uint32_t key;
  int32_t index;
  double min_p;
};

template <typename T> struct Row {
  const T* logits;
  int32_t vocab;
  float inverse;
  float top;  // the largest z
  Shared& shared;

  __device__ __forceinline__ float z(int32_t i) const { return to_float(logits[i]) * inverse; }
  __device__ __forceinline__ float weight(float value) const { return expf(value - top); }

  __device__ __forceinline__ float kept_weight(int32_t i, const Rule& rule) const {
    const float value = z(i), w = weight(value);
    const uint32_t key = order_key(value);
    const bool stays = key > rule.key || (key == rule.key && i <= rule.index);
    return stays && double(w) >= rule.min_p ? w : 0.0f;
  }

  // fold(chunk's first entry, compute(first entry, entries)) for all chunks in order, in every thread; each warp
  // computes one chunk of a round.
  template <typename Item, typename Compute, typename Fold>
  __device__ void each_chunk(Item* items, Compute&& compute, Fold&& fold) const {
    const int warp = int(threadIdx.x) / kWarp;
    for (int32_t round = 0; round < vocab; round += kWarps * kVocabChunk) {
      const int32_t begin = round + warp * kVocabChunk;
      if (begin < vocab) {
        const Item item = compute(begin, min(kVocabChunk, vocab - begin));
        if (threadIdx.x % kWarp == 0) items[warp] = item;
      }
      __syncthreads();
      for (int w = 0; w < kWarps && round + w * kVocabChunk < vocab; ++w) fold(round + w * kVocabChunk, items[w]);
      __syncthreads();
      if (vocab - round <= kWarps * kVocabChunk) break;  // round must not overflow
    }
  }

  __device__ LogSumExp total() const {
    LogSumExp sum;
    each_chunk(
        shared.chunks,
        [&](int32_t begin, int n) { return chunk_logsumexp(n, [&](int i) { return z(begin + i); }); },
        [&](int32_t, const ChunkSum& c) {
          if (threadIdx.x < kWarp) sum.fold(c);  // the other warps would only take its time
        });
    if (threadIdx.x == 0) shared.chunks[0] = {sum.max, sum.sum, 0.0f};
    __syncthreads();
    sum.max = shared.chunks[0].max;
    sum.sum = shared.chunks[0].sum;
    return sum;
  }

  // The entries from the largest z down until their amounts reach `target`: the key of the last one, and in `above`
  // the amount of all larger keys. Keys below `floor` are left out.
  template <typename Amount>
  __device__ uint32_t search(double target, uint32_t floor, double& above, Amount&& amount) const {
    uint32_t prefix = 0;
    above = 0.0;
    for (int shift = 30; shift >= 0; shift -= 3) {
      const uint32_t settled = shift == 30 ? 0u : ~0u << (shift + 3);
      double mass[kDigits] = {};
      for (int32_t i = int32_t(threadIdx.x); i < vocab; i += kThreads) {
        const float value = z(i);
        const uint32_t key = order_key(value);
        if (key < floor || (key & settled) != prefix) continue;
        const uint32_t digit = key >> shift & (kDigits - 1);
        const double a = amount(value);
#pragma unroll
        for (uint32_t d = 0; d < kDigits; ++d) mass[d] += d == digit ? a : 0.0;
      }
      int chosen = -1;
      double chosen_above = above;
#pragma unroll
      for (int d = kDigits - 1; d >= 0; --d) {
        const double m = block_sum(mass[d], shared.numbers);
        if (m == 0.0 || (chosen >= 0 && above >= target)) continue;
        chosen = d;  // by rounding the last digit may end short of the target: then it is the one
        chosen_above = above;
        above += m;
      }
      above = chosen_above;
      prefix |= uint32_t(chosen < 0 ? 0 : chosen) << shift;
    }
    return prefix;
  }

  // The index of the count-th entry with this key; of the last one if there are fewer.
  __device__ int32_t nth_equal(uint32_t key, double count) const {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    if (threadIdx.x == 0) shared.index = vocab;
    double before = 0.0;
    for (int64_t begin = 0; begin < vocab && before < count; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      const bool equal = i < vocab && order_key(z(int32_t(i))) == key;
      const unsigned votes = __ballot_sync(kAllLanes, equal);
      if (lane == 0) shared.counts[warp] = __popc(votes);
      __syncthreads();
      double place = before;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) place += shared.counts[w];
        before += shared.counts[w];
      }
      place += __popc(votes & ((2u << lane) - 1));
      if (equal && place == count) shared.index = int32_t(i);
      __syncthreads();
    }
    __syncthreads();
    return shared.index;
  }

  __device__ Rule filters(const Options& o) const {
    Rule rule{0, vocab, o.min_p};
    double above;
    if (o.top_k > 0 && o.top_k < vocab) rule.key = search(double(o.top_k), 0, above, [](float) { return 1.0; });
    if (o.top_p < 1.0) {
      const uint32_t floor = rule.key;
      double mass = 0.0;
      each_chunk(
          shared.masses, [&](int32_t begin, int n) { return mass_of(begin, n, Rule{floor, vocab, 0.0}); },
          [&](int32_t, double m) { mass += m; });
      const double target = o.top_p * mass > 0x1p-1000 ? o.top_p * mass : 0x1p-1000;  // the first one stays
      rule.key = search(target, floor, above, [&](float value) { return double(weight(value)); });
      const double w = double(weight(key_value(rule.key)));
      double count = ceil((target - above) / w);
      rule.index = nth_equal(rule.key, count < 1.0 ? 1.0 : count);
    }
    return rule;
  }

  // The weight of what the rule keeps of a chunk, in every lane of a warp.
  __device__ double mass_of(int32_t begin, int n, const Rule& rule) const {
    double sum = 0.0;
    for (int i = int(threadIdx.x) % kWarp; i < n; i += kWarp) sum += double(kept_weight(begin + i, rule));
    return warp_sum(sum);
  }

  // u is spent on a chunk first, then inside it. Rounding may leave the target at the very end: then the last entry
  // with weight has it.
  __device__ int32_t draw(double u, const Rule& rule) const {
    double mass = 0.0;
    each_chunk(
        shared.masses, [&](int32_t begin, int n) { return mass_of(begin, n, rule); },
        [&](int32_t, double m) { mass += m; });
    const double target = u * mass;
    double before = 0.0, share = 0.0;
    int32_t chosen = 0;
    bool found = false;
    each_chunk(
        shared.masses, [&](int32_t begin, int n) { return mass_of(begin, n, rule); },
        [&](int32_t begin, double m) {
          if (found || m == 0.0) return;
          chosen = begin;
          share = (target - before) / m;
          before += m;
          found = before > target;
        });
    const int n = min(kVocabChunk, vocab - chosen);
    for (int i = int(threadIdx.x); i < n; i += kThreads) shared.weights[i] = kept_weight(chosen + i, rule);
    __syncthreads();
    double sum = 0.0, running = 0.0;
    for (int i = 0; i < n; ++i) sum += double(shared.weights[i]);
    int token = 0;
    for (int i = 0; i < n; ++i) {
      if (shared.weights[i] == 0.0f) continue;
      token = i;
      running += double(shared.weights[i]);
      if (running > share * sum) break;
    }
    return chosen + token;
  }

  // The first entry that is the largest.
  __device__ int32_t greedy() const { return nth_equal(order_key(top), 1.0); }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_rows(const T* logits, int64_t vocab, int64_t stride, Options options, const int64_t* streams,
                const int64_t* positions, int64_t* tokens, float* log_probs) {
  DSCHAT_SHARED(Shared, shared, 1);
  const int64_t at = blockIdx.x;
  Row<T> row{logits + at * stride, int32_t(vocab), options.inverse, 0.0f, *shared};
  const LogSumExp total = row.total();
  if (total.has_nan() || total.nothing_allowed()) {
    if (threadIdx.x == 0) {
      tokens[at] = total.has_nan() ? kNotFinite : kAllMasked;
      log_probs[at] = __uint_as_float(0x7fc00000u);
    }
    return;
  }
  row.top = total.max;
  int32_t token;
  if (options.greedy) {
    token = row.greedy();
  } else {
    const double u = philox_uniform(options.seed, uint64_t(streams[at]), uint64_t(positions[at]));
    token = row.draw(u, row.filters(options));
  }
  if (threadIdx.x == 0) {
    tokens[at] = token;
    log_probs[at] = total.log_prob(row.z(token));
  }
}

}  // namespace

extern "C" int launch_sample(int type, const void* logits, int64_t rows, int64_t vocab, int64_t logits_stride,
                             float temperature, int64_t top_k, double top_p, double min_p, uint64_t seed,
                             const int64_t* streams, const int64_t* positions, int64_t* tokens, float* log_probs,
                             void* stream) {
  if (rows == 0) return launched();
  const bool greedy = temperature == 0.0f;
  const Options options{greedy ? 1.0f : inverse_temperature(temperature), greedy, top_k, top_p, min_p, seed};
  return launched(dispatch(type, [&](auto t) {
    using T = decltype(t);
    DSCHAT_LAUNCH(sample_rows<T>, dim3(unsigned(rows)), dim3(kThreads), 0, stream, static_cast<const T*>(logits), vocab,
                  logits_stride, options, streams, positions, tokens, log_probs);
  }));
}

}  // namespace dschat::cuda
