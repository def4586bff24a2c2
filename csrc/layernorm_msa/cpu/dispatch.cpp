#include "common/cpu/isa.h"
#include "layernorm_msa/params.h"

namespace crossvit::layernorm_msa {

CROSSVIT_DISPATCH(forward, ForwardParams)

}  // namespace crossvit::layernorm_msa
