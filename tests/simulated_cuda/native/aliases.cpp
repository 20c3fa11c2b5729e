// Tensors of the other side over the same memory.
#include "device.h"

#include <c10/core/CPUAllocator.h>

namespace simulated_cuda {
namespace {
struct HostMemory {  // of a result, kept alive and counted as the device's
  c10::Storage storage;
  size_t bytes;
};

void release(void* context) {
  auto* memory = static_cast<HostMemory*>(context);
  unreserve(memory->bytes);
  delete memory;
}

c10::Storage make_storage(size_t bytes, c10::DataPtr data, c10::Allocator* allocator) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), allocator, /*resizable=*/true));
}

at::Tensor with_storage(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKeySet keys) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return result;
}
}  // namespace

at::Tensor Aliases::to_host(const at::Tensor& tensor) {
  auto* own = tensor.storage().unsafeGetStorageImpl();
  auto entry = host_of_device_.find(own);
  if (entry == host_of_device_.end()) {
    c10::DataPtr data(own->mutable_data(), c10::Device(c10::DeviceType::CPU));
    auto storage = make_storage(own->nbytes(), std::move(data), c10::GetCPUAllocator());
    device_of_host_.emplace(storage.unsafeGetStorageImpl(), tensor.storage());
    entry = host_of_device_.emplace(own, storage).first;
  }
  auto result = with_storage(tensor, entry->second, c10::DispatchKeySet(c10::DispatchKey::CPU));
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
  if (tensor.is_neg()) result._set_neg(true);
  if (tensor.is_conj()) result._set_conj(true);
  return result;
}

// `is_view` is left alone unless the result lies in an operand's memory.
at::Tensor Aliases::to_device(const at::Tensor& tensor, bool& is_view) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  TORCH_CHECK(tensor.layout() == c10::kStrided, "the simulated device has no sparse tensors");
  auto* own = tensor.storage().unsafeGetStorageImpl();
  auto entry = device_of_host_.find(own);
  if (entry != device_of_host_.end()) {
    is_view = true;
  } else {
    reserve(own->nbytes());
    auto* memory = new HostMemory{tensor.storage(), own->nbytes()};
    c10::DataPtr data(own->mutable_data(), memory, &release, DEVICE);
    entry = device_of_host_.emplace(own, make_storage(own->nbytes(), std::move(data), &device_allocator())).first;
  }
  return with_storage(tensor, entry->second, KEYS);
}

}  // namespace simulated_cuda
