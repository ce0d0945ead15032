// The CPU kernels as a Python module. This is the only file that sees pybind11, so that it is parsed once.
//
// Pointers arrive as uintptr_t and sizes as int64_t; the Python ops have checked shapes, dtypes and devices, and keep
// the tensors alive. Every function that runs a kernel releases the GIL: py::call_guard<py::gil_scoped_release>().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace py = pybind11;
using namespace dschat;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#if defined(__AMX_TILE__)
constexpr const char* kIsa = "amx";
#else
constexpr const char* kIsa = DSCHAT_ISA_NAME;
#endif

}  // namespace

PYBIND11_MODULE(DSCHAT_MODULE, m) {
  m.attr("isa") = kIsa;
  m.def("set_num_threads", &set_num_threads, py::call_guard<py::gil_scoped_release>());
  m.def("num_threads", &num_threads);
}
