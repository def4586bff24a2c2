#include "layernorm_msa/cuda/launches.h"

namespace crossvit::layernorm_msa::cuda {
namespace {

// Heads of more than 64 channels need all registers for sums.
template <class T, int kHeadDim, int kTiles>
using BackwardPlan = AttentionPlan<T, kHeadDim, minimum(2048 / kHeadDim, 32), kTiles,
                                   sizeof(T) == 2 && kHeadDim <= 64>;
template <class T, int kHeadDim>
using QueriesPlan = BackwardPlan<T, kHeadDim, 1>;
template <class T, int kHeadDim>
using KeysPlan = BackwardPlan<T, kHeadDim, sizeof(T) == 2 && kHeadDim <= 32 ? 2 : 1>;

// A query's lse in base 2, and o . do; after the last token, where all weights are 0, infinity.
using QueryTerms = float2;
constexpr int kTermsOfCopy = 16 / static_cast<int>(sizeof(QueryTerms));

// Terms of a head's queries in memory: of whole tiles, so that copies are aligned.
template <class T>
__device__ QueryTerms* query_terms(const AttentionParams<T>& a, const BlockOfHead& block) {
  return a.query_terms + block.pair * a.tiles() * kRowsOfBlock;
}

// Finds the terms of the warp's queries, g and g + 8 of each tile, and stores them. All is loaded
// before any of it is used, without a branch.
template <class P>
__device__ __forceinline__ void find_terms(QueryTerms (&terms)[P::kTiles][2],
                                           const AttentionParams<typename P::T>& a,
                                           const BlockOfHead& block) {
  using T = typename P::T;
  const HeadRows<const T> o = rows_of_heads<T, const T>(a.heads, a, block);
  const HeadRows<const T> d = rows_of_heads(a.dheads, a, block);
  const float* const lse = a.lse + block.pair * a.num_tokens + block.first;
  const auto token_of = [](int i) { return P::first_row(i / 2) + 8 * (i % 2) + lane_index() / 4; };
  const auto column_of = [](int j) { return 8 * j + lane_index() % 4 * 2; };
  struct Loaded {
    Pair<T> o[P::kColumnTiles], d[P::kColumnTiles];
    float lse;
  } loaded[2 * P::kTiles];
#pragma unroll
  for (int i = 0; i < 2 * P::kTiles; ++i) {
    const int token = token_of(i), row = token < block.rows ? token : 0;
    loaded[i].lse = lse[row];
#pragma unroll
    for (int j = 0; j < P::kColumnTiles; ++j) {
      const int column = column_of(j) < a.head_dim ? column_of(j) : 0;
      loaded[i].o[j] = load_pair(o.row(block.first + row) + column);
      loaded[i].d[j] = load_pair(d.row(block.first + row) + column);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * P::kTiles; ++i) {
    const bool exists = token_of(i) < block.rows;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < P::kColumnTiles; ++j) {
      const float2 x = unpack<T>(loaded[i].o[j]), y = unpack<T>(loaded[i].d[j]);
      if (exists && column_of(j) < a.head_dim) sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
    }
    const float of_lse = exists ? loaded[i].lse * kLog2E : INFINITY;
    terms[i / 2][i % 2] = make_float2(of_lse, sum_of_row(sum));
    if (lane_index() % 4 == 0) {
      query_terms(a, block)[block.first + token_of(i)] = terms[i / 2][i % 2];
    }
  }
}

template <class P>
constexpr int kQueriesBytes = (2 * P::RowTile::kSize + 2 * P::kStages * P::StepTile::kSize) *
                              static_cast<int>(sizeof(typename P::T));

// Least blocks on a multiprocessor; 0 lets the compiler choose, which with a mask takes too few
// registers for floats.
template <class P, bool kMasked>
constexpr int kQueriesBlocks = kMasked && sizeof(typename P::T) == 4 ? 2 : 0;

// dq, and the queries' terms. A block has 64 queries; a step's rows are keys.
template <class P, bool kMasked>
__global__ void __launch_bounds__(P::kThreads, kQueriesBlocks<P, kMasked>)
    attention_backward_queries(const AttentionParams<typename P::T> a) {
  using T = typename P::T;
  CROSSVIT_DYNAMIC_SHARED(memory);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const d_tile = q_tile + P::RowTile::kSize;
  T* const stages = d_tile + P::RowTile::kSize;
  const BlockOfHead block(a);
  const HeadRows<const T> q = rows_of_qkv(a.qkv, a, block, 0), k = rows_of_qkv(a.qkv, a, block, 1),
                          v = rows_of_qkv(a.qkv, a, block, 2);
  const float scale = a.exponent_scale();
  P::copy_rows(q_tile, q, block.first, block.rows, a.head_dim);  // in the first step's group
  P::copy_rows(d_tile, rows_of_heads(a.dheads, a, block), block.first, block.rows, a.head_dim);

  WarpRows<P> q_rows(q_tile), d_rows(d_tile);
  QueryTerms terms[P::kTiles][2];
  HeadSums<P> dq;
  pipelined<P::kStages>(
      ceil_div(a.num_tokens, P::kStep),
      [&](int step, int stage) {
        const int first = step * P::kStep, count = minimum(a.num_tokens - first, P::kStep);
        T* const tile = stages + stage * 2 * P::StepTile::kSize;
        P::copy_step(tile, k, first, count, a.head_dim);
        P::copy_step(tile + P::StepTile::kSize, v, first, count, a.head_dim);
        if (step == 0) find_terms<P>(terms, a, block);  // while they are under way
      },
      [&](int step, int stage) {
        if (step == 0) q_rows.load(), d_rows.load();
        const T* const k_step = stages + stage * 2 * P::StepTile::kSize;
        auto s = products_with_step(q_rows, k_step);
        const auto dp = products_with_step(d_rows, k_step + P::StepTile::kSize);
#pragma unroll
        for (int tile = 0; tile < P::kTiles; ++tile) {
          exclude_others<kMasked>(s.tile[tile], a, block, step * P::kStep);
#pragma unroll
          for (int j = 0; j < P::kStep / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const QueryTerms& of_query = terms[tile][i / 2];
              float& x = s.tile[tile].of[j][i];
              const float p = exp2_approx(fmaf(x, scale, -of_query.x));
              x = p * (dp.tile[tile].of[j][i] - of_query.y);
            }
          }
        }
        add_weighted_step<P>(dq, s, k_step);
      });

  const HeadRows<T> out = rows_of_qkv(a.dqkv, a, block, 0);
#pragma unroll
  for (int i = 0; i < P::kTiles; ++i) {
    store_rows<P>(dq.tile[i], a.scale(), a.scale(), i, q_tile, out, block, a.head_dim);
  }
}

template <class P>
struct KeysMemory {
  using T = typename P::T;
  static constexpr int kTermsSize = P::kStep * static_cast<int>(sizeof(QueryTerms) / sizeof(T));
  static constexpr int kStageSize = 2 * P::StepTile::kSize + kTermsSize;  // in elements
  static constexpr int kBytes =
      (2 * P::RowTile::kSize + P::kStages * kStageSize) * static_cast<int>(sizeof(T));
};

// dk and dv. A block has 64 keys; a step's rows are queries.
template <class P>
__global__ void __launch_bounds__(P::kThreads)
    attention_backward_keys(const AttentionParams<typename P::T> a) {
  using T = typename P::T;
  using Memory = KeysMemory<P>;
  CROSSVIT_DYNAMIC_SHARED(memory);
  T* const k_tile = reinterpret_cast<T*>(memory);
  T* const v_tile = k_tile + P::RowTile::kSize;
  T* const stages = v_tile + P::RowTile::kSize;
  const BlockOfHead block(a);
  const HeadRows<const T> q = rows_of_qkv(a.qkv, a, block, 0);
  const HeadRows<const T> d = rows_of_heads(a.dheads, a, block);
  const QueryTerms* const terms = query_terms(a, block);
  const float scale = a.exponent_scale();
  P::copy_rows(k_tile, rows_of_qkv(a.qkv, a, block, 1), block.first, block.rows, a.head_dim);
  P::copy_rows(v_tile, rows_of_qkv(a.qkv, a, block, 2), block.first, block.rows, a.head_dim);

  WarpRows<P> k_rows(k_tile), v_rows(v_tile);
  HeadSums<P> dk, dv;
  pipelined<P::kStages>(
      ceil_div(a.num_tokens, P::kStep),
      [&](int step, int stage) {
        const int first = step * P::kStep, count = minimum(a.num_tokens - first, P::kStep);
        T* const tile = stages + stage * Memory::kStageSize;
        P::copy_step(tile, q, first, count, a.head_dim);
        P::copy_step(tile + P::StepTile::kSize, d, first, count, a.head_dim);
        QueryTerms* const of_step = reinterpret_cast<QueryTerms*>(tile + 2 * P::StepTile::kSize);
        const int i = thread_index() * kTermsOfCopy;
        if (i < P::kStep) copy_async_16(of_step + i, terms + first + i);
      },
      [&](int step, int stage) {
        if (step == 0) k_rows.load(), v_rows.load();
        const T* const q_step = stages + stage * Memory::kStageSize;
        const T* const d_step = q_step + P::StepTile::kSize;
        const QueryTerms* const of_step =
            reinterpret_cast<const QueryTerms*>(d_step + P::StepTile::kSize);
        auto p = products_with_step(k_rows, q_step);
        auto ds = products_with_step(v_rows, d_step);
#pragma unroll
        for (int j = 0; j < P::kStep / 8; ++j) {
          // Of queries 2 t and 2 t + 1.
          const float4 of_pair =
              *reinterpret_cast<const float4*>(of_step + 8 * j + lane_index() % 4 * 2);
#pragma unroll
          for (int tile = 0; tile < P::kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float lse = i % 2 ? of_pair.z : of_pair.x;
              const float delta = i % 2 ? of_pair.w : of_pair.y;
              float& weight = p.tile[tile].of[j][i];
              float& gradient = ds.tile[tile].of[j][i];
              weight = exp2_approx(fmaf(weight, scale, -lse));
              gradient = weight * (gradient - delta);
            }
          }
        }
        add_weighted_step<P>(dv, p, d_step);
        add_weighted_step<P>(dk, ds, q_step);
      });

#pragma unroll
  for (int i = 0; i < P::kTiles; ++i) {
    store_rows<P>(dk.tile[i], a.scale(), a.scale(), i, k_tile, rows_of_qkv(a.dqkv, a, block, 1),
                  block, a.head_dim);
    store_rows<P>(dv.tile[i], 1, 1, i, v_tile, rows_of_qkv(a.dqkv, a, block, 2), block, a.head_dim);
  }
}

template <class T>
void launch_attention(const AttentionParams<T>& a, cudaStream_t stream) {
  with_head_dim(a.head_dim, [&](auto head_dim) {
    using Queries = QueriesPlan<T, head_dim()>;
    using Keys = KeysPlan<T, head_dim()>;
    const auto of_queries = a.key_mask ? attention_backward_queries<Queries, true>
                                       : attention_backward_queries<Queries, false>;
    check_launch(launch(of_queries,
                        attention_config(a, Queries::kThreads, kQueriesBytes<Queries>, stream), a),
                 "attention_backward_queries");
    check_launch(launch(attention_backward_keys<Keys>,
                        attention_config(a, Keys::kThreads, KeysMemory<Keys>::kBytes, stream), a),
                 "attention_backward_keys");
  });
}

template <class T>
void run(const BackwardParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const Weights& w = params.weights;
  const int64_t width = problem.channels;
  linear<Linear::kBackward>(
      linear_params<T>(problem, params.dupdate, w.out.weight.data, width, width, params.dheads),
      stream);
  AttentionParams<T> attention =
      attention_params<T>(problem, params.qkv, params.key_mask, params.heads, params.lse);
  attention.dheads = static_cast<const T*>(params.dheads);
  attention.query_terms = reinterpret_cast<QueryTerms*>(params.query_terms);
  attention.dqkv = static_cast<T*>(params.dqkv);
  launch_attention(attention, stream);
  if (params.key_mask) zero_masked_keys(problem, params.key_mask, params.dqkv, sizeof(T), stream);
  linear<Linear::kBackward>(
      linear_params<T>(problem, params.dqkv, w.qkv.weight.data, 3 * width, width, params.dnormed),
      stream);
  layer_norm_backward(norm_backward_params<T>(params, params.normed), stream);
}

}  // namespace

// Forward's kernel has fewer tiles than any of these.
int shared_bytes(int head_dim, DType dtype) {
  int bytes = 0;
  with_element_type(dtype, [&](auto element) {
    with_head_dim(head_dim, [&](auto widest) {
      using T = decltype(element);
      bytes = maximum(kQueriesBytes<QueriesPlan<T, widest()>>,
                      KeysMemory<KeysPlan<T, widest()>>::kBytes);
    });
  });
  return bytes;
}

int64_t query_term_floats(const Problem& problem) {
  return problem.batch * problem.num_heads * round_up(problem.num_tokens, kRowsOfBlock) * 2;
}

int64_t norm_share_floats(const Problem& problem) {
  return norm_backward_blocks(problem.batch * problem.num_tokens) * 2 * problem.channels;
}

void backward(const BackwardParams& params, const Place& place) {
  const DeviceGuard guard(place.device);
  check_launch(guard.status, "layernorm_msa_backward");
  with_element_type(params.problem.dtype, [&](auto element) {
    run<decltype(element)>(params, static_cast<cudaStream_t>(place.stream));
  });
}

}  // namespace crossvit::layernorm_msa::cuda
