#pragma once

#include <string>

// Checks that this build's CUDA kernels run on this machine.

namespace crossvit {

// Runs a kernel of this build on a device and reads back its result. Returns "" on success, else
// the reason: no driver, no device, or no machine code for the device in this build.
std::string cuda_self_check(int device);

}  // namespace crossvit
