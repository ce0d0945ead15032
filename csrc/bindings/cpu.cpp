// The CPU kernels as a Python module. This is the only file that sees pybind11, so that it is parsed once.
//
// Pointers arrive as uintptr_t and sizes as int64_t; the Python ops have checked shapes, dtypes and devices, and keep
// the tensors alive. Every function that runs a kernel releases the GIL: py::call_guard<py::gil_scoped_release>().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings/attention.h"
#include "bindings/decoder.h"
#include "cpu/bias_act.h"
#include "cpu/column_sum.h"
#include "cpu/gated_act.h"
#include "cpu/layer_norm.h"
#include "cpu/parallel.h"
#include "cpu/random.h"
#include "cpu/rms_norm.h"
#include "cpu/sample.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"

namespace py = pybind11;
using namespace dschat;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Waking the other threads costs more than the work of a small tensor.
template <typename F>
void spread(int64_t elements, F&& f) {
  if (elements < 16384) f(Team{0, 1, nullptr});
  else parallel(f);
}

#if defined(__AMX_TILE__)
constexpr const char* kIsa = "amx";
#elif defined(__AVX512BF16__)
constexpr const char* kIsa = "avx512_bf16";
#elif defined(DSCHAT_BFDOT)
constexpr const char* kIsa = "neon_bf16";
#else
constexpr const char* kIsa = DSCHAT_ISA_NAME;
#endif

}  // namespace

PYBIND11_MODULE(DSCHAT_MODULE, m) {
  m.attr("isa") = kIsa;
  m.def("set_num_threads", &set_num_threads, py::call_guard<py::gil_scoped_release>());
  m.def("num_threads", &num_threads);
  m.def("uses_openmp", &uses_openmp);
  m.def("use_openmp", &use_openmp, py::call_guard<py::gil_scoped_release>());

  m.attr("row_block") = kRowBlock;  // scratch of a backward: ceil(rows / row_block) * columns floats a summed gradient
  m.def(
      "rms_norm",
      [](int x_type, int y_type, uintptr_t x, uintptr_t residual, uintptr_t scale, uintptr_t y, uintptr_t residual_out,
         uintptr_t rstd, int64_t rows, int64_t hidden, int64_t x_stride, float eps, int rounding) {
        spread(rows * hidden, [&](const Team& team) {
          rms_norm(team, DType(x_type), DType(y_type), at<void>(x), at<void>(residual), at<float>(scale), at<void>(y),
                   at<void>(residual_out), at<float>(rstd), rows, hidden, x_stride, eps, NormRounding(rounding));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rms_norm_backward",
      [](int x_type, int y_type, uintptr_t dy, uintptr_t d_residual_out, uintptr_t h, uintptr_t scale, uintptr_t rstd,
         uintptr_t dx, uintptr_t dscale, uintptr_t partial, int64_t rows, int64_t hidden, int rounding) {
        spread(rows * hidden, [&](const Team& team) {
          rms_norm_backward(team, DType(x_type), DType(y_type), at<void>(dy), at<void>(d_residual_out), at<void>(h),
                            at<float>(scale), at<float>(rstd), at<void>(dx), at<float>(dscale), at<float>(partial),
                            rows, hidden, NormRounding(rounding));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "layer_norm",
      [](int type, uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y,
         uintptr_t residual_out, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t hidden, int64_t x_stride,
         float eps) {
        spread(rows * hidden, [&](const Team& team) {
          layer_norm(team, DType(type), at<void>(x), at<void>(residual), at<float>(weight), at<float>(bias), at<void>(y),
                     at<void>(residual_out), at<float>(mean), at<float>(rstd), rows, hidden, x_stride, eps);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "layer_norm_backward",
      [](int type, uintptr_t dy, uintptr_t d_residual_out, uintptr_t h, uintptr_t weight, uintptr_t mean,
         uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t partial, int64_t rows,
         int64_t hidden) {
        spread(rows * hidden, [&](const Team& team) {
          layer_norm_backward(team, DType(type), at<void>(dy), at<void>(d_residual_out), at<void>(h), at<float>(weight),
                              at<float>(mean), at<float>(rstd), at<void>(dx), at<float>(dweight), at<float>(dbias),
                              at<float>(partial), rows, hidden);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "bias_act",
      [](int type, int activation, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows, int64_t columns,
         int64_t x_stride) {
        spread(rows * columns, [&](const Team& team) {
          bias_act(team, DType(type), Activation(activation), at<void>(x), at<float>(bias), at<void>(y), rows, columns,
                   x_stride);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "bias_act_backward",
      [](int type, int activation, uintptr_t dy, uintptr_t x, uintptr_t bias, uintptr_t dx, uintptr_t dbias,
         uintptr_t partial, int64_t rows, int64_t columns, int64_t x_stride) {
        spread(rows * columns, [&](const Team& team) {
          bias_act_backward(team, DType(type), Activation(activation), at<void>(dy), at<void>(x), at<float>(bias),
                            at<void>(dx), at<float>(dbias), at<float>(partial), rows, columns, x_stride);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gated_act",
      [](int type, int activation, uintptr_t gate, uintptr_t up, uintptr_t gate_bias, uintptr_t up_bias, uintptr_t y,
         int64_t rows, int64_t columns, int64_t gate_stride, int64_t up_stride) {
        spread(rows * columns, [&](const Team& team) {
          gated_act(team, DType(type), Activation(activation), at<void>(gate), at<void>(up), at<float>(gate_bias),
                    at<float>(up_bias), at<void>(y), rows, columns, gate_stride, up_stride);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gated_act_backward",
      [](int type, int activation, uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t gate_bias, uintptr_t up_bias,
         uintptr_t dgate, uintptr_t dup, uintptr_t dgate_bias, uintptr_t dup_bias, uintptr_t partial, int64_t rows,
         int64_t columns, int64_t gate_stride, int64_t up_stride, int64_t grad_stride) {
        spread(rows * columns, [&](const Team& team) {
          gated_act_backward(team, DType(type), Activation(activation), at<void>(dy), at<void>(gate), at<void>(up),
                             at<float>(gate_bias), at<float>(up_bias), at<void>(dgate), at<void>(dup),
                             at<float>(dgate_bias), at<float>(dup_bias), at<float>(partial), rows, columns, gate_stride,
                             up_stride, grad_stride);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "sample",
      [](int type, uintptr_t logits, int64_t rows, int64_t vocab, int64_t logits_stride, float temperature,
         int64_t top_k, double top_p, double min_p, uint64_t seed, uintptr_t streams, uintptr_t positions,
         uintptr_t tokens, uintptr_t log_probs) {
        const SampleOptions options{temperature, top_k, top_p, min_p, seed};
        spread(rows * vocab, [&](const Team& team) {
          sample(team, DType(type), at<void>(logits), rows, vocab, logits_stride, options, at<int64_t>(streams),
                 at<int64_t>(positions), at<int64_t>(tokens), at<float>(log_probs));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, uint32_t key0, uint32_t key1) {
    const PhiloxBlock r = philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key0, key1);
    return std::array<uint32_t, 4>{r.word[0], r.word[1], r.word[2], r.word[3]};
  });
  m.def("philox_uniform", &philox_uniform);
  m.def("vector_function", [](int which, uintptr_t x, uintptr_t y, int64_t n) {
    vector_function(VectorFunction(which), at<float>(x), at<float>(y), n);
  });
  bind_attention(m);
  bind_decoder(m);
}
