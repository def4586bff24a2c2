#pragma once

#include <string>
#include <vector>

// Instruction-set levels that the CPU kernels are compiled for, and the active one: the highest
// that this processor supports, unless use_isa() chose another.

namespace crossvit {

enum class Isa { kBaseline, kX86V3, kX86V4 };  // portable; AVX2 and FMA; AVX-512

Isa active_isa();

// Names of the levels that this processor can run, best first: "x86-64-v4", "x86-64-v3",
// "baseline".
std::vector<std::string> usable_isas();
std::string active_isa_name();

// Throws std::invalid_argument for a level that this processor does not support.
void use_isa(const std::string& name);

}  // namespace crossvit

// Defines a function that calls its version for the active level. Each version is in a namespace
// named after its level.
#ifdef __x86_64__
#define CROSSVIT_DISPATCH(function, Params)                   \
  namespace baseline {                                        \
  void function(const Params& params);                        \
  }                                                           \
  namespace x86_64_v3 {                                       \
  void function(const Params& params);                        \
  }                                                           \
  namespace x86_64_v4 {                                       \
  void function(const Params& params);                        \
  }                                                           \
  void function(const Params& params) {                       \
    switch (active_isa()) {                                   \
      case Isa::kX86V4: return x86_64_v4::function(params);   \
      case Isa::kX86V3: return x86_64_v3::function(params);   \
      case Isa::kBaseline: return baseline::function(params); \
    }                                                         \
  }
#else
#define CROSSVIT_DISPATCH(function, Params) \
  namespace baseline {                      \
  void function(const Params& params);      \
  }                                         \
  void function(const Params& params) { return baseline::function(params); }
#endif
