// The module that tests load: every function that launches CUDA kernels, run on the CPU.

#include "bindings/arguments.h"

PYBIND11_MODULE(MODULE_NAME, m) { crossvit::bindings::define_cuda(m); }
