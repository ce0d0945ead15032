// What the vector functions and the products of one ISA level give, for test_arm.py: a line "name digest" for each, where
// NaNs are alike. Returns 1 where a product is wrong or a row of it depends on the rows beside it.
#include <cstdio>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/gemm_int8.h"
#include "cpu/int16_dot.h"
#include "cpu/pack_dense.h"
#include "cpu/quantise.h"

using namespace dschat;

namespace {

uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct Digest {
  uint64_t state = 1469598103934665603u;
  void add(uint64_t value) { state = (state ^ value) * 1099511628211u; }
  void add(float x) { add(uint64_t(x != x ? 0x7fc00000u : bits_of(x))); }
  void add(Vec x) {
    float lanes[kLanes];
    to_array(x, lanes);
    for (float lane : lanes) add(lane);
  }
  void say(const char* name) const { std::printf("%s %016llx\n", name, (unsigned long long)state); }
};

uint32_t random_state = 12345;
uint32_t random_bits() {
  random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
  return random_state;
}
float random_float() { return float(int32_t(random_bits() >> 8) - (1 << 23)) / float(1 << 22); }

// Numbers of every sign and size, infinities and NaNs.
template <typename F> void over_all_floats(const char* name, F&& f) {
  Digest digest;
  for (uint64_t u = 0; u < (1ull << 32); u += 64 * 1021) {
    float x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      x[i] = float_of(uint32_t(u + 1021 * uint64_t(i) * 64 / kLanes));
      y[i] = float_of(random_bits());
    }
    if (random_bits() % 8 == 0) y[3] = x[3], y[4] = -x[4], y[5] = std::numeric_limits<float>::quiet_NaN();
    f(digest, load(x), load(y));
  }
  digest.say(name);
}

void vectors() {
  over_all_floats("arithmetic", [](Digest& d, Vec x, Vec y) {
    d.add(x + y), d.add(x - y), d.add(x * y), d.add(x / y), d.add(fma(x, y, x)), d.add(sqrt(x));
  });
  over_all_floats("compare", [](Digest& d, Vec x, Vec y) {
    d.add(max(x, y)), d.add(max(y, x)), d.add(min(x, y)), d.add(min(y, x)), d.add(abs(x)), d.add(select_lt(x, y, x, y));
  });
  over_all_floats("rounding", [](Digest& d, Vec x, Vec) {
    d.add(round_even(x) + zero()), d.add(round_bf16(x));  // the sign of a zero is not held to anything
    for (int n = 0; n <= kLanes; ++n) {
      bf16 stored[kLanes] = {}, whole[kLanes];
      float wide[kLanes] = {};
      store(stored, x, n), store(whole, x), store(wide, x, n);
      for (int i = 0; i < kLanes; ++i) d.add(uint64_t(stored[i].bits)), d.add(uint64_t(whole[i].bits)), d.add(wide[i]);
      d.add(load(stored)), d.add(load(whole, n)), d.add(load(wide, n));
    }
  });
  over_all_floats("functions", [](Digest& d, Vec x, Vec) { d.add(exp(x)), d.add(tanh(x)), d.add(erf(x)); });
  Digest powers;
  for (float n = -126; n <= 128; ++n) powers.add(ldexp(set1(0.7f), set1(n)));
  powers.say("ldexp");
  Digest pairs, integers;
  for (int round = 0; round < 64; ++round) {
    bf16 values[2 * kLanes];
    int8_t bytes[2 * kLanes];
    int16_t pair[2] = {int16_t(random_bits() % 512 - 256), int16_t(random_bits() % 512 - 256)}, stored[kLanes];
    float whole[kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) {
      values[i].bits = uint16_t(random_bits() >> 8);
      bytes[i] = int8_t(random_bits() >> 8);
    }
    for (int i = 0; i < kLanes; ++i) whole[i] = float(int32_t(random_bits() % 65536) - 32768);
    Vec lo, hi;
    load_pair(values, lo, hi);
    pairs.add(lo), pairs.add(hi), pairs.add(load(bytes));
    int32_t sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = int32_t(random_bits() % 1000);
    integers.add(to_floats(add_products(no_sums(), widen_pairs(bytes), same_pair(pair))));
    store_sums(sums, add_products(load_sums(sums), widen_pairs(bytes), same_pair(pair)));
    store_int16(stored, load(whole));
    for (int i = 0; i < kLanes; ++i) {
      integers.add(uint64_t(uint32_t(sums[i])));
      integers.add(uint64_t(uint16_t(stored[i])));
    }
  }
  pairs.say("pairs");
  integers.say("integers");
  Digest quantised;
  for (float size : {0.0f, 1e-40f, 1e-30f, 1.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    float row[77];
    for (float& x : row) x = random_float() * size;
    quantised.add(quantise(row, 77));
    for (float x : row) quantised.add(x);
  }
  quantised.say("quantise");
}

constexpr int kRows = 13, kColumns = 70, kPanels = 3;

struct Result : TileSink {
  std::vector<float> y = std::vector<float>(kRows * kPanels * kPanel);
  mutable float* at = y.data();
  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < panels; ++p)
        std::memcpy(at + ((row + r) * kPanels + panel + p) * kPanel, sums + (r * panels + p) * kPanel, kPanel * 4);
  }
};

// y = x W^T by `multiply(first row, end, sink)`: against float64, and every row alone and in batches of all sizes.
template <typename F> int check(const char* name, const std::vector<double>& exact, double allowed, F&& multiply) {
  Result all;
  multiply(0, kRows, all);
  int wrong = 0;
  for (int first = 0; first < kRows; ++first)
    for (int end = first + 1; end <= kRows; ++end) {
      Result some;
      multiply(first, end, some);
      const size_t a = size_t(first) * kPanels * kPanel, b = size_t(end) * kPanels * kPanel;
      wrong += std::memcmp(&some.y[a], &all.y[a], (b - a) * 4) != 0;
    }
  Digest digest;
  double error = 0;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      const float y = all.y[size_t(r) * kPanels * kPanel + size_t(c)];
      digest.add(y);
      error = std::max(error, std::fabs(double(y) - exact[size_t(r) * kColumns + size_t(c)]));
    }
  digest.say(name);
  if (wrong) std::printf("WRONG %s: %d batches change a row\n", name, wrong);
  if (!(error <= allowed)) std::printf("WRONG %s: error %g, allowed %g\n", name, error, allowed);
  return wrong + !(error <= allowed);
}

template <typename X, typename W>
std::vector<double> product(const std::vector<X>& x, const std::vector<W>& w, int64_t k) {
  const auto wide = [](auto value) {
    if constexpr (sizeof(value) == 1) return double(value);
    else return double(to_float(value));
  };
  std::vector<double> y;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += wide(x[size_t(r * k + i)]) * wide(w[size_t(c * k + i)]);
      y.push_back(sum);
    }
  return y;
}

// Panels of int8 weights in the order of P; `offset` is added to what is stored.
template <typename P> std::vector<int8_t> int8_panels(const std::vector<int8_t>& w, int64_t k, int offset) {
  const P* order = nullptr;
  const int64_t depth = panel_depth(order, k);
  std::vector<int8_t> panels(size_t(kPanels * depth * kPanel), int8_t(offset));
  for (int c = 0; c < kColumns; ++c)
    for (int64_t i = 0; i < k; ++i)
      panels[size_t(c / kPanel * depth * kPanel + panel_place(order, i, c % kPanel))] =
          int8_t(w[size_t(c * k + i)] + offset);
  return panels;
}

int products(int64_t k) {
  std::vector<float> x(size_t(kRows * k)), w(size_t(kColumns * k));
  for (float& v : x) v = random_float();
  for (float& v : w) v = random_float();
  std::vector<bf16> xb, wb;
  std::vector<int8_t> wi;
  for (float v : x) xb.push_back(to_bf16(v));
  for (float v : w) wb.push_back(to_bf16(v)), wi.push_back(int8_t(v * 60));
  std::vector<float> panels(size_t(kPanels * k * kPanel));
  pack_rows(w.data(), k, kColumns, k, 0, kPanels, panels.data());
  std::vector<bf16> panels_b(size_t(kPanels * panel_depth(wb.data(), k) * kPanel));
  pack_rows(wb.data(), k, kColumns, k, 0, kPanels, panels_b.data());
  const auto by = [&](DType x_type, DType w_type, const void* rows, const void* values) {
    return [=](int64_t first, int64_t end, const TileSink& sink) {
      multiply_panels(x_type, w_type, rows, k, k, values, first, end, 0, kPanels, sink);
    };
  };
  const double size = 8 * double(k), ulp = size * 1.2e-7;
  int wrong = check("float32", product(x, w, k), ulp, by(DType::f32, DType::f32, x.data(), panels.data()));
  wrong += check("bfloat16", product(xb, wb, k), 2 * ulp, by(DType::bf16, DType::bf16, xb.data(), panels_b.data()));
  const auto plain = int8_panels<q8>(wi, k, 0), pairs = int8_panels<q8_bf16>(wi, k, 0);
  const auto quads = int8_panels<q8_quad>(wi, k, 128);
  wrong += check("int8", product(x, wi, k), 60 * ulp, by(DType::f32, DType::i8, x.data(), plain.data()));
  wrong += check("int8_bfloat16", product(xb, wi, k), 120 * ulp, by(DType::bf16, DType::i8, xb.data(), pairs.data()));
  const double step = 120.0 * double(k) * 2 / 127;  // of rows quantised too: half a step a value, at most
  const auto* stored = reinterpret_cast<const q8_quad*>(quads.data());
  const auto dynamic = [&](int64_t first, int64_t end, const TileSink& sink) {
    multiply_panels_int8(DType::f32, x.data(), k, k, stored, first, end, 0, kPanels, sink);
  };
  return wrong + check("int8_dynamic", product(x, wi, k), step, dynamic);
}

}  // namespace

int main() {
  vectors();
  int wrong = 0;
  for (int64_t k : {1, 7, 96, 301}) wrong += products(k);
  return wrong != 0;
}
