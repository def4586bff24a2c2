// The fusion of one branch, forward. Compiled once for each instruction-set level; CROSSVIT_ISA
// names the level's namespace.
//
// Three parallel loops: the CLS paths up to u, over blocks of kImages images, as small matrix
// products that share each weight read; the token pass; and the CLS paths from m on. In between the
// tokens stream through the caches, so the weights are read from memory twice, not once per image.

#include "attention_core/cpu/forward.h"
#include "cross_attention/cpu/linear.h"

namespace crossvit::cross_attention {
namespace {

namespace core = attention_core;

template <class Token>
class Fusion {
 public:
  using Scalar = core::ScalarFor<Token>;
  using V = Vector<Scalar>;

  explicit Fusion(const ForwardParams& params)
      : params_(params),
        problem_(params.problem),
        channels_(problem_.channels),
        cls_channels_(problem_.cls_channels),
        head_dim_(channels_ / problem_.num_heads),
        stride_(padded<Scalar>(channels_)),
        cls_stride_(padded<Scalar>(cls_channels_)),
        has_f_(params.weights.proj.weight.data != nullptr),
        has_g_(params.weights.back.weight.data != nullptr),
        batch_(round_up(problem_.batch, kImages)),
        saved_(VectorsOf<Scalar>::at(static_cast<Scalar*>(params.vectors), problem_)),
        proj_(matrix(params.weights.proj, has_f_ ? channels_ : 0, cls_channels_)),
        query_(matrix(params.weights.query, channels_, channels_)),
        key_(params.weights.key.weight, channels_, channels_, true),
        value_(params.weights.value.weight, channels_, channels_, head_dim_ % 2 == 0),
        out_(matrix(params.weights.out, channels_, channels_)),
        back_(matrix(params.weights.back, has_g_ ? cls_channels_ : 0, channels_)),
        vectors_(9 * stride_ + 3 * cls_stride_),
        proj_norm_{vectors_.load(params.weights.proj_norm.weight, cls_channels_),
                   vectors_.load(params.weights.proj_norm.bias, cls_channels_)},
        norm_{vectors_.load(params.weights.norm.weight, channels_),
              vectors_.load(params.weights.norm.bias, channels_)},
        back_norm_{vectors_.load(params.weights.back_norm.weight, channels_),
                   vectors_.load(params.weights.back_norm.bias, channels_)},
        proj_bias_(vectors_.load(params.weights.proj.bias, channels_)),
        query_bias_(vectors_.load(params.weights.query.bias, channels_)),
        value_bias_(vectors_.load(params.weights.value.bias, channels_)),
        out_bias_(vectors_.load(params.weights.out.bias, channels_)),
        back_bias_(vectors_.load(params.weights.back.bias, cls_channels_)),
        u_memory_(problem_.num_heads * batch_ * stride_),
        u_(u_memory_.take(problem_.num_heads * batch_ * stride_)) {
    core::Tokens tokens = params.tokens;
    tokens.extra = params.y0_token ? params.y0_token : saved_.y0;
    tokens.extra_batch_stride = channels_;
    core_ = {{problem_.batch, problem_.num_tokens + 1, problem_.num_heads, channels_, true,
              problem_.eps},
             tokens,
             {u_, stride_, batch_ * stride_},
             {nullptr, 0, 0},
             {saved_.m, channels_, problem_.batch * channels_},
             saved_.lse};
  }

  void run() {
    each_block([&](Block& block, int64_t first) { before_tokens(block, first); });
    core::forward_tokens<Token>(core_);
    each_block([&](Block& block, int64_t first) { after_tokens(block, first); });
  }

 private:
  // Scratch for kImages images.
  struct Block {
    explicit Block(const Fusion& fusion)
        : memory(kImages * (3 * fusion.stride_ + 2 * fusion.cls_stride_)),
          cls(memory.take(kImages * fusion.cls_stride_)),
          new_cls(memory.take(kImages * fusion.cls_stride_)),
          a(memory.take(kImages * fusion.stride_)),
          b(memory.take(kImages * fusion.stride_)),
          c(memory.take(kImages * fusion.stride_)) {
      std::memset(cls, 0, kImages * 2 * fusion.cls_stride_ * sizeof(Scalar));
      std::memset(a, 0, kImages * 3 * fusion.stride_ * sizeof(Scalar));
    }

    Scratch<Scalar> memory;
    Scalar *cls, *new_cls;  // [kImages, C_cls]
    Scalar *a, *b, *c;      // [kImages, C]
  };

  template <class Run>
  void each_block(const Run& run) {
    const int64_t weights = channels_ * (2 * channels_ + cls_channels_);
    parallel_for(batch_ / kImages, kImages * weights, [&](int64_t begin, int64_t end) {
      Block block(*this);
      for (int64_t i = begin; i < end; ++i) run(block, i * kImages);
    });
  }

  static Matrix<Scalar> matrix(const Layer& layer, int64_t out, int64_t in) {
    return {layer.weight, out, in, out % 2 == 0};
  }

  int images(int64_t first) const { return minimum(kImages, problem_.batch - first); }
  Scalar* saved(Scalar* tensor, int64_t b) const { return tensor + b * channels_; }
  Scalar* saved(Scalar* tensor, int64_t h, int64_t b) const {
    return saved(tensor, h * problem_.batch + b);
  }

  // y0 = f(cls), q = W_q LN(y0) + b_q, kt_h = W_k,h^T q_h / sqrt(d), u_h = gamma * kt_h
  void before_tokens(Block& block, int64_t first) {
    const int count = images(first);
    project(block, first, count);
    for (int i = 0; i < count; ++i) {
      const Scalar* const y0 = block.c + i * stride_;
      write_row(saved(saved_.y0, first + i), y0, channels_);
      if (params_.y0_token)
        write_row(static_cast<Token*>(params_.y0_token) + (first + i) * channels_, y0, channels_);
      norm_.apply(block.a + i * stride_, y0, channels_, Scalar(problem_.eps));
      write_row(saved(saved_.normed, first + i), block.a + i * stride_, channels_);
    }
    linear(block.b, stride_, block.a, stride_, query_.rows, query_bias_, channels_);
    for (int i = 0; i < count; ++i)
      write_row(saved(saved_.q, first + i), block.b + i * stride_, channels_);

    const Scalar scale = 1 / sqrt(Scalar(head_dim_));
    core::NoPrefetch prefetcher(nullptr, 0);
    for (int64_t h = 0; h < problem_.num_heads; ++h) {
      core::rank_update<Scalar>(block.c, nullptr, {block.b + h * head_dim_, stride_, 1}, kImages,
                                key_.rows + h * head_dim_ * stride_, head_dim_, stride_,
                                prefetcher);
      for (int i = 0; i < count; ++i) {
        Scalar* const kt = block.c + i * stride_;
        Scalar* const u = u_ + (h * batch_ + first + i) * stride_;
        for (int64_t c = 0; c < stride_; c += kLanes<Scalar>) {
          store(kt + c, load(kt + c) * scale);
          store(u + c, load(kt + c) * load(norm_.weight + c));
        }
        write_row(saved(saved_.kt, h, first + i), kt, channels_);
      }
    }
  }

  // block.c = f(cls)
  void project(Block& block, int64_t first, int count) {
    for (int i = 0; i < count; ++i) {
      if (!has_f_) {
        load_row(block.c + i * stride_, params_.cls, (first + i) * channels_, channels_);
        continue;
      }
      Scalar* const cls = block.cls + i * cls_stride_;
      load_row(cls, params_.cls, (first + i) * cls_channels_, cls_channels_);
      norm_gelu(cls, cls, proj_norm_, cls_channels_);
      write_row(saved_.activated + (first + i) * cls_channels_, cls, cls_channels_);
    }
    if (has_f_) linear(block.c, stride_, block.cls, cls_stride_, proj_.rows, proj_bias_, channels_);
  }

  // o_h = W_v,h (gamma * m_h + beta) + b_v,h, y = y0 + r (W_o o + b_o), new_cls = g(y)
  void after_tokens(Block& block, int64_t first) {
    const int count = images(first);
    for (int64_t h = 0; h < problem_.num_heads; ++h) {
      for (int i = 0; i < count; ++i) {
        Scalar* const z = block.a + i * stride_;
        const Scalar* const m = saved(saved_.m, h, first + i);
        for (int64_t c = 0; c < channels_; ++c) z[c] = m[c] * norm_.weight[c] + norm_.bias[c];
      }
      linear(block.b + h * head_dim_, stride_, block.a, stride_,
             value_.rows + h * head_dim_ * stride_, value_bias_ + h * head_dim_, head_dim_);
    }
    linear(block.c, stride_, block.b, stride_, out_.rows, out_bias_, channels_);
    for (int i = 0; i < count; ++i) {
      write_row(saved(saved_.o, first + i), block.b + i * stride_, channels_);
      Scalar* const y = block.c + i * stride_;
      const void* const scales = params_.residual_scale.data;
      const Scalar scale = scales ? static_cast<const Scalar*>(scales)[first + i] : Scalar{1};
      const Scalar* const y0 = saved(saved_.y0, first + i);
      for (int64_t c = 0; c < channels_; ++c) y[c] = y0[c] + y[c] * scale;
      write_row(saved(saved_.y, first + i), y, channels_);
      if (!has_g_) {
        write_new_cls(first + i, y, channels_);
        continue;
      }
      norm_gelu(block.a + i * stride_, y, back_norm_, channels_);
      write_row(saved(saved_.back_activated, first + i), block.a + i * stride_, channels_);
    }
    if (!has_g_) return;
    linear(block.new_cls, cls_stride_, block.a, stride_, back_.rows, back_bias_, cls_channels_);
    for (int i = 0; i < count; ++i)
      write_new_cls(first + i, block.new_cls + i * cls_stride_, cls_channels_);
  }

  void norm_gelu(Scalar* to, const Scalar* from, const LayerNorm<Scalar>& norm, int64_t channels) {
    norm.apply(to, from, channels, Scalar(problem_.eps));
    for (int64_t c = 0; c < padded<Scalar>(channels); c += kLanes<Scalar>)
      store(to + c, gelu(load(to + c)));
  }

  template <class Element>
  static void write_row(Element* to, const Scalar* from, int64_t count) {
    int64_t c = 0;
    for (; c + kLanes<Scalar> <= count; c += kLanes<Scalar>) store(to + c, load(from + c));
    if (c < count) store_partial<Scalar>(to + c, load(from + c), count - c);
  }

  void write_new_cls(int64_t b, const Scalar* from, int64_t channels) {
    visit<Scalar>({params_.new_cls, params_.new_cls_dtype}, [&](const auto* data) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
      write_row(const_cast<Element*>(data) + b * channels, from, channels);
    });
  }

  const ForwardParams& params_;
  const Problem& problem_;
  const int64_t channels_, cls_channels_, head_dim_, stride_, cls_stride_;
  const bool has_f_, has_g_;  // else they are the identity
  const int64_t batch_;
  const VectorsOf<Scalar> saved_;
  const Matrix<Scalar> proj_, query_, key_, value_, out_, back_;
  PaddedVectors<Scalar> vectors_;
  const LayerNorm<Scalar> proj_norm_, norm_, back_norm_;
  const Scalar *proj_bias_, *query_bias_, *value_bias_, *out_bias_, *back_bias_;
  Scratch<Scalar> u_memory_;
  Scalar* const u_;  // [h, batch_, C]
  core::ForwardParams core_;
};

}  // namespace

namespace CROSSVIT_ISA {

void forward(const ForwardParams& params) {
  core::dispatch(params.tokens.dtype, [&](auto token) { Fusion<decltype(token)>(params).run(); });
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit::cross_attention
