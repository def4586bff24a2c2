#include "common/cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace crossvit {
namespace {

struct Level {
  Isa isa;
  const char* name;
};

constexpr Level kLevels[] = {
    {Isa::kX86V4, "x86-64-v4"}, {Isa::kX86V3, "x86-64-v3"}, {Isa::kBaseline, "baseline"}};

bool is_usable(Isa isa) {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::kX86V3) return v3;
  if (isa == Isa::kX86V4)
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::kBaseline;
}

Isa best() {
  for (const Level& level : kLevels)
    if (is_usable(level.isa)) return level.isa;
  return Isa::kBaseline;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa active_isa() { return active().load(std::memory_order_relaxed); }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (is_usable(level.isa)) names.push_back(level.name);
  return names;
}

std::string active_isa_name() {
  for (const Level& level : kLevels)
    if (level.isa == active_isa()) return level.name;
  return "";
}

void use_isa(const std::string& name) {
  for (const Level& level : kLevels)
    if (name == level.name && is_usable(level.isa)) return active().store(level.isa);
  throw std::invalid_argument("instruction-set level '" + name + "' is not usable here");
}

}  // namespace crossvit
