#include "common/cpu/isa.h"
#include "layernorm_ffn/params.h"

namespace crossvit::layernorm_ffn {

CROSSVIT_DISPATCH(forward, ForwardParams)

}  // namespace crossvit::layernorm_ffn
