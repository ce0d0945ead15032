// The CUDA kernels as a Python module: one function a launcher, with its arguments in its order. No header of CUDA or
// PyTorch: the Python ops pass addresses and the current stream's handle as integers, have checked shapes, dtypes and
// devices, and keep the tensors alive. The same source is linked with the kernels that nvcc compiles and, in tests, with
// those that run on the CPU.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/linear_int8.h"
#include "cuda/low_rank_grads.h"
#include "cuda/token_logprobs_backward.h"
#ifdef DSCHAT_EMULATE_CUDA
#include "bindings/cuda_emulation.cuh"
#endif

namespace py = pybind11;

namespace {

// Pointers come from Python as integers.
template <typename T> struct Wire {
  using type = T;
  static T from(T x) { return x; }
};
template <typename T> struct Wire<T*> {
  using type = uintptr_t;
  static T* from(uintptr_t x) { return reinterpret_cast<T*>(x); }
};

#ifdef DSCHAT_EMULATE_CUDA
// A letter an argument: r for the address of what is only read, w for that of what may be written, - for a number.
template <typename T>
constexpr char kLetter = !std::is_pointer_v<T> ? '-' : std::is_const_v<std::remove_pointer_t<T>> ? 'r' : 'w';
#endif

template <typename... A> void bind(py::module_& m, const char* name, int (*launch)(A...)) {
#ifdef DSCHAT_EMULATE_CUDA
  m.attr("pointers")[name] = std::string{kLetter<A>...};
#endif
  m.def(name, [name, launch](typename Wire<A>::type... arguments) {
    int code;
    {
      py::gil_scoped_release release;
      code = launch(Wire<A>::from(arguments)...);
    }
    if (code)
      throw std::runtime_error(std::string(name) + ": CUDA reports error " + std::to_string(code) + ", " +
                               cuda_error_text(code));
  });
}

}  // namespace

PYBIND11_MODULE(DSCHAT_MODULE, m) {
#ifdef DSCHAT_EMULATE_CUDA
  m.attr("pointers") = py::dict();
#endif
  m.attr("row_block") = 64;  // kRowBlock of cuda/column_sum.cuh: rows a partial sum of a backward's scratch
  bind(m, "layer_norm", launch_layer_norm);
  bind(m, "layer_norm_backward", launch_layer_norm_backward);
  bind(m, "rms_norm", launch_rms_norm);
  bind(m, "rms_norm_backward", launch_rms_norm_backward);
  bind(m, "bias_act", launch_bias_act);
  bind(m, "bias_act_backward", launch_bias_act_backward);
  bind(m, "gated_act", launch_gated_act);
  bind(m, "gated_act_backward", launch_gated_act_backward);
  bind(m, "rope", launch_rope);
  bind(m, "rope_append", launch_rope_append);
  bind(m, "attention", launch_attention);
  bind(m, "attention_decode", launch_attention_decode);
  bind(m, "attention_backward", launch_attention_backward);
  bind(m, "linear", launch_linear);
  bind(m, "linear_int8", launch_linear_int8);
  bind(m, "lora_linear", launch_lora_linear);
  bind(m, "fuse_lora", launch_fuse_lora);
  bind(m, "low_rank_grads", launch_low_rank_grads);
  m.attr("outer_rows") = 256;  // kOuterRows of cuda/low_rank_grads.cu: rows a partial sum of its scratch
  bind(m, "sample", launch_sample);
  bind(m, "token_logprobs", launch_token_logprobs);
  bind(m, "token_logprobs_backward", launch_token_logprobs_backward);
  m.attr("vocab_chunk") = 256;  // kVocabChunk of cuda/logsumexp.cuh: entries a partial sum of token_logprobs' scratch
#ifdef DSCHAT_EMULATE_CUDA
  emulation::bind_emulation(m);
#endif
}
