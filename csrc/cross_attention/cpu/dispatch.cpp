#include "common/cpu/isa.h"
#include "cross_attention/params.h"

namespace crossvit::cross_attention {

CROSSVIT_DISPATCH(forward, ForwardParams)

}  // namespace crossvit::cross_attention
