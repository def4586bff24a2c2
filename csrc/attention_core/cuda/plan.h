#pragma once

#include "attention_core/params.h"
#include "common/cuda/async_copy.h"
#include "common/cuda/fragments.h"
#include "common/cuda/warp_barrier.h"

// How a block of threads passes over a range of an image's tokens.
//
// A tile is 16 tokens. It belongs to a team of warps, each of which has its own slice of the
// channels, in units of 16, and its own ring of tiles in shared memory, which it fills with
// asynchronous copies. Teams take turns: tile i is team i % teams'. With one warp a team, warps
// meet only at the range's end, where their sums are added in a fixed order; with more, the warps
// of a team exchange the partial scores of a tile. A block has as many teams as it has warps for.
//
// A plan is what kernels are compiled for, which takes seconds each. So one serves several widths:
// the warps of a team follow from the channels, between kLeastSplit and kMostSplit.

namespace crossvit::attention_core {

constexpr int kTokensOfTile = 16;

// Tokens [first, last) of an image. Blocks that share it take turns: tile i is block i % ranks'.
struct Range {
  int first, last;
  int rank = 0, ranks = 1;
};

template <class T, int kUnits_, int kGroups_, int kLeastSplit_, int kMostSplit_, int kStages_>
struct Plan {
  using Element = T;
  static constexpr int kUnits = kUnits_;            // at most so many of 16 channels a warp
  static constexpr int kGroups = kGroups_;          // of 8 score rows
  static constexpr int kLeastSplit = kLeastSplit_;  // warps of a team, a power of two
  static constexpr int kMostSplit = kMostSplit_;
  static constexpr bool kTeams = kMostSplit > 1;
  static constexpr int kStages = kStages_;  // of a ring, at most
  static constexpr int kTokens = kTokensOfTile;
  static constexpr int kRows = 8 * kGroups;
  static constexpr int kMaxThreads = 256;
  // Units at once where none keeps registers for later; the widest plans spill with more.
  static constexpr int kUnroll = 2;
  static constexpr int kMaxChannels = 16 * kUnits * kMostSplit;

  // Warps of a team, and their number's logarithm.
  __host__ __device__ static int split(int channels) { return 1 << split_log(channels); }
  __host__ __device__ static int split_log(int channels) {
    int log = 0;
    for (int split = 1; split < kMostSplit; split *= 2) {
      log += split < kLeastSplit || channels > 16 * kUnits * split;
    }
    return log;
  }
  // Shared memory has one tile of the widest floats.
  __host__ __device__ static int stages(int channels) {
    constexpr int kTwo = 768;  // channels of the widest that it has two of
    return sizeof(T) == 4 && kMaxChannels > kTwo && channels > kTwo ? 1 : kStages;
  }

  static int threads(int channels, int teams) { return 32 * split(channels) * teams; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int warps() { return static_cast<int>(blockDim.x) / 32; }
  __device__ static int teams(int channels) { return warps() >> split_log(channels); }
  __device__ static int team(int channels) { return warp() >> split_log(channels); }
  // This warp's place in its team.
  __device__ static int part(int channels) { return warp() & (split(channels) - 1); }

  // The team's tile of a turn, counted from the range's first, and its first token.
  __device__ static int tile_of(int channels, const Range& range, int turn) {
    return (turn * teams(channels) + team(channels)) * range.ranks + range.rank;
  }
  __device__ static int tiles_of(const Range& range) {
    return (range.last - range.first + kTokens - 1) / kTokens;
  }
  __device__ static int token_of(int channels, const Range& range, int turn) {
    return range.first + tile_of(channels, range, turn) * kTokens;
  }

  __device__ static void meet_team(int channels) {
    if constexpr (!kTeams) {
      __syncwarp();
    } else {
      barrier_of_warps(1 + team(channels), 32 * split(channels));
    }
  }

  // From a row of a tile to the next, in elements; 16 bytes more than what is in it, so that 8 rows
  // lie in different banks.
  __host__ __device__ static int tile_pitch(int channels) {
    const int most = (channels / 16 + split(channels) - 1) >> split_log(channels);
    return most * 16 + static_cast<int>(16 / sizeof(T));
  }
  // The same of whole rows of channels.
  __host__ __device__ static int row_pitch(int channels) {
    return channels + static_cast<int>(16 / sizeof(T));
  }
};

// The channels of a warp.
struct Slice {
  int first;  // channel
  int units;

  // parts: as a logarithm.
  __device__ static Slice of(int channels, int part, int log_of_parts) {
    const int all = channels / 16, begin = all * part >> log_of_parts;
    return {begin * 16, (all * (part + 1) >> log_of_parts) - begin};
  }

  // The part that has a channel.
  __device__ static int part_of(int channels, int channel, int parts) {
    return ((channel / 16 + 1) * parts - 1) / (channels / 16);
  }
};

// One image's tokens; with has_extra, token 0 is apart from the others, in memory of any kind.
template <class T>
struct Image {
  const T* data;
  int64_t token_stride;
  const bool* mask;  // or null
  int64_t mask_stride;
  bool has_extra;
  const T* extra;

  __device__ const T* row(int token) const { return data + (token - has_extra) * token_stride; }

  __device__ bool attended(int token, int last) const {
    if (token >= last) return false;
    if (token < has_extra || !mask) return true;
    return mask[(token - has_extra) * mask_stride];
  }

  // Which of the 16 tokens from `token` on are attended to, as bits; the same in all lanes.
  __device__ uint32_t attended_of_tile(int token, int last) const {
    const int lane = lane_index();
    return __ballot_sync(~0u, lane < 16 && attended(token + lane, last));
  }
};

template <class T>
__device__ Image<T> image_of(const Tokens& x, const Mask& mask, int64_t image) {
  return {static_cast<const T*>(x.data) + image * x.batch_stride,
          x.token_stride,
          mask.data ? mask.data + image * mask.batch_stride : nullptr,
          mask.token_stride,
          x.extra != nullptr,
          static_cast<const T*>(x.extra) + image * x.extra_batch_stride};
}

// Whether tiles come by bulk copies, a row each, which cost a warp few instructions, or else by
// copies of 16 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

// The tiles of one warp, in its slice of the channels. Every copy of a tile is waited for once.
template <class P>
class TileRing {
 public:
  using T = typename P::Element;

  static constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes

  __host__ __device__ static int bytes(int channels) {
    return P::stages(channels) * P::kTokens * P::tile_pitch(channels) * static_cast<int>(sizeof(T));
  }
  __host__ __device__ static constexpr int barrier_bytes() {
    return (P::kStages + 1) / 2 * 2 * static_cast<int>(sizeof(uint64_t));
  }

  // Other data may lie in `memory` while no tile does, but not in `barriers`, from fill() on.
  __device__ TileRing(char* memory, char* barriers, int channels, Slice slice)
      : memory_(reinterpret_cast<T*>(memory)),
        barriers_(reinterpret_cast<uint64_t*>(barriers)),
        channels_(channels),
        pitch_(P::tile_pitch(channels)),
        slice_(slice) {}

  __device__ int pitch() const { return pitch_; }
  __device__ T* tile(int turn) const { return memory_ + stage_of(turn) * (P::kTokens * pitch_); }

  // Starts the copies of the team's first tiles.
  __device__ void fill(const Image<T>& x, const Range& range) {
    if (!open_) open();
#pragma unroll 1
    for (int turn = 0; turn < P::stages(channels_); ++turn) copy(x, range, turn);
  }

  // Starts the copy of the tile that takes the place of a turn's.
  __device__ void copy_next(const Image<T>& x, const Range& range, int turn) {
    copy(x, range, turn + P::stages(channels_));
  }

  // Starts the copy of a tile: zeros where a token is not attended to.
  __device__ void copy(const Image<T>& x, const Range& range, int turn) {
    const int token = P::token_of(channels_, range, turn);
    if constexpr (kBulkCopies) {
      if (token < range.last) copy_bulk_rows(x, turn, token, range.last);
    } else {
      if (token < range.last) copy_chunks(x, turn, token, range.last);
      copy_async_commit();
    }
  }

  // Until the tile of this turn, the oldest under way, is there.
  __device__ void wait(int turn) {
    if constexpr (kBulkCopies) {
      const int stage = stage_of(turn);
      barrier_wait(barriers_ + stage, arrived_ >> stage & 1);
      arrived_ ^= 1u << stage;
    } else {
      if (P::stages(channels_) == P::kStages) {
        copy_async_wait<P::kStages - 1>();
      } else {
        copy_async_wait<0>();
      }
      __syncwarp();
    }
  }

  // After the last tile.
  __device__ void drain() {
    if constexpr (!kBulkCopies) copy_async_wait<0>();
  }

  // Puts the extra token where its tile has it.
  __device__ void write_extra(int turn, const T* extra) {
    const int lane = lane_index();
    T* to = tile(turn);
#pragma unroll 2
    for (int c = lane; c < slice_.units * 16; c += 32) to[c] = extra[slice_.first + c];
    __syncwarp();
  }

 private:
  __device__ int stage_of(int turn) const {
    return P::stages(channels_) == P::kStages ? turn % P::kStages : 0;
  }

  __device__ void open() {
    open_ = true;
    if constexpr (kBulkCopies) {
      if (lane_index() == 0) {
        for (int stage = 0; stage < P::kStages; ++stage) barrier_init(barriers_ + stage, 1);
        barrier_init_visible();
      }
      __syncwarp();
    }
  }

  // Eight lanes share a row.
  __device__ void copy_chunks(const Image<T>& x, int turn, int token, int last) {
    const uint32_t attended = x.attended_of_tile(token, last);
    const int lane = lane_index();
    T* to = tile(turn);
#pragma unroll 1
    for (int row = lane / 8; row < P::kTokens; row += 4) {
      const bool read = (attended >> row & 1) && token + row >= x.has_extra;
      const T* from = read ? x.row(token + row) + slice_.first : x.data;
      T* to_row = to + row * pitch_;
#pragma unroll 2
      for (int c = lane % 8 * kChunk; c < slice_.units * 16; c += 8 * kChunk) {
        copy_async_16(to_row + c, read ? from + c : from, read ? 16 : 0);
      }
    }
  }

  // A lane copies a row.
  __device__ void copy_bulk_rows(const Image<T>& x, int turn, int token, int last) {
    const uint32_t extra = token < x.has_extra ? 1u : 0u;
    const uint32_t rows = x.attended_of_tile(token, last) & ~extra;
    const int row_bytes = slice_.units * 16 * static_cast<int>(sizeof(T)), lane = lane_index();
    uint64_t* barrier = barriers_ + stage_of(turn);
    T* to = tile(turn);
    if (rows != 0xffffu) {
#pragma unroll 1
      for (int row = lane / 8; row < P::kTokens; row += 4) {
        if (rows >> row & 1) continue;
#pragma unroll 1
        for (int c = lane % 8 * kChunk; c < slice_.units * 16; c += 8 * kChunk) {
          *reinterpret_cast<uint4*>(to + row * pitch_ + c) = make_uint4(0, 0, 0, 0);
        }
      }
    }
    fence_async_proxy();  // what was read and written there comes before the copies
    if (lane == 0) barrier_expect_bytes(barrier, __popc(rows) * row_bytes);
    __syncwarp();
    if (lane < P::kTokens && rows >> lane & 1) {
      copy_bulk(to + lane * pitch_, x.row(token + lane) + slice_.first, row_bytes, barrier);
    }
  }

  T* memory_;
  uint64_t* barriers_;  // one a stage
  int channels_;
  int pitch_;
  Slice slice_;
  bool open_ = false;
  uint32_t arrived_ = 0;  // the parity that a stage's next copy completes, a bit each
};

// Score rows [0, count) as the tensor cores take them, zeros in the others. All threads.
template <class P>
__device__ void write_rows(typename P::Element* to, const float* from, int64_t stride, int count,
                           int channels) {
  using T = typename P::Element;
  const int pitch = P::row_pitch(channels);
#pragma unroll 1  // all rows of a channel are loads under way
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    float values[P::kRows];
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) {
      values[row] = row < count ? from[row * stride + c] : 0.0f;
    }
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) to[row * pitch + c] = from_float<T>(values[row]);
  }
}

// A warp's sums over its tokens: of unit u's channels [g, g + 8] and the rows [2 t, 2 t + 1] of a
// group.
template <class P>
struct WarpSums {
  float of[P::kUnits][P::kGroups][4];
  float mean[P::kGroups];  // of row g, what the tokens' means add to all channels

  __device__ void clear() {
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      mean[group] = 0;
#pragma unroll
      for (int unit = 0; unit < P::kUnits; ++unit) {
        for (int i = 0; i < 4; ++i) of[unit][group][i] = 0;
      }
    }
  }

  // To [kRows, pitch]; with kFinal without the means.
  template <bool kFinal>
  __device__ void leave(float* rows, int pitch, Slice slice) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      float means[2] = {0, 0};
      if constexpr (kFinal) {
        for (int i = 0; i < 2; ++i) means[i] = __shfl_sync(~0u, mean[group], 8 * t + 4 * i);
      }
      float* to = rows + (8 * group + 2 * t) * pitch + slice.first + g;
#pragma unroll
      for (int unit = 0; unit < P::kUnits; ++unit) {
        if (unit >= slice.units) break;
        for (int i = 0; i < 4; ++i) {
          to[(i & 1) * pitch + unit * 16 + 8 * (i >> 1)] = of[unit][group][i] - means[i & 1];
        }
      }
    }
  }
};

// What a pass knows of the four tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a tile.
struct FourTokens {
  float mean[4];
  float rstd[4];
  float centre[4];
};

__device__ __forceinline__ int nth_token(int i) {
  return lane_index() % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Sums over a warp's slice of the tokens g and g + 8, as they pass by. They are taken from the
// token's first channel there, so that a mean far above the spread costs no digits: the variance's
// relative error is at most about C times float's eps, whatever that channel holds.
struct TokenSums {
  float centre[2];
  float sum[2] = {0, 0};
  float squares[2] = {0, 0};

  __device__ void add(int token, float2 x) {
    const float first = x.x - centre[token], second = x.y - centre[token];
    sum[token] += first + second;
    squares[token] += first * first + second * second;
  }
};

}  // namespace crossvit::attention_core
