// Python's way to the emulation, beside the kernels of an emulated module.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda_emulation/checker.h"
#include "cuda_emulation/float16.h"
#include "cuda_emulation/runtime.h"

namespace emulation {

inline void bind_emulation(pybind11::module_& m) {
  m.def("set_order", [](int order, uint64_t seed) { set_order(Order(order), seed); });
  m.def("bfloat16_bits", [](float x) { return int(bfloat16_bits(x)); });
  m.def("float16_bits", [](float x) { return int(float16_bits(x)); });
  m.def("bfloat16_value", [](int bits) { return bfloat16_value(uint16_t(bits)); });
  m.def("float16_value", [](int bits) { return float16_value(uint16_t(bits)); });
}

}  // namespace emulation
