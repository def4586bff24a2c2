// Runs a kernel forward and backward on a case written by kernel_cases.py, optionally with a fault:
// run_case FILE [FAULT]. Every tensor is an allocation of exactly its bytes.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <vector>

#include "attention_core/cuda/kernels.h"
#include "common/cuda/gpu.h"
#include "cross_attention/cuda/kernels.h"
#include "kernels/choice.h"
#include "layernorm_ffn/cuda/kernels.h"
#include "layernorm_msa/cuda/kernels.h"

namespace crossvit {
namespace {

using bf16 = __nv_bfloat16;

constexpr double kMaxError = 0.02;  // relative root mean square: bfloat16 has 8 bits

struct Array {
  std::unique_ptr<char[]> memory;
  int64_t bytes = 0;

  explicit Array(int64_t size) : memory(size ? new char[size] : nullptr), bytes(size) {
    if (size) std::memset(memory.get(), 0xff, size);  // NaN
  }
  template <class T = void>
  T* as() const {
    return reinterpret_cast<T*>(memory.get());
  }
};

class File {
 public:
  explicit File(const char* name) : stream_(name, std::ios::binary) {
    stream_.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  }
  // An omitted array has no bytes.
  Array next() {
    int64_t size = 0;
    stream_.read(reinterpret_cast<char*>(&size), sizeof size);
    Array array(size);
    stream_.read(array.as<char>(), size);
    return array;
  }

 private:
  std::ifstream stream_;
};

float to_float(float x) { return x; }
float to_float(bf16 x) { return __bfloat162float(x); }

// Compares results with the expected ones, and hashes the bits of all results.
class Results {
 public:
  template <class T>
  void compare(const char* name, const Array& actual, const Array& expected) {
    const int64_t count = expected.bytes / static_cast<int64_t>(sizeof(double));
    if (actual.bytes != count * static_cast<int64_t>(sizeof(T))) {
      throw std::logic_error(std::string(name) + " has the wrong size");
    }
    double errors = 0, squares = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double value = expected.as<double>()[i];
      const double error = static_cast<double>(to_float(actual.as<T>()[i])) - value;
      errors += error * error;
      squares += value * value;
    }
    const double error = std::sqrt(errors / squares);
    const bool passes = count == 0 || error < kMaxError;  // NaN is not
    if (!passes) std::printf("wrong result: %s, error %.2g\n", name, error);
    passed_ = passed_ && passes;
    hash(actual);
  }
  // The last image's results, which must have the same bits when it is computed alone.
  void compare_last(const char* name, const Array& all, const Array& alone) {
    if (!alone.bytes) return;
    const char* last = all.as<char>() + all.bytes - alone.bytes;
    if (std::memcmp(last, alone.as(), alone.bytes) == 0) return;
    std::printf("wrong result: %s, bits that depend on the batch\n", name);
    passed_ = false;
  }
  void hash(const Array& actual) {
    for (int64_t i = 0; i < actual.bytes; ++i) {
      bits_ = (bits_ ^ static_cast<unsigned char>(actual.as<char>()[i])) * 0x100000001b3;
    }
  }
  bool report() const {
    std::printf("bits %016llx\n", bits_);
    return passed_;
  }

 private:
  unsigned long long bits_ = 0xcbf29ce484222325;
  bool passed_ = true;
};

// Clusters need sm_90; the results' bits do not depend on them.
int supported_blocks(int64_t blocks) { return __CUDA_ARCH__ < 900 ? 1 : static_cast<int>(blocks); }

template <class T>
Array like(const Array& expected) {
  return Array(expected.bytes / static_cast<int64_t>(sizeof(double) / sizeof(T)));
}

bool run_core(File& file, const int64_t* settings) {
  namespace core = attention_core;
  const int64_t batch = settings[0], tokens = settings[1], rows = settings[2],
                channels = settings[3];
  const bool normalize = settings[4];
  const int blocks = supported_blocks(settings[5]);
  const Array x = file.next(), extra = file.next(), u = file.next(), mask = file.next();
  const Array dm = file.next(), dlse = file.next();
  const Array expected_m = file.next(), expected_lse = file.next(), expected_du = file.next();
  const Array expected_dx = file.next(), expected_dextra = file.next();

  struct Computed {
    Array m, lse, du, dx, dextra;
  };
  // Of `count` images from the first-th on.
  const auto compute = [&](int64_t first, int64_t count) {
    const core::Problem problem = {count, tokens + (extra.bytes > 0), rows, channels, normalize,
                                   1e-6};
    const int64_t m_bytes = count * rows * channels * int64_t{sizeof(float)};
    const int64_t extra_bytes = extra.bytes / batch * count;
    Computed to = {Array(m_bytes), Array(m_bytes / channels), Array(m_bytes),
                   Array(x.bytes / batch * count), Array(extra_bytes)};
    // What is given for these images; an omitted array is null.
    const auto given = [&](const Array& array) -> void* {
      return array.bytes ? array.as<char>() + array.bytes / batch * first : nullptr;
    };
    const auto tokens_of = [&](void* all, void* first_token) -> core::Tokens {
      return {all, DType::kBFloat16, tokens * channels, channels, first_token, channels};
    };
    const auto rows_of = [&](void* all) -> core::Rows { return {all, rows * channels, channels}; };
    const core::Mask mask_params = {static_cast<const bool*>(given(mask)), tokens, 1};
    const core::Tokens x_params = tokens_of(given(x), given(extra));
    const core::Rows u_params = rows_of(given(u)), m_params = rows_of(to.m.as());
    {
      const Array workspace(core::cuda::forward_workspace(problem, blocks) *
                            int64_t{sizeof(float)});
      core::cuda::forward({problem, x_params, u_params, mask_params, m_params, to.lse.as()}, blocks,
                          workspace.as<float>(), {});
    }
    const Array workspace(core::cuda::backward_workspace(problem, blocks) * int64_t{sizeof(float)});
    core::cuda::backward(
        {problem, x_params, u_params, mask_params, m_params, to.lse.as(), rows_of(given(dm)),
         given(dlse), rows_of(to.du.as()), tokens_of(to.dx.as(), to.dextra.as())},
        blocks, workspace.as<float>(), {});
    return to;
  };
  const Computed all = compute(0, batch);
  Results results;
  results.compare<float>("m", all.m, expected_m);
  results.compare<float>("lse", all.lse, expected_lse);
  results.compare<float>("du", all.du, expected_du);
  results.compare<bf16>("dx", all.dx, expected_dx);
  results.compare<bf16>("dextra", all.dextra, expected_dextra);
  if (batch > 1) {
    const Computed alone = compute(batch - 1, 1);
    results.compare_last("m", all.m, alone.m);
    results.compare_last("lse", all.lse, alone.lse);
    results.compare_last("du", all.du, alone.du);
    results.compare_last("dx", all.dx, alone.dx);
    results.compare_last("dextra", all.dextra, alone.dextra);
  }
  return results.report();
}

bool run_fusion(File& file, const int64_t* settings) {
  namespace fusion = cross_attention;
  const int64_t batch = settings[0];
  const int tokens = static_cast<int>(settings[1]), channels = static_cast<int>(settings[2]);
  const int cls_channels = static_cast<int>(settings[3]), heads = static_cast<int>(settings[4]);
  const fusion::cuda::ClusterShape shape = {static_cast<int>(settings[5]),
                                            supported_blocks(settings[6])};
  choice::aliased = settings[7];
  const Array cls = file.next(), x = file.next(), scale = file.next(), dnew_cls = file.next();
  std::vector<Array> arrays;
  for (int i = 0; i < 18; ++i) arrays.push_back(file.next());
  const auto parameter = [](const Array& array) -> fusion::Parameter {
    return {array.as(), DType::kBFloat16};
  };
  const auto layer = [&](int i) -> fusion::Layer {
    return {parameter(arrays[2 * i]), parameter(arrays[2 * i + 1])};
  };
  const fusion::Weights weights = {layer(0), layer(1), layer(2), layer(3), layer(4),
                                   layer(5), layer(6), layer(7), layer(8)};
  const Array expected_new_cls = file.next(), expected_dcls = file.next();
  const Array expected_dx = file.next(), expected_gradients = file.next();

  const auto tokens_of = [&](const Array& array) -> attention_core::Tokens {
    return {array.as(), DType::kBFloat16, int64_t{tokens} * channels, channels, nullptr, 0};
  };
  constexpr double kEps = 1e-6;
  const fusion::Problem problem = {batch, tokens, channels, cls_channels, heads, kEps};
  const int64_t rows = int64_t{heads} * batch * channels * int64_t{sizeof(float)};
  const Array vectors(batch * fusion::Vectors::size(problem) * int64_t{sizeof(float)});
  const fusion::Parameter residual_scale = {scale.as(), DType::kFloat32};
  const Array new_cls = like<bf16>(expected_new_cls), dcls = like<bf16>(expected_dcls);
  const Array dx = like<bf16>(expected_dx), gradients = like<float>(expected_gradients);
  const Array dz(rows), du(rows), residuals(2 * rows / heads);
  const Array partials(fusion::cuda::workspace_size(problem, shape) * int64_t{sizeof(float)});
  float* const workspace = partials.as<float>();
  fusion::cuda::forward({problem, parameter(cls), tokens_of(x), weights, residual_scale,
                         vectors.as(), nullptr, new_cls.as(), DType::kBFloat16},
                        shape, workspace, {});
  fusion::cuda::backward(
      {problem, parameter(dnew_cls), parameter(cls), tokens_of(x), weights, residual_scale,
       vectors.as(), dcls.as(), tokens_of(dx), gradients.as<float>(), dz.as<float>(),
       du.as<float>(), residuals.as<float>()},
      shape, workspace, {});
  Results results;
  results.compare<bf16>("new_cls", new_cls, expected_new_cls);
  results.compare<bf16>("dcls", dcls, expected_dcls);
  results.compare<bf16>("dx", dx, expected_dx);
  results.compare<float>("gradients", gradients, expected_gradients);
  for (const Array* array : {&vectors, &du}) results.hash(*array);
  return results.report();
}

// The inputs of half a transformer block: [B, N, C] with, for MSA, a CLS. Omitted arrays are null.
struct BlockInputs {
  int64_t batch, tokens, channels, heads_or_hidden;
  Activation activation;
  Array x, cls, scale, layer_scale, key_mask, dy, dupdate;
  std::vector<Array> weights;

  BlockInputs(File& file, const int64_t* settings)
      : batch(settings[0]),
        tokens(settings[1]),
        channels(settings[2]),
        heads_or_hidden(settings[3]),
        activation(static_cast<Activation>(settings[4])),
        x(file.next()),
        cls(file.next()),
        scale(file.next()),
        layer_scale(file.next()),
        key_mask(file.next()),
        dy(file.next()),
        dupdate(file.next()) {
    for (int i = 0; i < 6; ++i) weights.push_back(file.next());
  }

  template <class Problem>
  Problem problem() const {
    return {batch, tokens, channels, heads_or_hidden, 1e-6, DType::kBFloat16};
  }
  template <class Weights>
  Weights layers() const {
    const auto layer = [&](int i) -> cross_attention::Layer {
      return {parameter(weights[2 * i]), parameter(weights[2 * i + 1])};
    };
    return {layer(0), layer(1), layer(2)};
  }
  static cross_attention::Parameter parameter(const Array& array) {
    return {array.as(), DType::kBFloat16};
  }
  attention_core::Tokens tokens_of(const Array& all, const Array& first) const {
    return {all.as(), DType::kBFloat16, tokens * channels, channels, first.as(), channels};
  }
  // Rows of this width for all tokens.
  Array rows(int64_t width) const { return Array(batch * tokens * width * int64_t{sizeof(bf16)}); }
};

// The gradients of LayerNorm's weight and bias.
Array sum_of_shares(const Array& shares, int64_t channels) {
  const int64_t width = 2 * channels;
  Array sums(width * int64_t{sizeof(float)});
  for (int64_t c = 0; c < width; ++c) {
    sums.as<float>()[c] = 0;
    for (int64_t i = c; i < shares.bytes / int64_t{sizeof(float)}; i += width) {
      sums.as<float>()[c] += shares.as<float>()[i];
    }
  }
  return sums;
}

bool run_msa(File& file, const int64_t* settings) {
  namespace msa = layernorm_msa::cuda;
  const BlockInputs in(file, settings);
  const Array expected_y = file.next(), expected_dx = file.next(), expected_dcls = file.next();
  const Array expected_dnorm = file.next();
  const auto problem = in.problem<msa::Problem>();
  const auto weights = in.layers<msa::Weights>();
  const auto x = in.tokens_of(in.x, in.cls);
  const int64_t width = in.channels;
  const Array normed = in.rows(width), qkv = in.rows(3 * width), heads = in.rows(width);
  const Array lse(in.batch * in.heads_or_hidden * in.tokens * int64_t{sizeof(float)});
  const Array y = like<bf16>(expected_y);
  const bool* const mask = in.key_mask.as<const bool>();
  msa::forward({problem, x, weights, in.scale.as<float>(), in.parameter(in.layer_scale), mask,
                normed.as(), qkv.as(), heads.as(), lse.as<float>(), y.as(), DType::kBFloat16},
               {});
  const Array dheads = in.rows(width), dqkv = in.rows(3 * width), dnormed = in.rows(width);
  const Array terms(msa::query_term_floats(problem) * int64_t{sizeof(float)});
  const Array shares(msa::norm_share_floats(problem) * int64_t{sizeof(float)});
  const Array again = in.rows(width), dx = like<bf16>(expected_dx);
  const Array dcls = like<bf16>(expected_dcls);
  msa::backward({problem, x, weights, mask, qkv.as(), heads.as(), lse.as<float>(),
                 in.parameter(in.dy), in.dupdate.as(), dheads.as(), terms.as<float>(), dqkv.as(),
                 dnormed.as(), again.as(), in.tokens_of(dx, dcls), shares.as<float>()},
                {});
  Results results;
  results.compare<bf16>("y", y, expected_y);
  results.compare<bf16>("dx", dx, expected_dx);
  results.compare<bf16>("dcls", dcls, expected_dcls);
  results.compare<float>("dnorm", sum_of_shares(shares, width), expected_dnorm);
  for (const Array* array : {&lse, &dqkv, &again}) results.hash(*array);
  return results.report();
}

bool run_ffn(File& file, const int64_t* settings) {
  namespace ffn = layernorm_ffn::cuda;
  const BlockInputs in(file, settings);
  const Array expected_y = file.next(), expected_dx = file.next(), expected_dnorm = file.next();
  const auto problem = in.problem<ffn::Problem>();
  const auto weights = in.layers<ffn::Weights>();
  const auto x = in.tokens_of(in.x, in.cls);
  const int64_t width = in.channels, hidden_width = in.heads_or_hidden;
  const Array normed = in.rows(width), activated = in.rows(hidden_width);
  const Array y = like<bf16>(expected_y);
  ffn::forward(
      {problem, x, weights, in.activation, in.scale.as<float>(), in.parameter(in.layer_scale),
       normed.as(), activated.as(), y.as(), DType::kBFloat16},
      {});
  const Array again = in.rows(hidden_width), dhidden = in.rows(hidden_width);
  const Array shares(ffn::norm_share_floats(problem) * int64_t{sizeof(float)});
  const Array dnormed = in.rows(width), dx = like<bf16>(expected_dx);
  ffn::backward(
      {problem, x, weights, in.activation, in.parameter(in.dy), in.dupdate.as(), normed.as(),
       again.as(), dhidden.as(), dnormed.as(), in.tokens_of(dx, in.cls), shares.as<float>()},
      {});
  Results results;
  results.compare<bf16>("y", y, expected_y);
  results.compare<bf16>("dx", dx, expected_dx);
  results.compare<float>("dnorm", sum_of_shares(shares, width), expected_dnorm);
  for (const Array* array : {&normed, &again, &dhidden}) results.hash(*array);
  return results.report();
}

}  // namespace
}  // namespace crossvit

int main(int count, char** arguments) {
  using namespace crossvit;
  try {
    if (count > 2) choice::fault = std::atoi(arguments[2]);
    File file(arguments[1]);
    const Array settings = file.next();
    constexpr decltype(&run_core) kRuns[] = {run_core, run_fusion, run_msa, run_ffn};
    const auto run = kRuns[settings.as<int64_t>()[0]];
    return run(file, settings.as<int64_t>() + 1) ? 0 : 1;
  } catch (const std::exception& fault) {
    std::printf("fault: %s\n", fault.what());
    return 2;
  }
}
