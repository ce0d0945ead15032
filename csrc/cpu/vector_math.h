// The vector functions of simd.h on plain arrays: for the tests of their accuracy, not for kernels.
#pragma once

#include <cstdint>

namespace dschat {

enum class VectorFunction : int { exp = 0, tanh = 1, erf = 2 };

// y[i] = f(x[i]), i < n
void vector_function(VectorFunction f, const float* x, float* y, int64_t n);

}  // namespace dschat
