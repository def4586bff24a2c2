#include "attention_core/params.h"
#include "common/cpu/isa.h"

namespace crossvit::attention_core {

CROSSVIT_DISPATCH(forward, ForwardParams)
CROSSVIT_DISPATCH(backward, BackwardParams)

}  // namespace crossvit::attention_core
