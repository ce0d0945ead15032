#include "gated_act.h"

#include "column_sum.h"
#include "dispatch.h"
#include "row_sum.h"

namespace dschat {
namespace {

template <typename T, Activation A>
void forward(const Team& team, const T* gate, const T* up, const float* gate_bias, const float* up_bias, T* y,
             int64_t rows, int64_t columns, int64_t gate_stride, int64_t up_stride) {
  for_tiles(team, rows, columns, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate_row = gate + row * gate_stride;
    const T* up_row = up + row * up_stride;
    T* out = y + row * columns;
    for_columns(begin, end, [&](int64_t j, int n) {
      Vec g = load_group(gate_row + j, n), u = load_group(up_row + j, n);
      if (gate_bias) g = g + load_group(gate_bias + j, n);
      if (up_bias) u = u + load_group(up_bias + j, n);
      store_group(out + j, activate<A>(g) * u, n);
    });
  });
}

template <typename T, Activation A>
void backward(const Team& team, const T* dy, const T* gate, const T* up, const float* gate_bias, const float* up_bias,
              T* dgate, T* dup, float* dgate_bias, float* dup_bias, float* partial, int64_t rows, int64_t columns,
              int64_t gate_stride, int64_t up_stride, int64_t grad_stride) {
  const auto row_part = [&](int64_t row, int64_t begin, int64_t end, float* gate_sums, float* up_sums) {
    const T* gate_row = gate + row * gate_stride;
    const T* up_row = up + row * up_stride;
    const T* dy_row = dy + row * columns;
    T* dgate_row = dgate + row * grad_stride;
    T* dup_row = dup + row * grad_stride;
    for_columns(begin, end, [&](int64_t j, int n) {
      Vec g = load_group(gate_row + j, n), u = load_group(up_row + j, n);
      if (gate_bias) g = g + load_group(gate_bias + j, n);
      if (up_bias) u = u + load_group(up_bias + j, n);
      const Vec d = load_group(dy_row + j, n);
      const Vec grad_gate = d * u * activate_grad<A>(g), grad_up = d * activate<A>(g);
      if (gate_sums) store_group(gate_sums + j, load_group(gate_sums + j, n) + grad_gate, n);
      if (up_sums) store_group(up_sums + j, load_group(up_sums + j, n) + grad_up, n);
      store_group(dgate_row + j, grad_gate, n);
      store_group(dup_row + j, grad_up, n);
    });
  };
  if (!dgate_bias && !dup_bias) {
    for_tiles(team, rows, columns,
              [&](int64_t row, int64_t begin, int64_t end) { row_part(row, begin, end, nullptr, nullptr); });
    return;
  }
  float* up_partial = partial + (dgate_bias ? row_blocks(rows) * columns : 0);
  for_row_blocks(team, rows, columns, [&](int64_t row, int64_t block, int64_t begin, int64_t end) {
    float* gate_sums = dgate_bias ? partial + block * columns : nullptr;
    float* up_sums = dup_bias ? up_partial + block * columns : nullptr;
    if (row % kRowBlock == 0) {
      if (gate_sums) std::memset(gate_sums + begin, 0, size_t(end - begin) * sizeof(float));
      if (up_sums) std::memset(up_sums + begin, 0, size_t(end - begin) * sizeof(float));
    }
    row_part(row, begin, end, gate_sums, up_sums);
  });
  team.barrier();
  if (dgate_bias) add_partials(team, partial, row_blocks(rows), columns, dgate_bias);
  if (dup_bias) add_partials(team, up_partial, row_blocks(rows), columns, dup_bias);
}

}  // namespace

void gated_act(const Team& team, DType type, Activation activation, const void* gate, const void* up,
               const float* gate_bias, const float* up_bias, void* y, int64_t rows, int64_t columns,
               int64_t gate_stride, int64_t up_stride) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    dispatch_activation(activation, [&](auto a) {
      forward<T, a.value>(team, static_cast<const T*>(gate), static_cast<const T*>(up), gate_bias, up_bias,
                          static_cast<T*>(y), rows, columns, gate_stride, up_stride);
    });
  });
}

void gated_act_backward(const Team& team, DType type, Activation activation, const void* dy, const void* gate,
                        const void* up, const float* gate_bias, const float* up_bias, void* dgate, void* dup,
                        float* dgate_bias, float* dup_bias, float* partial, int64_t rows, int64_t columns,
                        int64_t gate_stride, int64_t up_stride, int64_t grad_stride) {
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    dispatch_activation(activation, [&](auto a) {
      backward<T, a.value>(team, static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up),
                           gate_bias, up_bias, static_cast<T*>(dgate), static_cast<T*>(dup), dgate_bias, dup_bias,
                           partial, rows, columns, gate_stride, up_stride, grad_stride);
    });
  });
}

}  // namespace dschat
