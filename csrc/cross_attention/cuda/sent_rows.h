#pragma once

#include "cross_attention/cuda/block.h"

namespace crossvit::cross_attention::cuda {

// Rows of passes, u, as operands, that the blocks of heads send to those of images.
template <class P>
class SentRows {
  using T = typename P::Element;

 public:
  __device__ SentRows(char* memory, const Images& images, int heads)
      : memory_(reinterpret_cast<T*>(memory)), images_(images), heads_(heads) {}

  // Sends eight columns of a head's row to these of the image's blocks.
  __device__ __forceinline__ void send(int image, int head, int channels, int c, float4 low,
                                       float4 high, Ranks ranks) const {
    T* to = row(image, head, channels) + c;
    const int first = (image & (images_.step - 1)) * images_.blocks_per_image;
    const QuadBits<T> quads[2] = {pack_quad<T>(low), pack_quad<T>(high)};
#pragma unroll 1
    for (int i = ranks.first; i < images_.blocks_per_image; i += ranks.step) {
      T* there = in_rank(to, first + i);
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint4*>(there) =
            make_uint4(quads[0].x, quads[0].y, quads[1].x, quads[1].y);
      } else {
        *reinterpret_cast<QuadBits<T>*>(there) = quads[0];
        *reinterpret_cast<QuadBits<T>*>(there + 4) = quads[1];
      }
    }
  }

  // This image's rows, of heads from `head` on, as a pass takes them.
  __device__ T* row(int image, int head, int channels) const {
    const int of_image = round_up(heads_, P::kRows);
    return memory_ + ((image >> log2_of(images_.step)) * of_image + head) * P::row_pitch(channels);
  }

  // Writes zeros to the rows beyond the heads.
  __device__ void clear_unused(int channels) const {
    constexpr int kChunk = 16 / sizeof(T);
#pragma unroll 1
    for (int image = images_.begin; image < images_.count; image += images_.step) {
#pragma unroll 1
      for (int head = heads_ + block_warps() - 1 - warp_index(); head < round_up(heads_, P::kRows);
           head += block_warps()) {
#pragma unroll 1
        for (int c = kChunk * lane_index(); c < channels; c += kChunk * 32) {
          *reinterpret_cast<uint4*>(row(image, head, channels) + c) = make_uint4(0, 0, 0, 0);
        }
      }
    }
  }

  // Copies the rows of heads from `head` on to those of a pass, with zeros in unused ones.
  __device__ __forceinline__ void copy(T* rows, int image, int head, int channels) const {
    constexpr int kChunk = 16 / sizeof(T);
    const T* from = row(image, head, channels);
#pragma unroll 1
    for (int r = warp_index(); r < P::kRows; r += block_warps()) {
#pragma unroll 1
      for (int c = kChunk * lane_index(); c < channels; c += kChunk * 32) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (head + r < heads_)
          bits = *reinterpret_cast<const uint4*>(from + r * P::row_pitch(channels) + c);
        *reinterpret_cast<uint4*>(rows + r * P::row_pitch(channels) + c) = bits;
      }
    }
  }

 private:
  T* memory_;
  Images images_;
  int heads_;
};

}  // namespace crossvit::cross_attention::cuda
