#include "sample.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <vector>

#include "dispatch.h"
#include "logsumexp.h"
#include "random.h"

namespace dschat {
namespace {

constexpr int64_t kBlock = 64;  // entries that share one maximum, by which searches skip them
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float z;
  float weight;  // exp(z - max z)
  int32_t index;
};

// The order in which top_p takes tokens.
bool takes_first(const Candidate& a, const Candidate& b) { return a.z > b.z || (a.z == b.z && a.index < b.index); }

// What all filters together come to: the entries in front of, and with, (z, index) in the order of top_p that weigh
// at least `weight`.
struct Rule {
  float z = -kInfinity;
  int64_t index = std::numeric_limits<int64_t>::max();
  float weight = 0.0f;
};

// One thread's buffers, reused from row to row.
struct Buffers {
  std::vector<ChunkSum> chunks;
  std::vector<float> block_max, values;
  std::vector<double> block_mass;
  std::vector<Candidate> candidates;
};

template <typename T> class RowSampler {
 public:
  RowSampler(const T* logits, int64_t vocab, float inv_temperature, Buffers& buffers)
      : logits_(logits), vocab_(vocab), inverse_(inv_temperature), b_(buffers) {
    b_.chunks.clear();
    for (int64_t c = 0; c < vocab; c += kVocabChunk) {
      b_.chunks.push_back(chunk_logsumexp(logits + c, std::min(kVocabChunk, vocab - c), inverse_));
      total_.fold(b_.chunks.back());
    }
  }

  const LogSumExp& total() const { return total_; }
  float z(int64_t i) const { return to_float(logits_[i]) * inverse_; }

  int64_t greedy() const {
    size_t c = 0;
    while (b_.chunks[c].max != total_.max) ++c;
    int64_t i = int64_t(c) * kVocabChunk;
    while (z(i) != total_.max) ++i;
    return i;
  }

  // Nothing is filtered: the chunk sums are there already.
  int64_t draw_from_all(double u) {
    b_.block_mass.clear();
    for (const ChunkSum& c : b_.chunks) b_.block_mass.push_back(chunk_mass(c));
    float weight[kVocabChunk];
    return draw(u, kVocabChunk, weight, [&](int64_t begin, int64_t n) {
      const Vec pivot = set1(b_.chunks[size_t(begin / kVocabChunk)].max);
      for (int64_t j = 0; j < n; j += kLanes)
        store(weight + j, exp(load_or_minus_inf(logits_ + begin + j, n - j) * set1(inverse_) - pivot));
    });
  }

  int64_t draw_filtered(double u, const SampleOptions& o) {
    find_block_maxima();
    Rule rule;
    if (o.top_k > 0 && o.top_k < vocab_) {
      rule.z = top_k_threshold(o.top_k);
      if (o.top_p < 1.0) {
        gather(rule.z, kInfinity);
        double mass = 0.0;
        for (const Candidate& c : b_.candidates) mass += c.weight;
        rule = last_of_top_p(0.0, at_least_one(o.top_p * mass));
      }
    } else if (o.top_p < 1.0) {
      rule = top_p_rule(o.top_p);
    }
    rule.weight = float(o.min_p);
    if (double(rule.weight) < o.min_p) rule.weight = std::nextafter(rule.weight, 2.0f);

    b_.block_mass.assign(b_.block_max.size(), 0.0);
    float weight[kBlock];
    for (size_t b = 0; b < b_.block_max.size(); ++b) {
      if (!(b_.block_max[b] >= rule.z)) continue;
      kept_weights(int64_t(b) * kBlock, rule, weight);
      b_.block_mass[b] = double(reduce_add((load(weight) + load(weight + 16)) + (load(weight + 32) + load(weight + 48))));
    }
    return draw(u, kBlock, weight, [&](int64_t begin, int64_t) { kept_weights(begin, rule, weight); });
  }

 private:
  // Sum of exp(z - max z) over a chunk. Sums of these in float64 are more exact than total_.sum, whose bits are the
  // rule that log-probs share.
  double chunk_mass(const ChunkSum& c) const {
    return c.sum == 0.0f ? 0.0 : double(c.sum) * double(exp_scalar(c.max - total_.max));
  }

  // u is spent on a block first, by b_.block_mass, then inside the block, whose weights `compute` puts in weight[n].
  // Rounding may leave the target at the very end: then the last entry with weight has it.
  template <typename F> int64_t draw(double u, int64_t block, const float* weight, F&& compute) const {
    double mass = 0.0;
    for (double m : b_.block_mass) mass += m;
    const double target = u * mass;
    double before = 0.0, share = 0.0;
    int64_t chosen = 0;
    for (size_t b = 0; b < b_.block_mass.size(); ++b) {
      const double m = b_.block_mass[b];
      if (m == 0.0) continue;
      chosen = int64_t(b);
      share = (target - before) / m;
      before += m;
      if (before > target) break;
    }
    const int64_t begin = chosen * block, n = std::min(block, vocab_ - begin);
    compute(begin, n);
    double sum = 0.0, running = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += weight[j];
    int64_t token = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (weight[j] == 0.0f) continue;
      token = j;
      running += weight[j];
      if (running > share * sum) break;
    }
    return begin + token;
  }

  // The z of a group of 16 entries; -inf past the end.
  Vec z_group(int64_t i) const { return load_or_minus_inf(logits_ + i, vocab_ - i) * set1(inverse_); }

  void find_block_maxima() {
    b_.block_max.clear();
    for (int64_t i = 0; i < vocab_; i += kBlock) {
      Vec m = z_group(i);
      for (int64_t j = i + kLanes; j < std::min(vocab_, i + kBlock); j += kLanes) m = max(m, z_group(j));
      b_.block_max.push_back(reduce_max(m));
    }
  }

  // exp(z - max z) of the block at `begin`, 0 for what the rule drops.
  void kept_weights(int64_t begin, const Rule& rule, float* weight) const {
    const Vec bound = set1(rule.z);
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      if (begin + j >= vocab_) {
        store(weight + j, zero());
        continue;
      }
      const Vec z = z_group(begin + j);
      Vec w = exp(z - set1(total_.max));
      w = select_lt(w, set1(rule.weight), zero(), w);
      // Entries of just z = rule.z stay up to rule.index.
      const Vec with_equals = select_lt(z, bound, zero(), w), without = select_lt(bound, z, w, zero());
      store(weight + j, begin <= rule.index ? with_equals : without);
      if (begin <= rule.index && rule.index < begin + kBlock) {
        float rest[kLanes];
        to_array(without, rest);
        for (int64_t k = std::max<int64_t>(0, rule.index + 1 - begin - j); k < kLanes; ++k) weight[j + k] = rest[k];
      }
    }
  }

  // All entries with low <= z < high, but those of -inf, in order of index and with their weights.
  void gather(float low, float high) {
    b_.candidates.clear();
    for (size_t block = 0; block < b_.block_max.size(); ++block) {
      if (!(b_.block_max[block] >= low)) continue;
      const int64_t begin = int64_t(block) * kBlock, end = std::min(vocab_, begin + kBlock);
      for (int64_t i = begin; i < end; ++i) {
        const float value = z(i);
        if (value >= low && value < high && value > -kInfinity) b_.candidates.push_back({value, 0.0f, int32_t(i)});
      }
    }
    const size_t n = b_.candidates.size();
    for (size_t i = 0; i < n; i += kLanes) {
      const size_t count = std::min<size_t>(kLanes, n - i);
      float lanes[kLanes] = {};
      for (size_t j = 0; j < count; ++j) lanes[j] = b_.candidates[i + j].z;
      to_array(exp(load(lanes) - set1(total_.max)), lanes);
      for (size_t j = 0; j < count; ++j) b_.candidates[i + j].weight = lanes[j];
    }
  }

  static float kth_largest(std::vector<float>& values, int64_t k) {
    const auto place = values.begin() + std::ptrdiff_t(k - 1);
    std::nth_element(values.begin(), place, values.end(), std::greater<float>());
    return *place;
  }

  // The k-th largest z. The k-th largest block maximum is reached by k different entries, so the k-th largest entry
  // reaches it too, and only blocks that do are looked at.
  float top_k_threshold(int64_t k) {
    float bound = -kInfinity;
    if (k <= int64_t(b_.block_max.size())) {
      b_.values = b_.block_max;
      bound = kth_largest(b_.values, k);
    }
    b_.values.clear();
    for (size_t block = 0; block < b_.block_max.size(); ++block) {
      if (!(b_.block_max[block] >= bound)) continue;
      const int64_t begin = int64_t(block) * kBlock, end = std::min(vocab_, begin + kBlock);
      for (int64_t i = begin; i < end; ++i)
        if (const float value = z(i); value >= bound) b_.values.push_back(value);
    }
    return kth_largest(b_.values, k);
  }

  // What an entry's predecessors may weigh for it to stay; above 0, so that the first always does.
  static double at_least_one(double mass) { return std::max(mass, std::numeric_limits<double>::min()); }

  // The rule of top_p over the whole row: a band of z in which the last token that stays must lie is narrowed by
  // weighing what lies above seven cuts at a time, until it is small enough to be taken one by one.
  //
  // Entries below max - d weigh less than vocab exp(-d) together; with d = log(vocab / ((1 - p) sum)) that is less than
  // (1 - p) sum, so what lies above weighs more than p sum: that is where the band begins.
  Rule top_p_rule(double p) {
    constexpr int kCuts = 8, kRounds = 5;
    constexpr double kFew = 1024, kRounding = 1e-5;  // lane sums are good to about 1e-7
    double mass_of_all = 0.0;
    for (const ChunkSum& c : b_.chunks) mass_of_all += chunk_mass(c);
    const double target = at_least_one(p * mass_of_all);
    const double d = std::log(double(vocab_) / ((1.0 - p) * mass_of_all));
    float low = total_.max - float(std::max(d, 0.0) + 0.01), high = kInfinity;
    double before = 0.0, above = 0.0;  // weight and number of the entries from high on
    for (int round = 0; round < kRounds; ++round) {
      float cut[kCuts];
      double mass[kCuts] = {}, count[kCuts] = {};
      const float top = high == kInfinity ? total_.max : high;
      for (int c = 0; c < kCuts; ++c) cut[c] = low + (top - low) * (float(c) / kCuts);
      weigh_above(cut, mass, count);
      const float old_low = low, old_high = high;
      int first = 0, last = kCuts;  // the band is [cut[first], cut[last])
      while (first + 1 < kCuts && mass[first + 1] >= target * (1.0 + kRounding)) ++first;
      while (last > first + 1 && mass[last - 1] <= target * (1.0 - kRounding)) --last;
      low = cut[first];
      if (last < kCuts) {
        high = cut[last];
        before = mass[last];
        above = count[last];
      }
      const double within = count[first] - above;
      if (within <= kFew || (low == old_low && high == old_high)) break;
    }
    gather(low, high);
    return last_of_top_p(before, target);
  }

  // For each cut, the weight and the number of the entries with z >= cut.
  template <int N> void weigh_above(const float (&cut)[N], double (&mass)[N], double (&count)[N]) const {
    Vec bound[N];
    for (int c = 0; c < N; ++c) bound[c] = set1(cut[c]);
    for (int64_t begin = 0; begin < vocab_; begin += kVocabChunk) {
      if (!(b_.chunks[size_t(begin / kVocabChunk)].max >= cut[0])) continue;
      Vec sum[N], number[N];
      for (int c = 0; c < N; ++c) sum[c] = number[c] = zero();
      for (int64_t i = begin; i < std::min(vocab_, begin + kVocabChunk); i += kLanes) {
        const Vec z = z_group(i), w = exp(z - set1(total_.max));
        for (int c = 0; c < N; ++c) {
          sum[c] = sum[c] + select_lt(z, bound[c], zero(), w);
          number[c] = number[c] + select_lt(z, bound[c], zero(), set1(1.0f));
        }
      }
      for (int c = 0; c < N; ++c) {
        mass[c] += double(reduce_add(sum[c]));
        count[c] += double(reduce_add(number[c]));
      }
    }
  }

  // Of the candidates, in the order of top_p after entries that weigh `before`, those stay whose predecessors weigh less
  // than target. The last of them is found like a quantile: split around a pivot, weigh the first part, go on in the
  // part that has the crossing; only what is left of it in the end is sorted. Invariant: [0, lo) stays, [hi, n) goes.
  Rule last_of_top_p(double before, double target) {
    std::vector<Candidate>& s = b_.candidates;
    size_t lo = 0, hi = s.size();
    while (hi - lo > 32) {
      size_t at[3] = {lo, lo + (hi - lo) / 2, hi - 1};
      std::sort(at, at + 3, [&](size_t a, size_t b) { return takes_first(s[a], s[b]); });
      std::swap(s[at[1]], s[hi - 1]);
      const Candidate pivot = s[hi - 1];
      const auto first = s.begin() + std::ptrdiff_t(lo), last = s.begin() + std::ptrdiff_t(hi - 1);
      const size_t mid = size_t(
          std::partition(first, last, [&](const Candidate& c) { return takes_first(c, pivot); }) - s.begin());
      double part = before;
      for (size_t i = lo; i < mid; ++i) part += s[i].weight;
      if (part >= target) {
        hi = mid;
      } else {
        std::swap(s[mid], s[hi - 1]);
        before = part + pivot.weight;
        lo = mid + 1;
      }
    }
    std::sort(s.begin() + std::ptrdiff_t(lo), s.begin() + std::ptrdiff_t(hi), takes_first);
    for (; lo < hi && before < target; ++lo) before += s[lo].weight;
    return {s[lo - 1].z, s[lo - 1].index, 0.0f};
  }

  const T* logits_;
  int64_t vocab_;
  float inverse_;
  Buffers& b_;
  LogSumExp total_;
};

template <typename T>
void sample_rows(const Team& team, const T* logits, int64_t rows, int64_t vocab, int64_t logits_stride,
                 const SampleOptions& options, const int64_t* streams, const int64_t* positions, int64_t* tokens,
                 float* log_probs) {
  const bool greedy = options.temperature == 0.0f;
  const bool filtered = (options.top_k > 0 && options.top_k < vocab) || options.top_p < 1.0 || options.min_p > 0.0;
  const float inverse = greedy ? 1.0f : inverse_temperature(options.temperature);
  Buffers buffers;
  const Range share = team.range(rows);
  for (int64_t row = share.begin; row < share.end; ++row) {
    RowSampler<T> sampler(logits + row * logits_stride, vocab, inverse, buffers);
    const LogSumExp& total = sampler.total();
    if (total.has_nan() || total.nothing_allowed()) {
      tokens[row] = total.has_nan() ? kSampleNotFinite : kSampleAllMasked;
      log_probs[row] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    int64_t token;
    if (greedy) {
      token = sampler.greedy();
    } else {
      const double u = philox_uniform(options.seed, uint64_t(streams[row]), uint64_t(positions[row]));
      token = filtered ? sampler.draw_filtered(u, options) : sampler.draw_from_all(u);
    }
    tokens[row] = token;
    log_probs[row] = total.log_prob(sampler.z(token));
  }
}

}  // namespace

void sample(const Team& team, DType type, const void* logits, int64_t rows, int64_t vocab, int64_t logits_stride,
            const SampleOptions& options, const int64_t* streams, const int64_t* positions, int64_t* tokens,
            float* log_probs) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    sample_rows<T>(team, static_cast<const T*>(logits), rows, vocab, logits_stride, options, streams, positions, tokens,
                   log_probs);
  });
}

}  // namespace dschat
