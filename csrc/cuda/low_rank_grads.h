// The launcher of csrc/cuda/low_rank_grads.cu, by the rules of launch.h, which is left as it was for the kernels that ran
// on a GPU with it (see linear_int8.h).
#pragma once

#include <cstdint>

extern "C" int launch_low_rank_grads(int type, const void* x, int64_t x_stride, const void* dy, int64_t dy_stride,
                                     int64_t tokens, int64_t n, int64_t k, int64_t rank, const float* a,
                                     const float* b_t, float scale, float* inner, float* da, float* db_t,
                                     float* partial, void* stream);
