#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "common/arithmetic.h"

// Vectors as wide as the instruction set this file is compiled for, on GCC's and Clang's vector
// extensions. A source that includes this header is compiled once per instruction-set level (see
// setup.py) and the level is chosen at run time; everything here therefore has internal linkage,
// or the linker could hand AVX-512 code to a machine without it.

namespace crossvit {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Element, int kLanes>
using VectorOf [[gnu::vector_size(kLanes * sizeof(Element))]] = Element;

template <class Scalar>
constexpr int kLanes = kVectorBytes / sizeof(Scalar);

template <class Scalar>
using Vector = VectorOf<Scalar, kLanes<Scalar>>;

template <class Scalar>
inline Vector<Scalar> broadcast(Scalar value) {
  return value - Vector<Scalar>{};
}

// One allocation, handed out as vector-aligned arrays.
template <class Scalar>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<Scalar*>(
            std::aligned_alloc(kVectorBytes, round_up(count * sizeof(Scalar) + 1, kVectorBytes)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Scalar* take(int64_t count) {
    Scalar* const array = data_ + used_;
    used_ += round_up(count, kLanes<Scalar>);
    return array;
  }

 private:
  Scalar* data_;
  int64_t used_ = 0;
};

// Keeps the compiler from reloading a vector for each of its uses.
template <class V>
inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

template <class V, class Element>
inline V load_bits(const Element* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// ---- element types in memory: float, double, and 16-bit formats as their bits ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using FloatVector = Vector<float>;
using BitsVector = VectorOf<uint32_t, kLanes<float>>;
using HalfBitsVector = VectorOf<uint16_t, kLanes<float>>;

inline FloatVector as_float(BitsVector bits) { return load_bits<FloatVector>(&bits); }
inline BitsVector as_bits(FloatVector v) { return load_bits<BitsVector>(&v); }
inline BitsVector select(BitsVector condition, BitsVector yes, BitsVector no) {
  return (condition & yes) | (~condition & no);
}

inline FloatVector load(const float* from) { return load_bits<FloatVector>(from); }
inline Vector<double> load(const double* from) { return load_bits<Vector<double>>(from); }

inline FloatVector load(const BFloat16* from) {
  return as_float(__builtin_convertvector(load_bits<HalfBitsVector>(from), BitsVector) << 16);
}

inline FloatVector load(const Float16* from) {
  const BitsVector half = __builtin_convertvector(load_bits<HalfBitsVector>(from), BitsVector);
  const BitsVector magnitude = (half & 0x7fffu) << 13;
  // Rebiasing the exponent by a multiplication also normalises subnormal halves.
  const BitsVector scaled = as_bits(as_float(magnitude) * 0x1p112f);
  const BitsVector is_special = (BitsVector)(magnitude >= (0x7c00u << 13));  // inf and NaN
  return as_float(select(is_special, magnitude | 0x7f800000u, scaled) | ((half & 0x8000u) << 16));
}

inline void store(float* to, FloatVector v) { std::memcpy(to, &v, sizeof v); }
inline void store(double* to, Vector<double> v) { std::memcpy(to, &v, sizeof v); }

inline void store_half_bits(void* to, BitsVector bits) {
  const HalfBitsVector half = __builtin_convertvector(bits, HalfBitsVector);
  std::memcpy(to, &half, sizeof half);
}

inline void store(BFloat16* to, FloatVector v) {
  const BitsVector bits = as_bits(v);
  const BitsVector rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const BitsVector is_nan = (BitsVector)(v != v);
  store_half_bits(to, select(is_nan, (bits >> 16) | 0x40u, rounded >> 16));
}

inline void store(Float16* to, FloatVector v) {
  const BitsVector bits = as_bits(v);
  const BitsVector magnitude = bits & 0x7fffffffu;
  // Normal halves: round the 13 dropped bits to nearest even, rebias the exponent (127 -> 15).
  const BitsVector normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Subnormal halves: adding 0.5 puts the half's last bit in the float's last bit, rounded.
  const BitsVector subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const BitsVector overflow = (BitsVector)(magnitude >= 0x477ff000u);  // 65520 and above
  const BitsVector is_nan = (BitsVector)(magnitude > 0x7f800000u);
  BitsVector half = select((BitsVector)(magnitude < 0x38800000u), subnormal, normal);
  half = select(overflow, BitsVector{} + 0x7c00u, half);
  half = select(is_nan, BitsVector{} + 0x7e00u, half);
  store_half_bits(to, half | ((bits >> 16) & 0x8000u));
}

// Loads the first `count` < kLanes elements; the other lanes are zero.
template <class Scalar, class Element>
inline Vector<Scalar> load_partial(const Element* from, int count) {
  Element padded[kLanes<Scalar>] = {};
  std::memcpy(padded, from, count * sizeof(Element));
  return load(padded);
}

template <class Scalar, class Element>
inline void store_partial(Element* to, Vector<Scalar> v, int count) {
  Element padded[kLanes<Scalar>];
  store(padded, v);
  std::memcpy(to, padded, count * sizeof(Element));
}

// The lane-wise maximum; b where a is NaN.
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// ---- reductions over lanes ----

namespace lanes {

// Interleaves the first (kOffset = 0) or second (kHalf) halves of a's and b's blocks of 2 * kHalf
// lanes.
template <int kHalf, int kOffset, class V, int... kLane>
inline V interleave_halves(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  return __builtin_shufflevector(
      a, b,
      (kLane / kHalf % 2 * kCount + kLane / (2 * kHalf) * 2 * kHalf + kLane % kHalf + kOffset)...);
}

// Lane i of the result is op over the lanes of v[i]: a transposition that reduces as it goes, about
// three instructions per vector.
template <int kHalf, class V, int kCount, class Op>
inline V reduce_each(V (&v)[kCount], const Op& op) {
  using Lanes = std::make_integer_sequence<int, sizeof(V) / sizeof(v[0][0])>;
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    V half[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i)
      half[i] = op(interleave_halves<kHalf, 0>(v[i], v[i + kCount / 2], Lanes{}),
                   interleave_halves<kHalf, kHalf>(v[i], v[i + kCount / 2], Lanes{}));
    return reduce_each<kHalf / 2>(half, op);
  }
}

}  // namespace lanes

template <class Scalar>
inline Vector<Scalar> sum_each(Vector<Scalar> (&v)[kLanes<Scalar>]) {
  using V = Vector<Scalar>;
  return lanes::reduce_each<kLanes<Scalar> / 2>(v, [](V a, V b) -> V { return a + b; });
}

template <class Scalar>
inline Vector<Scalar> max_each(Vector<Scalar> (&v)[kLanes<Scalar>]) {
  using V = Vector<Scalar>;
  return lanes::reduce_each<kLanes<Scalar> / 2>(v, [](V a, V b) -> V { return larger(a, b); });
}

template <class Scalar>
inline Scalar sum(Vector<Scalar> v) {
  Scalar total = 0;
  for (int i = 0; i < kLanes<Scalar>; ++i) total += v[i];
  return total;
}

// Swaps element j of v[i] with element i of v[j].
template <class Scalar, int kStep = kLanes<Scalar> / 2>
inline void transpose(Vector<Scalar> (&v)[kLanes<Scalar>]) {
  if constexpr (kStep > 0) {
    using Lanes = std::make_integer_sequence<int, kLanes<Scalar>>;
    for (int i = 0; i < kLanes<Scalar>; ++i)
      if (!(i & kStep)) {
        const Vector<Scalar> a = v[i], b = v[i + kStep];
        v[i] = lanes::interleave_halves<kStep, 0>(a, b, Lanes{});
        v[i + kStep] = lanes::interleave_halves<kStep, kStep>(a, b, Lanes{});
      }
    transpose<Scalar, kStep / 2>(v);
  }
}

// ---- exp ----

// exp(x) within about 1 ulp; exactly 0 below the smallest normal result; NaN stays NaN.
inline FloatVector exp(FloatVector x) {
  constexpr float kLargest = 88.72283f, kSmallest = -87.33654f;
  const FloatVector clamped = x > kLargest ? broadcast(kLargest) : x;
  // x = n ln 2 + r, |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to an integer in the low bits.
  const FloatVector shifted = clamped * 1.44269504f + 12582912.0f;
  const FloatVector n = shifted - 12582912.0f;
  const FloatVector r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  FloatVector poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.0f;
  // Scale by 2^n in two steps: n = 128 alone would overflow the exponent.
  const BitsVector exponent = as_bits(shifted) - 0x4b400000u;
  const BitsVector half = BitsVector(VectorOf<int32_t, kLanes<float>>(exponent) >> 1);
  const FloatVector scaled =
      poly * as_float((half + 127u) << 23) * as_float((exponent - half + 127u) << 23);
  const FloatVector overflow_or_scaled = x > kLargest ? broadcast(__builtin_inff()) : scaled;
  return x < kSmallest ? FloatVector{} : overflow_or_scaled;
}

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0 within 1.5 ulp, as a softmax needs it: half the instructions of exp.
inline FloatVector exp2_nonpositive(FloatVector x) {
  const FloatVector shifted = x + 12582912.0f;  // rounds to an integer in the low bits
  const FloatVector r = x - (shifted - 12582912.0f);
  const FloatVector r2 = r * r;
  // A minimax fit, in pairs for a short chain of operations.
  const FloatVector low = r * 6.93147004e-1f + 1.0f;
  const FloatVector middle = r * 5.55073395e-2f + 2.40222424e-1f;
  const FloatVector high = r * 1.32646807e-3f + 9.67151485e-3f;
  const FloatVector poly = (r2 * high + middle) * r2 + low;
  const FloatVector power = as_float((as_bits(shifted) - 0x4b400000u + 127u) << 23);
  return x < -126.0f ? FloatVector{} : poly * power;
}

inline Vector<double> exp(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// ---- GELU ----

// erf(z) for |z| <= kErfIsOne: z times a rational function of z^2, a minimax fit within 2.1e-8.
constexpr float kErfIsOne = 3.95f;

inline FloatVector erf(FloatVector z) {
  const FloatVector t = z * z;
  FloatVector p = t * 2.02594691e-06f + 2.84685167e-04f;
  FloatVector q = t * 3.78320750e-05f + 1.17069013e-03f;
  p = p * t + 3.80800670e-03f;
  q = q * t + 1.50547759e-02f;
  p = p * t + 5.28749635e-02f;
  q = q * t + 1.14558088e-01f;
  p = p * t + 1.91546568e-01f;
  q = q * t + 5.03086402e-01f;
  p = p * t + 1.12837914f;
  q = q * t + 1.0f;
  return z * p / q;
}

// The exact GELU: x times the normal CDF.
inline FloatVector gelu(FloatVector x) {
  const FloatVector z = x * 0.70710678f;
  const FloatVector y = 0.5f * x * (1.0f + erf(z));
  const FloatVector y_or_zero = z < -kErfIsOne ? FloatVector{} : y;
  return z > kErfIsOne ? x : y_or_zero;
}

inline Vector<double> gelu(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i)
    x[i] *= 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  return x;
}

// Instead of std::exp and so on, which are inline functions with external linkage.
inline float exp(float x) { return __builtin_expf(x); }
inline double exp(double x) { return __builtin_exp(x); }
inline float log(float x) { return __builtin_logf(x); }
inline double log(double x) { return __builtin_log(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }

}  // namespace
}  // namespace crossvit
