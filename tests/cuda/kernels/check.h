// What the test programs share: random inputs, the error measure, and main().
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

#include "common/cuda/gpu.h"

namespace crossvit {

class Numbers {
 public:
  std::vector<float> float32(int count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal_(generator_);
    return values;
  }
  std::vector<__nv_bfloat16> bfloat16(int count) {
    std::vector<__nv_bfloat16> values(count);  // no larger: AddressSanitizer guards its end
    for (auto& value : values) value = __float2bfloat16(normal_(generator_));
    return values;
  }

 private:
  std::mt19937 generator_{0};
  std::normal_distribution<float> normal_;
};

// The largest error relative to 1 + |expected|; NaN is larger than any.
class Error {
 public:
  void add(double actual, double expected) {
    const double error = std::fabs(actual - expected) / (1 + std::fabs(expected));
    if (!(error <= largest_)) largest_ = error;
  }
  bool below(double bound) const {
    std::printf("error %.2g\n", largest_);
    return largest_ < bound;
  }

 private:
  double largest_ = 0;
};

// Runs a kernel and compares its results.
bool check_kernel();

}  // namespace crossvit

int main() {
  try {
    const bool right = crossvit::check_kernel();
    std::puts(right ? "right" : "wrong result");
    return right ? 0 : 1;
  } catch (const std::exception& fault) {
    std::printf("fault: %s\n", fault.what());
    return 2;
  }
}
