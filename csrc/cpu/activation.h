// Elementwise activations and their derivatives on 16 float32 lanes.
#pragma once

#include <type_traits>

#include "simd.h"

namespace dschat {

// The numbers are part of the binding: dschat_kernels/ops/_common.py ACTIVATIONS lists the names in this order.
enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4, quick_gelu = 5 };
constexpr int kActivations = 6;

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kQuickGelu = 1.702f;

DSCHAT_INLINE Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

// tanh is 1 in float32 from 9.02 on, which |x| = 10 exceeds by far inside gelu_tanh; without the clamp the cube of a
// large x would be infinite and meet a zero.
DSCHAT_INLINE Vec gelu_clamp(Vec x) { return max(set1(-10.0f), min(set1(10.0f), x)); }

DSCHAT_INLINE Vec gelu_tanh_inner(Vec c) {
  return set1(kSqrt2OverPi) * fma(set1(kGeluCubic) * c * c, c, c);
}

template <Activation A> DSCHAT_INLINE Vec activate(Vec x) {
  if constexpr (A == Activation::gelu)  // x Phi(x)
    return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(kSqrtHalf)));
  else if constexpr (A == Activation::gelu_tanh)  // x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    return set1(0.5f) * x * (set1(1.0f) + tanh(gelu_tanh_inner(gelu_clamp(x))));
  else if constexpr (A == Activation::relu)  // max's NaN rule: the second operand survives
    return max(zero(), x);
  else if constexpr (A == Activation::silu)  // x sigmoid(x)
    return x / (set1(1.0f) + exp(zero() - x));
  else if constexpr (A == Activation::quick_gelu)  // x sigmoid(1.702 x)
    return x / (set1(1.0f) + exp(x * set1(-kQuickGelu)));
  else
    return x;
}

// d activate(x) / dx.
template <Activation A> DSCHAT_INLINE Vec activate_grad(Vec x) {
  const Vec one = set1(1.0f), half = set1(0.5f);
  if constexpr (A == Activation::gelu) {
    Vec density = set1(kInvSqrt2Pi) * exp(set1(-0.5f) * x * x);
    return fma(x, density, half * (one + erf(x * set1(kSqrtHalf))));
  } else if constexpr (A == Activation::gelu_tanh) {
    Vec c = gelu_clamp(x);
    Vec t = tanh(gelu_tanh_inner(c));
    Vec slope = set1(kSqrt2OverPi) * fma(set1(3.0f * kGeluCubic) * c, c, one);
    return fma(half * c * (one - t * t), slope, half * (one + t));
  } else if constexpr (A == Activation::relu) {
    return select_lt(zero(), x, one, zero());
  } else if constexpr (A == Activation::silu) {
    Vec s = sigmoid(x);
    return s * fma(x, one - s, one);
  } else if constexpr (A == Activation::quick_gelu) {
    Vec s = sigmoid(x * set1(kQuickGelu));
    return s * fma(x * set1(kQuickGelu), one - s, one);
  } else {
    return one;
  }
}

// f(std::integral_constant<Activation, A>) for an activation known at run time.
template <typename F> inline void dispatch_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::none: return f(std::integral_constant<Activation, Activation::none>());
    case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return f(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>());
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::quick_gelu: return f(std::integral_constant<Activation, Activation::quick_gelu>());
  }
}

}  // namespace dschat
