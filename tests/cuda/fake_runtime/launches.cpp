// Launches of common/cuda/launch.h, as nvcc sees it, on a runtime without a device.

#include <cstdio>
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
  return failures;
}
