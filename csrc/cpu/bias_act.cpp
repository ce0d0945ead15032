#include "bias_act.h"

#include "column_sum.h"
#include "dispatch.h"
#include "row_sum.h"

namespace dschat {
namespace {

template <typename T, Activation A>
void forward(const Team& team, const T* x, const float* bias, T* y, int64_t rows, int64_t columns, int64_t x_stride) {
  for_tiles(team, rows, columns, [&](int64_t row, int64_t begin, int64_t end) {
    const T* in = x + row * x_stride;
    T* out = y + row * columns;
    for_columns(begin, end, [&](int64_t j, int n) {
      Vec v = load_group(in + j, n);
      if (bias) v = v + load_group(bias + j, n);
      store_group(out + j, activate<A>(v), n);
    });
  });
}

template <typename T, Activation A>
void backward(const Team& team, const T* dy, const T* x, const float* bias, T* dx, float* dbias, float* partial,
              int64_t rows, int64_t columns, int64_t x_stride) {
  const auto row_part = [&](int64_t row, int64_t begin, int64_t end, float* sums) {
    const T* in = x + row * x_stride;
    const T* dout = dy + row * columns;
    T* out = dx + row * columns;
    for_columns(begin, end, [&](int64_t j, int n) {
      Vec v = load_group(in + j, n);
      if (bias) v = v + load_group(bias + j, n);
      const Vec grad = load_group(dout + j, n) * activate_grad<A>(v);
      if (sums) store_group(sums + j, load_group(sums + j, n) + grad, n);
      store_group(out + j, grad, n);
    });
  };
  if (!dbias) {
    for_tiles(team, rows, columns, [&](int64_t row, int64_t begin, int64_t end) { row_part(row, begin, end, nullptr); });
    return;
  }
  for_row_blocks(team, rows, columns, [&](int64_t row, int64_t block, int64_t begin, int64_t end) {
    float* sums = partial + block * columns;
    if (row % kRowBlock == 0) std::memset(sums + begin, 0, size_t(end - begin) * sizeof(float));
    row_part(row, begin, end, sums);
  });
  team.barrier();
  add_partials(team, partial, row_blocks(rows), columns, dbias);
}

}  // namespace

void bias_act(const Team& team, DType type, Activation activation, const void* x, const float* bias, void* y,
              int64_t rows, int64_t columns, int64_t x_stride) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    dispatch_activation(activation, [&](auto a) {
      forward<T, a.value>(team, static_cast<const T*>(x), bias, static_cast<T*>(y), rows, columns, x_stride);
    });
  });
}

void bias_act_backward(const Team& team, DType type, Activation activation, const void* dy, const void* x,
                       const float* bias, void* dx, float* dbias, float* partial, int64_t rows, int64_t columns,
                       int64_t x_stride) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    dispatch_activation(activation, [&](auto a) {
      backward<T, a.value>(team, static_cast<const T*>(dy), static_cast<const T*>(x), bias, static_cast<T*>(dx), dbias,
                           partial, rows, columns, x_stride);
    });
  });
}

}  // namespace dschat
