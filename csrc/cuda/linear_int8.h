// The launcher of csrc/cuda/linear_int8.cu, by the rules of launch.h. It has a file of its own because launch.h is part
// of what other kernels are compiled from: one that ran on a GPU would count as changed (benchmarks/gpu_sources.py).
#pragma once

#include <cstdint>

extern "C" int launch_linear_int8(int type, const void* x, int64_t x_stride, int64_t rows, const void* weight,
                                  const float* bias, int64_t n, int64_t k, bool gated, int activation,
                                  const void* residual, int64_t residual_stride, bool float_output, void* y,
                                  int64_t y_stride, int weights, const float* scales, void* stream);
