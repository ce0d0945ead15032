// Python's way to the emulation, beside the kernels of an emulated module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulation/checker.h"
#include "cuda_emulation/float16.h"
#include "cuda_emulation/ptx_launch.h"
#include "cuda_emulation/runtime.h"

namespace emulation {

inline void bind_emulation(pybind11::module_& m) {
  m.def("set_order", [](int order, uint64_t seed) { set_order(Order(order), seed); });
  m.def("bfloat16_bits", [](float x) { return int(bfloat16_bits(x)); });
  m.def("float16_bits", [](float x) { return int(float16_bits(x)); });
  m.def("bfloat16_value", [](int bits) { return bfloat16_value(uint16_t(bits)); });
#ifdef DSCHAT_EMULATION_CHECK
  m.def("add_buffer", [](uintptr_t address, size_t bytes, const std::string& name, bool initialised, bool read_only) {
    checker::add_buffer(reinterpret_cast<const void*>(address), bytes, name.c_str(), initialised, read_only);
  });
  m.def("reset", &checker::reset);
  m.def("reset_traffic", &checker::reset_traffic);
  const auto as_dict = [](const checker::Traffic& t) {
    pybind11::dict found;
    found["bytes_read"] = t.bytes_read;
    found["bytes_written"] = t.bytes_written;
    found["requests"] = t.requests;
    found["sectors"] = t.sectors;
    found["used_bytes"] = t.used_bytes;
    found["shared_requests"] = t.shared_requests;
    found["once_bytes"] = t.once_bytes;
    found["moved_bytes"] = t.moved_bytes;
    found["shared_passes"] = t.shared_passes;
    found["worst_passes"] = t.worst_passes;
    return found;
  };
  m.def("traffic", [as_dict] { return as_dict(checker::traffic()); });
  m.def("traffic_by_launch", [as_dict] {  // pairs of a text that names the kernel, and the traffic
    pybind11::list found;
    for (const auto& launch : checker::traffic_by_launch()) found.append(pybind11::make_tuple(launch.first, as_dict(launch.second)));
    return found;
  });
#endif
  m.def("on_unknown_kernel", [](pybind11::function resolve) {
    ptx::set_resolver([resolve](uintptr_t offset) {
      pybind11::gil_scoped_acquire gil;
      return resolve(offset).cast<std::string>();
    });
  });
  m.def("forget_kernels", [] { ptx::set_resolver(nullptr); });
  using Size = std::array<unsigned, 3>;
  m.def("launch_library", [](const std::string& path, Size grid, Size block, size_t shared_bytes, const pybind11::bytes& given) {
    const std::string parameters = given;
    ptx::launch_library(path, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                        {parameters.begin(), parameters.end()});
    if (take_error()) throw std::runtime_error(error_text());
  });
  m.def("float16_value", [](int bits) { return float16_value(uint16_t(bits)); });
}

}  // namespace emulation
