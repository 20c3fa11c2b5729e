// What the parts of the simulated device share. It registers itself as CUDA in a CPU-only build of torch: its
// tensors say `cuda:0`, lie in host memory and are computed by the CPU's kernels.
#pragma once
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <string>
#include <unordered_map>

namespace simulated_cuda {

inline const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
inline const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

// ---- memory (device.cpp)
c10::Allocator& device_allocator();
void reserve(size_t bytes);  // counts device memory; throws OutOfMemoryError beyond the limit
void unreserve(size_t bytes) noexcept;
bool is_pinned(const void* pointer);

// ---- random numbers (device.cpp): the CPU's generator behind a generator of the device
at::Generator& default_generator();
const at::Generator& host_generator(const at::Generator& device_generator);

// ---- counters (counters.cpp)
struct Counter;
Counter& kernel_counter(const std::string& name);  // valid for ever
void count_kernel(Counter& counter);
void count_wait(const std::string& reason);
void count_upload(size_t bytes);
void count_download(size_t bytes);

// ---- tensors of the other side over the same memory, for the time of one operator (aliases.cpp)
class Aliases {
 public:
  at::Tensor to_host(const at::Tensor& tensor);
  at::Tensor to_device(const at::Tensor& tensor, bool& is_view);

 private:
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_of_device_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> device_of_host_;
};

}  // namespace simulated_cuda
