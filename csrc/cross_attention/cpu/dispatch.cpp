#include "common/cpu/isa.h"
#include "cross_attention/params.h"

namespace crossvit::cross_attention {

// forward.cpp
CROSSVIT_DECLARE_PER_ISA(void forward(const ForwardParams& params))

void forward(const ForwardParams& params) { CROSSVIT_CALL_ACTIVE_ISA(forward, params) }

}  // namespace crossvit::cross_attention
