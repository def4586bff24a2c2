#pragma once

namespace crossvit {

// Activations of feed-forward networks, in the order of ops/common/activations.py.
enum class Activation { kGelu, kGeluTanh, kQuickGelu, kSilu };

}  // namespace crossvit
