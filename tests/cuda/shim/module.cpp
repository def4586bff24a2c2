// The module that tests load: every function that starts CUDA kernels, run on the CPU.

#include "bindings/cuda.h"

PYBIND11_MODULE(MODULE_NAME, m) { crossvit::bindings::define_cuda(m); }
