#pragma once

#include <string>

// What the CUDA part of this build can do on the machine at hand.

namespace crossvit {

// Runs a kernel of this build on a device and reads back what it wrote. Returns "" where that
// worked, else why not: no driver, no device, no machine code in this build for the device.
std::string cuda_self_check(int device);

}  // namespace crossvit
