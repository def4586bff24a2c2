#pragma once

// Integer arithmetic for host and device code. Internal linkage, as some of the sources are
// compiled once per instruction-set level (common/cpu/simd.h).

#ifdef __CUDACC__
#define CROSSVIT_HOST_DEVICE __host__ __device__
#else
#define CROSSVIT_HOST_DEVICE
#endif

namespace crossvit {
namespace {

template <class A, class B>
CROSSVIT_HOST_DEVICE constexpr auto minimum(A a, B b) {
  return a < b ? a : b;
}

template <class A, class B>
CROSSVIT_HOST_DEVICE constexpr auto maximum(A a, B b) {
  return a > b ? a : b;
}

template <class A, class B>
CROSSVIT_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// The smallest multiple of b that is not below a.
template <class A, class B>
CROSSVIT_HOST_DEVICE constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace
}  // namespace crossvit
