// Recording launches in place of running them, for reports on machines without a GPU.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

namespace crossvit {

struct RecordedLaunch {
  std::string symbol;  // of the kernel in the device code
  std::array<unsigned, 3> grid, block;
  int shared_bytes;  // dynamic
  int cluster;
  std::string parameters;  // as they lie in the constant bank
};

struct Recording {
  int shared_bytes_of_block;  // of the device that launches are recorded for
  std::vector<RecordedLaunch> launches;
};

// What this thread's launches are recorded to; null: they run.
inline thread_local Recording* recording = nullptr;

// Records this thread's launches during its lifetime.
class RecordingScope {
 public:
  explicit RecordingScope(Recording* to) : previous_(recording) { recording = to; }
  ~RecordingScope() { recording = previous_; }
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;

 private:
  Recording* previous_;
};

// Symbols by the address that the host has for a kernel; filled when the library is loaded.
inline std::map<const void*, std::string>& kernel_symbols() {
  static std::map<const void*, std::string> symbols;
  return symbols;
}

// Each parameter is aligned to its type.
template <class... P>
std::string parameter_bytes(const P&... parameters) {
  std::string bytes;
  const auto append = [&](const auto& parameter) {
    constexpr size_t kAlignment = alignof(decltype(parameter));
    bytes.resize((bytes.size() + kAlignment - 1) / kAlignment * kAlignment);
    bytes.append(reinterpret_cast<const char*>(&parameter), sizeof parameter);
  };
  (append(parameters), ...);
  return bytes;
}

}  // namespace crossvit
