// LayerNorm with the projection of queries, keys and values; attention; the output projection with
// the residual: three passes. Compiled once for each instruction-set level; CROSSVIT_ISA names the
// level's namespace.

#include "common/cpu/token_rows.h"
#include "layernorm_msa/cpu/attention.h"

namespace crossvit::layernorm_msa {
namespace {

void project_qkv(const ForwardParams& params) {
  const TokensParams& x = params.x;
  const int64_t num_rows = x.batch * x.num_tokens, width = 3 * x.channels;
  const PackedNorm norm(params.norm, x.channels);
  const PackedLinear qkv(params.qkv.weight, params.qkv.bias, width, x.channels);
  each_group(num_rows, qkv.work(), qkv.in(),
             [&](int64_t first, int64_t count, int64_t blocks, float* normed) {
               for (int64_t i = 0; i < count; ++i)
                 norm.apply(normed, i, token(x, first + i), first + i);
               qkv.apply(normed, blocks, [&](int64_t n, const float* product) {
                 store_columns(params.qkv_rows, width, first, count, n, product);
               });
             });
}

void project_out(const ForwardParams& params) {
  const TokensParams& x = params.x;
  const int64_t num_rows = x.batch * x.num_tokens;
  const PackedLinear out(params.out.weight, params.out.bias, x.channels, x.channels);
  each_group(num_rows, out.work(), out.in(),
             [&](int64_t first, int64_t count, int64_t blocks, float* rows) {
               for (int64_t i = 0; i < count; ++i) {
                 const float* const from = params.heads + (first + i) * x.channels;
                 float* const to = packed_row(rows, i, out.in());
                 each_packed_vector(x.channels, [&](int64_t c, int64_t packed, int64_t left) {
                   store(to + packed, load_at_most(from + c, left));
                 });
               }
               out.apply(rows, blocks, [&](int64_t n, const float* product) {
                 store_residual(params.y, x, params.residual_scale, params.layer_scale, first,
                                count, n, product);
               });
             });
}

}  // namespace

namespace CROSSVIT_ISA {

void forward(const ForwardParams& params) {
  project_qkv(params);
  attention(params);
  project_out(params);
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit::layernorm_msa
