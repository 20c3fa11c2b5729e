// tinycudann's multi-resolution hash grid for 3-D positions, after tiny-cuda-nn's encodings/grid.h (kernel_grid,
// kernel_grid_backward) and common_device.h (pos_fract, grid_index): its uint32 arithmetic, its hash, its wrapping
// beyond a dense level's last node.
#include "device.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

namespace simulated_cuda {
namespace {
using at::Tensor;

constexpr uint32_t MAX_RESOLUTION = 0x659;  // beyond it three axes overflow a uint32, so the index is hashed

uint32_t grid_index(const uint32_t position[3], uint32_t nodes, uint32_t size) {
  uint32_t stride = 0xFFFFFFFF, index = 0;
  if (nodes <= MAX_RESOLUTION) {
    index = position[0] + position[1] * nodes + position[2] * nodes * nodes;
    stride = nodes * nodes * nodes;
  }
  if (size < stride) index = position[0] ^ position[1] * 2654435761u ^ position[2] * 805459861u;
  return index % size;
}

// Calls `corner(entry, weight)` for the eight nodes around a position in one level.
template <typename Corner>
void interpolate(const float* position, float scale, uint32_t size, Corner corner) {
  const uint32_t nodes = static_cast<uint32_t>(std::ceil(scale)) + 1;
  float fraction[3];
  uint32_t low[3];
  for (int axis = 0; axis < 3; ++axis) {
    const float scaled = std::fmaf(scale, position[axis], 0.5f), whole = std::floor(scaled);
    low[axis] = static_cast<uint32_t>(static_cast<int>(whole));
    fraction[axis] = scaled - whole;
  }
  for (int sides = 0; sides < 8; ++sides) {
    float weight = 1;
    uint32_t node[3];
    for (int axis = 0; axis < 3; ++axis) {
      const bool upper = sides >> axis & 1;
      weight *= upper ? fraction[axis] : 1 - fraction[axis];
      node[axis] = low[axis] + upper;
    }
    corner(grid_index(node, nodes, size), weight);
  }
}

// positions (N, 3), parameters (sum of sizes * features,), sizes and scales of the levels -> (N, levels * features).
Tensor encode(const Tensor& positions, const Tensor& parameters, at::IntArrayRef sizes, at::ArrayRef<double> scales,
              int64_t features) {
  static Counter& kernel = kernel_counter("tinycudann::forward");
  count_kernel(kernel);
  const int64_t count = positions.size(0), width = sizes.size() * features;
  Tensor result = at::zeros({count, width}, positions.options());
  auto *x = positions.const_data_ptr<float>(), *table = parameters.const_data_ptr<float>();
  auto* out = result.mutable_data_ptr<float>();
  for (size_t level = 0; level < sizes.size(); ++level) {
    for (int64_t i = 0; i < count; ++i) {
      float* row = out + i * width + level * features;
      interpolate(x + 3 * i, scales[level], sizes[level], [&](uint32_t entry, float weight) {
        for (int64_t f = 0; f < features; ++f) row[f] += weight * table[entry * features + f];
      });
    }
    table += sizes[level] * features;
  }
  return result;
}

// The gradient of the parameters from that of the result.
Tensor encode_backward(const Tensor& positions, const Tensor& gradient, at::IntArrayRef sizes,
                       at::ArrayRef<double> scales, int64_t features) {
  static Counter& kernel = kernel_counter("tinycudann::backward");
  count_kernel(kernel);
  const int64_t count = positions.size(0), width = sizes.size() * features;
  int64_t entries = 0;
  for (int64_t size : sizes) entries += size;
  Tensor result = at::zeros({entries * features}, positions.options());
  auto *x = positions.const_data_ptr<float>(), *grad = gradient.const_data_ptr<float>();
  auto* table = result.mutable_data_ptr<float>();
  for (size_t level = 0; level < sizes.size(); ++level) {
    for (int64_t i = 0; i < count; ++i) {
      const float* row = grad + i * width + level * features;
      interpolate(x + 3 * i, scales[level], sizes[level], [&](uint32_t entry, float weight) {
        for (int64_t f = 0; f < features; ++f) table[entry * features + f] += weight * row[f];
      });
    }
    table += sizes[level] * features;
  }
  return result;
}
}  // namespace
}  // namespace simulated_cuda

TORCH_LIBRARY_FRAGMENT(simulated_cuda, m) {
  m.def("encode(Tensor positions, Tensor parameters, int[] sizes, float[] scales, int features) -> Tensor",
        TORCH_FN(simulated_cuda::encode));
  m.def("encode_backward(Tensor positions, Tensor gradient, int[] sizes, float[] scales, int features) -> Tensor",
        TORCH_FN(simulated_cuda::encode_backward));
}
