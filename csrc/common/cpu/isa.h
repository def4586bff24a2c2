#pragma once

#include <string>
#include <vector>

// Instruction-set levels that the CPU kernels are compiled for, and the one in use: the highest
// that this processor has, unless another was asked for.

namespace crossvit {

enum class Isa { kBaseline, kX86V3, kX86V4 };  // portable; AVX2 and FMA; AVX-512

Isa active_isa();

// Names of the levels that this processor can run, best first: "x86-64-v4", "x86-64-v3",
// "baseline".
std::vector<std::string> usable_isas();
std::string active_isa_name();

// Throws std::invalid_argument for a level that this processor does not have.
void use_isa(const std::string& name);

}  // namespace crossvit

// For a function that is compiled once per level, in a namespace named after it: its declarations,
// and the call that goes to the level in use.
#ifdef __x86_64__
#define CROSSVIT_DECLARE_PER_ISA(declaration) \
  namespace baseline {                        \
  declaration;                                \
  }                                           \
  namespace x86_64_v3 {                       \
  declaration;                                \
  }                                           \
  namespace x86_64_v4 {                       \
  declaration;                                \
  }
#define CROSSVIT_CALL_ACTIVE_ISA(function, params)          \
  switch (active_isa()) {                                   \
    case Isa::kX86V4: return x86_64_v4::function(params);   \
    case Isa::kX86V3: return x86_64_v3::function(params);   \
    case Isa::kBaseline: return baseline::function(params); \
  }
#else
#define CROSSVIT_DECLARE_PER_ISA(declaration) \
  namespace baseline {                        \
  declaration;                                \
  }
#define CROSSVIT_CALL_ACTIVE_ISA(function, params) return baseline::function(params);
#endif
