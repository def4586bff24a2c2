// LayerNorm, both linear layers, the activation and the residual in one pass over the tokens.
// Compiled once for each instruction-set level; CROSSVIT_ISA names the level's namespace.
//
// A group of tokens goes through all of it while its hidden units are in L2.

#include "layernorm_ffn/params.h"

#include "common/cpu/activations.h"
#include "common/cpu/token_rows.h"

namespace crossvit::layernorm_ffn {
namespace CROSSVIT_ISA {

void forward(const ForwardParams& params) {
  const TokensParams& x = params.x;
  const int64_t num_rows = x.batch * x.num_tokens;
  const PackedNorm norm(params.norm, x.channels);
  const PackedLinear fc1(params.fc1.weight, params.fc1.bias, params.hidden_width, x.channels);
  const PackedLinear fc2(params.fc2.weight, params.fc2.bias, x.channels, params.hidden_width);
  each_group(num_rows, fc1.work() + fc2.work(), fc1.in() + fc2.in(),
             [&](int64_t first, int64_t count, int64_t blocks, float* normed) {
               float* const activated = normed + kBlocks * kRows * fc1.in();
               for (int64_t i = 0; i < count; ++i)
                 norm.apply(normed, i, token(x, first + i), first + i);
               fc1.apply(normed, blocks, [&](int64_t n, float* product) {
                 if (params.hidden)
                   store_columns(params.hidden, params.hidden_width, first, count, n, product);
                 for (int64_t i = 0; i < blocks; ++i) {
                   const float* const from = product + i * kRows * kPanel;
                   float* const to = activated + i * kRows * fc2.in() + n * kRows;
                   activate(params.activation, from, to, kRows * kPanel);
                   if (params.activated)
                     store_columns(params.activated, params.hidden_width, first + i * kRows,
                                   minimum(kRows, count - i * kRows), n, to);
                 }
               });
               fc2.apply(activated, blocks, [&](int64_t n, const float* product) {
                 store_residual(params.y, x, params.residual_scale, params.layer_scale, first,
                                count, n, product);
               });
             });
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit::layernorm_ffn
