#pragma once

#include <string>

// A check of this build's CUDA part on the machine at hand.

namespace crossvit {

// Runs a kernel of this build on a device and reads back its result. Returns "" on success, else
// the reason: no driver, no device, no machine code in this build for the device.
std::string cuda_self_check(int device);

}  // namespace crossvit
