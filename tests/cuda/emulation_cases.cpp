// The kernels of emulation_cases.cu for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/cuda_emulation.cuh"

std::string run_who_am_i(std::array<unsigned, 3> grid, std::array<unsigned, 3> block, uintptr_t out);
std::string run_block_total(unsigned threads, uintptr_t x, uintptr_t out);
std::string run_shuffles(uintptr_t out);
std::string run_copies(uintptr_t x, uintptr_t out, int valid);
std::string run_product(bool half, uintptr_t a, uintptr_t b, uintptr_t d, bool transposed);
std::string run_planted(int bug, unsigned blocks, unsigned threads, size_t shared, uintptr_t x, uintptr_t out, int n);

PYBIND11_MODULE(DSCHAT_MODULE, m) {
  emulation::bind_emulation(m);
  m.def("who_am_i", run_who_am_i);
  m.def("block_total", run_block_total);
  m.def("shuffles", run_shuffles);
  m.def("copies", run_copies);
  m.def("product", run_product);
  m.def("planted", run_planted);
}
