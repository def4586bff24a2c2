#include "attention_core/params.h"
#include "common/isa.h"

namespace crossvit::attention_core {

// cpu/forward.cpp and cpu/backward.cpp
CROSSVIT_DECLARE_PER_ISA(void forward(const ForwardParams& params))
CROSSVIT_DECLARE_PER_ISA(void backward(const BackwardParams& params))

void forward(const ForwardParams& params) { CROSSVIT_CALL_ACTIVE_ISA(forward, params) }
void backward(const BackwardParams& params) { CROSSVIT_CALL_ACTIVE_ISA(backward, params) }

}  // namespace crossvit::attention_core
