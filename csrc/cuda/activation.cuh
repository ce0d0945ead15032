// Elementwise activations and their derivatives; the formulas are in dschat_kernels/ops/bias_act.py. The choice is a
// branch that all threads of a launch take alike.
#pragma once

#include "cuda/device.cuh"

namespace dschat::cuda {

// The numbers of dschat_kernels/ops/_common.py ACTIVATIONS.
enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4, quick_gelu = 5 };
constexpr int kActivations = 6;

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kQuickGelu = 1.702f;

// Beyond 10 tanh has long been 1, and without the clamp the cube of a large x would be infinite and meet a zero.
__device__ __forceinline__ float gelu_clamp(float x) { return x > 10.0f ? 10.0f : x < -10.0f ? -10.0f : x; }

__device__ __forceinline__ float gelu_tanh_inner(float x) { return kSqrt2OverPi * fmaf(kGeluCubic * x * x, x, x); }

__device__ __forceinline__ float activate(Activation a, float x) {
  switch (a) {
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(gelu_tanh_inner(gelu_clamp(x))));
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // a NaN stays
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::quick_gelu: return x / (1.0f + expf(-kQuickGelu * x));
    default: return x;
  }
}

// d activate(x) / dx
__device__ __forceinline__ float activate_grad(Activation a, float x) {
  switch (a) {
    case Activation::gelu:
      return fmaf(x, kInvSqrt2Pi * expf(-0.5f * x * x), 0.5f * (1.0f + erff(x * kSqrtHalf)));
    case Activation::gelu_tanh: {
      const float c = gelu_clamp(x), t = tanhf(gelu_tanh_inner(c));
      const float slope = kSqrt2OverPi * fmaf(3.0f * kGeluCubic * c, c, 1.0f);
      return fmaf(0.5f * c * (1.0f - t * t), slope, 0.5f * (1.0f + t));
    }
    case Activation::relu: return x > 0.0f ? 1.0f : x == x ? 0.0f : x;
    case Activation::silu: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * fmaf(x, 1.0f - s, 1.0f);
    }
    case Activation::quick_gelu: {
      const float s = 1.0f / (1.0f + expf(-kQuickGelu * x));
      return s * fmaf(kQuickGelu * x, 1.0f - s, 1.0f);
    }
    default: return 1.0f;
  }
}

inline bool known_activation(int a) { return a >= 0 && a < kActivations; }

}  // namespace dschat::cuda
