#include "layer_norm.h"

#include "column_sum.h"
#include "dispatch.h"
#include "row_sum.h"

namespace dschat {
namespace {

template <typename T>
void forward(const Team& team, const T* x, const T* residual, const float* weight, const float* bias, T* y,
             T* residual_out, float* mean_out, float* rstd_out, int64_t rows, int64_t hidden, int64_t x_stride,
             float eps) {
  const Range share = team.range(rows);
  for (int64_t row = share.begin; row < share.end; ++row) {
    const T* h = x + row * x_stride;
    if (residual) {
      const T* r = residual + row * hidden;
      T* out = residual_out + row * hidden;
      for_columns(0, hidden, [&](int64_t j, int n) {
        store_group(out + j, load_group(h + j, n) + load_group(r + j, n), n);
      });
      h = out;
    }
    const float sum = row_sum(hidden, [&](int64_t j, int n, Vec& s) { s = s + load_group(h + j, n); });
    float mean = sum / float(hidden);
    // What is left around the rounded mean corrects both statistics: of a row with |mean| >> std the first sum alone
    // has lost too much.
    float rest, squares;
    row_sums(hidden, rest, squares, [&](int64_t j, int n, Vec& s, Vec& q) {
      Vec d = load_group(h + j, n) - set1(mean);
      if (n < kLanes) {  // lanes that are no columns hold -mean, not 0
        float lanes[kLanes];
        to_array(d, lanes);
        d = load(lanes, n);
      }
      s = s + d;
      q = fma(d, d, q);
    });
    const float shift = rest / float(hidden);
    const float variance = squares / float(hidden) - shift * shift;
    mean += shift;
    const float rstd = 1.0f / std::sqrt(variance + eps);
    if (mean_out) mean_out[row] = mean;
    if (rstd_out) rstd_out[row] = rstd;
    T* out = y + row * hidden;
    for_columns(0, hidden, [&](int64_t j, int n) {
      Vec v = (load_group(h + j, n) - set1(mean)) * set1(rstd);
      if (weight) v = v * load_group(weight + j, n);
      if (bias) v = v + load_group(bias + j, n);
      store_group(out + j, v, n);
    });
  }
}

template <typename T>
void backward(const Team& team, const T* dy, const T* d_residual_out, const T* h, const float* weight,
              const float* mean, const float* rstd, T* dx, float* dweight, float* dbias, float* partial, int64_t rows,
              int64_t hidden) {
  const int64_t all_blocks = row_blocks(rows);
  float* bias_partial = partial + (dweight ? all_blocks * hidden : 0);
  const Range blocks = team.range(all_blocks);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    float* weight_sums = dweight ? partial + block * hidden : nullptr;
    float* bias_sums = dbias ? bias_partial + block * hidden : nullptr;
    if (weight_sums) std::memset(weight_sums, 0, size_t(hidden) * sizeof(float));
    if (bias_sums) std::memset(bias_sums, 0, size_t(hidden) * sizeof(float));
    const int64_t end = (block + 1) * kRowBlock < rows ? (block + 1) * kRowBlock : rows;
    for (int64_t row = block * kRowBlock; row < end; ++row) {
      const T* dy_row = dy + row * hidden;
      const T* h_row = h + row * hidden;
      const Vec center = set1(mean[row]), inverse = set1(rstd[row]);
      float total, dot;
      row_sums(hidden, total, dot, [&](int64_t j, int n, Vec& sum, Vec& product) {
        Vec g = load_group(dy_row + j, n);  // zero in lanes that are no columns
        if (weight) g = g * load_group(weight + j, n);
        sum = sum + g;
        product = fma(g, (load_group(h_row + j, n) - center) * inverse, product);
      });
      const Vec mean_g = set1(total / float(hidden)), mean_gn = set1(dot / float(hidden));
      for_columns(0, hidden, [&](int64_t j, int n) {
        const Vec d = load_group(dy_row + j, n), normalised = (load_group(h_row + j, n) - center) * inverse;
        const Vec g = weight ? d * load_group(weight + j, n) : d;
        if (weight_sums) store_group(weight_sums + j, fma(d, normalised, load_group(weight_sums + j, n)), n);
        if (bias_sums) store_group(bias_sums + j, load_group(bias_sums + j, n) + d, n);
        Vec grad = inverse * (g - mean_g - normalised * mean_gn);
        if (d_residual_out) grad = grad + load_group(d_residual_out + row * hidden + j, n);
        store_group(dx + row * hidden + j, grad, n);
      });
    }
  }
  if (!dweight && !dbias) return;
  team.barrier();
  if (dweight) add_partials(team, partial, all_blocks, hidden, dweight);
  if (dbias) add_partials(team, bias_partial, all_blocks, hidden, dbias);
}

}  // namespace

void layer_norm(const Team& team, DType type, const void* x, const void* residual, const float* weight,
                const float* bias, void* y, void* residual_out, float* mean, float* rstd, int64_t rows, int64_t hidden,
                int64_t x_stride, float eps) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    forward<T>(team, static_cast<const T*>(x), static_cast<const T*>(residual), weight, bias, static_cast<T*>(y),
               static_cast<T*>(residual_out), mean, rstd, rows, hidden, x_stride, eps);
  });
}

void layer_norm_backward(const Team& team, DType type, const void* dy, const void* d_residual_out, const void* h,
                         const float* weight, const float* mean, const float* rstd, void* dx, float* dweight,
                         float* dbias, float* partial, int64_t rows, int64_t hidden) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    backward<T>(team, static_cast<const T*>(dy), static_cast<const T*>(d_residual_out), static_cast<const T*>(h),
                weight, mean, rstd, static_cast<T*>(dx), dweight, dbias, partial, rows, hidden);
  });
}

}  // namespace dschat
