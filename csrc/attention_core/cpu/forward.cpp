// Compiled once for each instruction-set level; CROSSVIT_ISA names the level's namespace.

#include "attention_core/cpu/forward.h"

namespace crossvit::attention_core::CROSSVIT_ISA {

void forward(const ForwardParams& params) {
  dispatch(params.x.dtype, [&](auto token) { forward_tokens<decltype(token)>(params); });
}

}  // namespace crossvit::attention_core::CROSSVIT_ISA
