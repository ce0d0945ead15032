#include "sample.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <vector>

#include "dispatch.h"
#include "logsumexp.h"
#include "random.h"
#include "row_sum.h"

namespace dschat {
namespace {

constexpr int64_t kBlock = 64;  // entries that share one maximum, by which the search for candidates skips them

struct Candidate {
  float z;
  float weight;  // exp(z - max z)
  int32_t index;
};

// The order in which top_p takes tokens.
bool takes_first(const Candidate& a, const Candidate& b) { return a.z > b.z || (a.z == b.z && a.index < b.index); }

// One thread's buffers, reused from row to row.
struct Buffers {
  std::vector<ChunkSum> chunks;
  std::vector<float> block_max, values;
  std::vector<Candidate> candidates, selection;
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

  // Nothing is filtered: u is spent on a chunk first, by the sums that are there already, then inside the chunk.
  int64_t draw_from_all(double u) const {
    double mass = 0.0;
    for (const ChunkSum& c : b_.chunks) mass += chunk_mass(c);
    const double target = u * mass;
    double before = 0.0, share = 0.0;
    int64_t chosen = 0;
    for (size_t c = 0; c < b_.chunks.size(); ++c) {
      const double m = chunk_mass(b_.chunks[c]);
      if (m == 0.0) continue;
      chosen = int64_t(c);  // rounding may leave target at the very end: then the last chunk with mass has it
      share = (target - before) / m;
      before += m;
      if (before > target) break;
    }
    const int64_t begin = chosen * kVocabChunk, n = std::min(kVocabChunk, vocab_ - begin);
    float weight[kVocabChunk];
    const Vec pivot = set1(b_.chunks[size_t(chosen)].max), scale = set1(inverse_);
    for_columns(0, n, [&](int64_t j, int k) {
      store_group(weight + j, exp(load_group(logits_ + begin + j, k) * scale - pivot), k);
    });
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += weight[j];
    const double local = share * sum;
    double running = 0.0;
    int64_t token = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (weight[j] == 0.0f) continue;
      token = j;
      running += weight[j];
      if (running > local) break;
    }
    return begin + token;
  }

  int64_t draw_filtered(double u, const SampleOptions& o) {
    const bool top_k = o.top_k > 0 && o.top_k < vocab_;
    find_block_maxima();
    float bound = -std::numeric_limits<float>::infinity();
    if (top_k) bound = top_k_bound(o.top_k);
    else bound = std::max(top_p_bound(o.top_p), min_p_bound(o.min_p));
    gather(bound);
    if (top_k) keep_top_k(o.top_k);
    weigh();
    if (o.top_p < 1.0) keep_top_p(o.top_p, top_k ? mass_of_candidates() : double(total_.sum));
    if (o.min_p > 0.0) keep_if([&](const Candidate& c) { return double(c.weight) >= o.min_p; });

    const double target = u * mass_of_candidates();
    double running = 0.0;
    int64_t token = 0;
    for (const Candidate& c : b_.candidates) {
      if (c.weight == 0.0f) continue;
      token = c.index;
      running += c.weight;
      if (running > target) break;
    }
    return token;
  }

 private:
  double chunk_mass(const ChunkSum& c) const {
    return c.sum == 0.0f ? 0.0 : double(c.sum) * double(exp_scalar(c.max - total_.max));
  }

  void find_block_maxima() {
    b_.block_max.clear();
    const Vec scale = set1(inverse_);
    for (int64_t i = 0; i < vocab_; i += kBlock) {
      const int64_t end = std::min(vocab_, i + kBlock);
      Vec m = set1(-std::numeric_limits<float>::infinity());
      for (int64_t j = i; j < end; j += kLanes) m = max(m, load_or_minus_inf(logits_ + j, end - j) * scale);
      b_.block_max.push_back(reduce_max(m));
    }
  }

  // The k-th largest block maximum: k different entries reach it, so the k-th largest entry does.
  float top_k_bound(int64_t k) {
    if (k > int64_t(b_.block_max.size())) return -std::numeric_limits<float>::infinity();
    b_.values = b_.block_max;
    std::nth_element(b_.values.begin(), b_.values.begin() + (k - 1), b_.values.end(), std::greater<float>());
    return b_.values[size_t(k - 1)];
  }

  // Entries below max - d weigh less than vocab exp(-d) together. With d = log(vocab / ((1 - p) sum)) that is less than
  // (1 - p) sum: what lies above holds more than p of the mass, so the set that top_p keeps lies above. The slack covers
  // the rounding of sum, exp and log.
  float top_p_bound(double p) const {
    if (p >= 1.0) return -std::numeric_limits<float>::infinity();
    const double d = std::log(double(vocab_) / ((1.0 - p) * double(total_.sum)));
    return total_.max - float(std::max(d, 0.0) + 0.01);
  }

  float min_p_bound(double p) const {
    if (p <= 0.0) return -std::numeric_limits<float>::infinity();
    return total_.max + float(std::log(p) - 0.01);
  }

  // All entries with z >= bound, in order of index. Entries of -inf are never candidates.
  void gather(float bound) {
    b_.candidates.clear();
    for (size_t block = 0; block < b_.block_max.size(); ++block) {
      if (!(b_.block_max[block] >= bound)) continue;
      const int64_t begin = int64_t(block) * kBlock, end = std::min(vocab_, begin + kBlock);
      for (int64_t i = begin; i < end; ++i) {
        const float value = z(i);
        if (value >= bound && value > -std::numeric_limits<float>::infinity())
          b_.candidates.push_back({value, 0.0f, int32_t(i)});
      }
    }
  }

  template <typename F> void keep_if(F&& f) {
    auto dropped = [&](const Candidate& c) { return !f(c); };
    b_.candidates.erase(std::remove_if(b_.candidates.begin(), b_.candidates.end(), dropped), b_.candidates.end());
  }

  void keep_top_k(int64_t k) {
    if (int64_t(b_.candidates.size()) <= k) return;
    b_.values.clear();
    for (const Candidate& c : b_.candidates) b_.values.push_back(c.z);
    std::nth_element(b_.values.begin(), b_.values.begin() + (k - 1), b_.values.end(), std::greater<float>());
    const float threshold = b_.values[size_t(k - 1)];
    keep_if([&](const Candidate& c) { return c.z >= threshold; });
  }

  void weigh() {
    const int64_t n = int64_t(b_.candidates.size());
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t k = std::min<int64_t>(kLanes, n - i);
      float lanes[kLanes] = {};
      for (int64_t j = 0; j < k; ++j) lanes[j] = b_.candidates[size_t(i + j)].z;
      to_array(exp(load(lanes) - set1(total_.max)), lanes);
      for (int64_t j = 0; j < k; ++j) b_.candidates[size_t(i + j)].weight = lanes[j];
    }
  }

  double mass_of_candidates() const {
    double mass = 0.0;
    for (const Candidate& c : b_.candidates) mass += c.weight;
    return mass;
  }

  // A candidate stays when those taken before it weigh less than p * mass. The last one that stays is found like a
  // quantile: split around a pivot, weigh the first part, go on in the part that has the crossing; only what is left of
  // it in the end is sorted. Invariant: [0, lo) stays and weighs `before`, [hi, n) goes.
  void keep_top_p(double p, double mass) {
    std::vector<Candidate>& s = b_.selection;
    s = b_.candidates;
    const double target = std::max(p * mass, std::numeric_limits<double>::min());  // above 0: the first always stays
    size_t lo = 0, hi = s.size();
    double before = 0.0;
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
    const Candidate last_kept = s[lo - 1];
    keep_if([&](const Candidate& c) { return !takes_first(last_kept, c); });
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
