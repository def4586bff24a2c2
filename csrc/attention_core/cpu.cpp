#include "attention_core/params.h"
#include "common/isa.h"

namespace crossvit::attention_core {

// Defined by cpu/forward.cpp and cpu/backward.cpp, once for each level.
#define CROSSVIT_DECLARE_LEVEL(level)          \
  namespace level {                            \
  void forward(const ForwardParams& params);   \
  void backward(const BackwardParams& params); \
  }
CROSSVIT_DECLARE_LEVEL(baseline)
#ifdef __x86_64__
CROSSVIT_DECLARE_LEVEL(x86_64_v3)
CROSSVIT_DECLARE_LEVEL(x86_64_v4)
#endif
#undef CROSSVIT_DECLARE_LEVEL

void forward(const ForwardParams& params) {
  switch (active_isa()) {
#ifdef __x86_64__
    case Isa::kX86V4: return x86_64_v4::forward(params);
    case Isa::kX86V3: return x86_64_v3::forward(params);
#endif
    default: return baseline::forward(params);
  }
}

void backward(const BackwardParams& params) {
  switch (active_isa()) {
#ifdef __x86_64__
    case Isa::kX86V4: return x86_64_v4::backward(params);
    case Isa::kX86V3: return x86_64_v3::backward(params);
#endif
    default: return baseline::backward(params);
  }
}

}  // namespace crossvit::attention_core
