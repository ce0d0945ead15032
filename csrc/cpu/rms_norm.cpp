#include "rms_norm.h"

#include <type_traits>

#include "column_sum.h"
#include "row_sum.h"

namespace dschat {
namespace {

template <typename X, typename Y, NormRounding R>
void forward(const Team& team, const X* x, const X* residual, const float* scale, Y* y, X* residual_out,
             float* rstd_out, int64_t rows, int64_t hidden, int64_t x_stride, float eps) {
  const Range share = team.range(rows);
  for (int64_t row = share.begin; row < share.end; ++row) {
    const X* h = x + row * x_stride;
    if (residual) {
      const X* r = residual + row * hidden;
      X* out = residual_out + row * hidden;
      for_columns(0, hidden, [&](int64_t j, int n) {
        store_group(out + j, load_group(h + j, n) + load_group(r + j, n), n);
      });
      h = out;
    }
    const float squares = row_sum(hidden, [&](int64_t j, int n, Vec& sum) {
      Vec v = load_group(h + j, n);
      sum = fma(v, v, sum);
    });
    const float rstd = 1.0f / std::sqrt(squares / float(hidden) + eps);
    if (rstd_out) rstd_out[row] = rstd;
    Y* out = y + row * hidden;
    for_columns(0, hidden, [&](int64_t j, int n) {
      Vec v = load_group(h + j, n) * set1(rstd);
      if constexpr (R == NormRounding::llama) v = round_to<X>(v);
      store_group(out + j, v * load_group(scale + j, n), n);
    });
  }
}

template <typename X, typename Y, NormRounding R>
void backward(const Team& team, const Y* dy, const X* d_residual_out, const X* h, const float* scale,
              const float* rstd, X* dx, float* dscale, float* partial, int64_t rows, int64_t hidden) {
  const Range blocks = team.range(row_blocks(rows));
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    float* sums = dscale ? partial + block * hidden : nullptr;
    if (sums) std::memset(sums, 0, size_t(hidden) * sizeof(float));
    const int64_t end = (block + 1) * kRowBlock < rows ? (block + 1) * kRowBlock : rows;
    for (int64_t row = block * kRowBlock; row < end; ++row) {
      const Y* dy_row = dy + row * hidden;
      const X* h_row = h + row * hidden;
      const Vec inverse = set1(rstd[row]);
      const float dot = row_sum(hidden, [&](int64_t j, int n, Vec& sum) {
        Vec g = load_group(dy_row + j, n) * load_group(scale + j, n);
        sum = fma(g, load_group(h_row + j, n) * inverse, sum);
      });
      const Vec mean = set1(dot / float(hidden));
      for_columns(0, hidden, [&](int64_t j, int n) {
        const Vec d = load_group(dy_row + j, n), normalised = load_group(h_row + j, n) * inverse;
        const Vec g = d * load_group(scale + j, n);
        if (sums) {
          const Vec factor = R == NormRounding::llama ? round_to<X>(normalised) : normalised;
          store_group(sums + j, fma(d, factor, load_group(sums + j, n)), n);
        }
        Vec grad = inverse * (g - normalised * mean);
        if (d_residual_out) grad = grad + load_group(d_residual_out + row * hidden + j, n);
        store_group(dx + row * hidden + j, grad, n);
      });
    }
  }
  if (!dscale) return;
  team.barrier();
  add_partials(team, partial, row_blocks(rows), hidden, dscale);
}

// f(X{}, Y{}, std::integral_constant of the rounding) for the combinations that exist; in float32 the modes are one.
template <typename F> void dispatch_norm(DType x_type, DType y_type, NormRounding rounding, F&& f) {
  std::integral_constant<NormRounding, NormRounding::llama> llama;
  std::integral_constant<NormRounding, NormRounding::gemma> gemma;
  if (x_type == DType::f32) f(float{}, float{}, llama);
  else if (y_type == DType::f32) f(bf16{}, float{}, llama);
  else if (rounding == NormRounding::llama) f(bf16{}, bf16{}, llama);
  else f(bf16{}, bf16{}, gemma);
}

}  // namespace

void rms_norm(const Team& team, DType x_type, DType y_type, const void* x, const void* residual, const float* scale,
              void* y, void* residual_out, float* rstd, int64_t rows, int64_t hidden, int64_t x_stride, float eps,
              NormRounding rounding) {
  dispatch_norm(x_type, y_type, rounding, [&](auto xt, auto yt, auto mode) {
    using X = decltype(xt);
    using Y = decltype(yt);
    forward<X, Y, mode.value>(team, static_cast<const X*>(x), static_cast<const X*>(residual), scale,
                              static_cast<Y*>(y), static_cast<X*>(residual_out), rstd, rows, hidden, x_stride, eps);
  });
}

void rms_norm_backward(const Team& team, DType x_type, DType y_type, const void* dy, const void* d_residual_out,
                       const void* h, const float* scale, const float* rstd, void* dx, float* dscale, float* partial,
                       int64_t rows, int64_t hidden, NormRounding rounding) {
  dispatch_norm(x_type, y_type, rounding, [&](auto xt, auto yt, auto mode) {
    using X = decltype(xt);
    using Y = decltype(yt);
    backward<X, Y, mode.value>(team, static_cast<const Y*>(dy), static_cast<const X*>(d_residual_out),
                               static_cast<const X*>(h), scale, rstd, static_cast<X*>(dx), dscale, partial, rows,
                               hidden);
  });
}

}  // namespace dschat
