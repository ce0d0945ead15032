#include "vector_math.h"

#include "simd.h"

namespace dschat {
namespace {

template <typename F> void each(const float* x, float* y, int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = int(n - i < kLanes ? n - i : kLanes);
    store(y + i, f(load(x + i, count)), count);
  }
}

}  // namespace

void vector_function(VectorFunction f, const float* x, float* y, int64_t n) {
  switch (f) {
    case VectorFunction::exp: return each(x, y, n, [](Vec v) { return exp(v); });
    case VectorFunction::tanh: return each(x, y, n, [](Vec v) { return tanh(v); });
    case VectorFunction::erf: return each(x, y, n, [](Vec v) { return erf(v); });
  }
}

}  // namespace dschat
