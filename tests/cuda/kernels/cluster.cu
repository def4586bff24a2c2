// A sum of rows, divided among the blocks of a cluster, which add up each other's partial sums.
#include "common/cuda/cluster.h"
#include "common/cuda/launch.h"
#include "kernels/check.h"

namespace crossvit {
namespace {

constexpr int kCluster = 4, kColumns = 64;  // a thread for each column

__global__ void __launch_bounds__(kColumns) sum_of_rows(const float* x, float* out, int rows) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  auto* partial = reinterpret_cast<float*>(memory);
  const int column = static_cast<int>(threadIdx.x);
  const int rank = cluster_rank(), size = cluster_size();
  const int sample = static_cast<int>(blockIdx.x) / size;
  x += int64_t(sample) * rows * kColumns;

  float sum = 0;
  for (int row = rank; row < rows; row += size) sum += x[row * kColumns + column];
  partial[column] = sum;
  cluster_sync();  // the partial sums are there

  const int share = kColumns / size;
  if (column < share) {
    const int total_column = rank * share + column;
    float total = 0;
    for (int other = 0; other < size; ++other) total += *in_rank(partial + total_column, other);
    out[sample * kColumns + total_column] = total;
  }
  // No block exits while another reads from it.
  cluster_arrive();
  cluster_wait();
}

}  // namespace

bool check_kernel() {
  const int samples = 3, rows = 21;
  Numbers numbers;
  const auto x = numbers.float32(samples * rows * kColumns);
  std::vector<float> out(samples * kColumns);
  const LaunchConfig config{samples * kCluster, kColumns, kColumns * int(sizeof(float)), kCluster};
  if (launch(sum_of_rows, config, x.data(), out.data(), rows) != cudaSuccess) return false;
  Error error;
  for (int sample = 0; sample < samples; ++sample) {
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0;
      for (int row = 0; row < rows; ++row) sum += x[(sample * rows + row) * kColumns + column];
      error.add(out[sample * kColumns + column], sum);
    }
  }
  return error.below(1e-5);
}

}  // namespace crossvit
