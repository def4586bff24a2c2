#include "attention_core/params.h"
#include "common/cpu/isa.h"

namespace crossvit::attention_core {

// forward.cpp and backward.cpp
CROSSVIT_DECLARE_PER_ISA(void forward(const ForwardParams& params))
CROSSVIT_DECLARE_PER_ISA(void backward(const BackwardParams& params))

void forward(const ForwardParams& params) { CROSSVIT_CALL_ACTIVE_ISA(forward, params) }
void backward(const BackwardParams& params) { CROSSVIT_CALL_ACTIVE_ISA(backward, params) }

}  // namespace crossvit::attention_core
