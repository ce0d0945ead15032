#include "cuda/device.cuh"
#include "cuda/launch.h"

extern "C" const char* cuda_error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }
