#pragma once

#include <pybind11/pybind11.h>

namespace crossvit::bindings {

// The functions that start CUDA kernels.
void define_cuda(pybind11::module_& m);

}  // namespace crossvit::bindings
