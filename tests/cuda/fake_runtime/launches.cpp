// Launches of common/cuda/launch.h, as nvcc sees it, on a runtime without a device.

#include <cstdio>
#include <cstring>
#include <thread>

#include "common/cuda/launch.h"

namespace {

void kernel(int) {}
void kernel_with_clusters(int) {}

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("not so: %s\n", what);
  ++failures;
}

cudaError_t start(void (*which)(int), int shared_bytes, int cluster = 1) {
  crossvit::LaunchConfig config;
  config.shared_bytes = shared_bytes;
  config.cluster = cluster;
  return crossvit::launch(which, config, 1);
}

struct Sizes {
  char kind;
  double eps;
};
void kernel_with_sizes(int, Sizes, const float*) {}

// Recorded launches are not run; their parameters lie at multiples of their alignments.
void expect_recording() {
  crossvit::Recording recorded = {1000, {}};
  const int before = fake::launches;
  crossvit::LaunchConfig config;
  config.grid = dim3{3, 2, 1};
  config.shared_bytes = 500;
  {
    const crossvit::RecordingScope scope(&recorded);
    expect(crossvit::shared_bytes_of_block(0) == 1000, "the recording's limit counts");
    expect(crossvit::launch(kernel_with_sizes, config, 7, Sizes{'x', 0.5}, nullptr) == cudaSuccess,
           "it is recorded");
  }
  expect(fake::launches == before && recorded.launches.size() == 1, "it is not run");
  expect(!crossvit::recording, "the recording ends");
  const crossvit::RecordedLaunch& launch = recorded.launches[0];
  expect(launch.grid[0] == 3 && launch.grid[1] == 2 && launch.shared_bytes == 500, "its shape");
  expect(launch.parameters.size() == 32, "4 bytes, 4 unused, 16 and 8");
  double eps = 0;
  std::memcpy(&eps, launch.parameters.data() + 16, sizeof eps);
  expect(launch.parameters[0] == 7 && launch.parameters[8] == 'x' && eps == 0.5, "its parameters");
}

}  // namespace

int main() {
  // Two threads whose tokens differ in width launch one kernel.
  std::atomic<int> refused{0};
  const auto many = [&](int shared_bytes) {
    for (int i = 0; i < 20000; ++i) refused += start(kernel, shared_bytes) != cudaSuccess;
  };
  std::thread wide(many, 200 << 10), narrow(many, 60 << 10);
  wide.join();
  narrow.join();
  expect(refused == 0, "no launch is refused");
  expect(fake::changes == 1, "the limit is set once");
  expect(fake::limit == fake::kOptIn, "the limit is the device's");
  expect(start(kernel, 0, 8) == cudaSuccess, "code for sm_90 runs in clusters");
  // A build for sm_80 alone, on a GPU that has clusters.
  fake::ptx_version = 80;
  const int before = fake::launches;
  expect(start(kernel_with_clusters, 0, 8) == cudaErrorInvalidClusterSize, "no cluster");
  expect(fake::launches == before, "it was not launched");
  expect(start(kernel_with_clusters, 0) == cudaSuccess, "code for sm_80 runs without");
  expect_recording();
  return failures;
}
