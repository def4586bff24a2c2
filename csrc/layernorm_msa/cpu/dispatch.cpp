#include "common/cpu/isa.h"
#include "layernorm_msa/params.h"

namespace crossvit::layernorm_msa {

// forward.cpp
CROSSVIT_DECLARE_PER_ISA(void forward(const ForwardParams& params))

void forward(const ForwardParams& params) { CROSSVIT_CALL_ACTIVE_ISA(forward, params) }

}  // namespace crossvit::layernorm_msa
