#pragma once

// Element types that cross the binding. Values are part of the Python <-> C++ contract
// (crossvit_kernels/extension.py).

namespace crossvit {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace crossvit
