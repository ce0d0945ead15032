// The launcher of csrc/cuda/token_logprobs_backward.cu, by the rules of launch.h, which is left as it was for the kernels
// that ran on a GPU with it (see linear_int8.h).
#pragma once

#include <cstdint>

extern "C" int launch_token_logprobs_backward(int type, const void* hidden, int64_t hidden_stride, const void* weight,
                                              const float* bias, const int64_t* targets, int64_t rows, int64_t size,
                                              int64_t vocab, const float* dlogprob, const float* dentropy,
                                              const float* lse, const float* entropy, float temperature, float softcap,
                                              const float* scales, int64_t block, void* dlogits, void* transposed,
                                              float* sums, float* partial, void* dhidden, void* dweight, float* dbias,
                                              void* stream);
