// The operators that make, copy and resize tensors: the fallback cannot, it works on tensors that exist.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

namespace simulated_cuda {
namespace {
using at::Tensor;
using c10::SymIntArrayRef;

void check(std::optional<c10::Device> device) {
  TORCH_CHECK(!device || device->index() <= 0, "CUDA error: invalid device ordinal");
}

Tensor empty(SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device> device, std::optional<bool> pinned,
             std::optional<c10::MemoryFormat> format) {
  check(device);
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator(), KEYS,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  check(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_allocator(), KEYS, c10::dtype_or_default(dtype));
}

// Forward-mode derivatives begin with zeros that no memory holds: here memory holds them.
Tensor zeros(SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
             std::optional<c10::Device> device, std::optional<bool> pinned) {
  return empty(size, dtype, layout, device, pinned, std::nullopt).zero_();
}

// A copy between host and device waits unless it is non-blocking and the host's memory is pinned.
void count_copy(const Tensor& to, const Tensor& from, bool non_blocking) {
  const bool up = to.is_cuda() && !from.is_cuda(), down = from.is_cuda() && !to.is_cuda();
  if (up) count_upload(from.nbytes());
  if (down) count_download(from.nbytes());
  if (!up && !down) return;
  const bool pinned = is_pinned((up ? from : to).storage().data());
  if (pinned && non_blocking) return;
  count_wait(std::string(up ? "upload" : "download") + (pinned ? " (blocking)" : " (pageable memory)"));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  static Counter& kernel = kernel_counter("aten::copy_");
  count_copy(self, source, non_blocking);
  count_kernel(kernel);
  Aliases aliases;
  Tensor to = self.is_cuda() ? aliases.to_host(self) : self;
  to.copy_(source.is_cuda() ? aliases.to_host(source) : source);
  return self;
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes = (self.storage_offset() + c10::multiply_integers(sizes)) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    auto data = device_allocator().allocate(bytes);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(data));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_strided(Tensor& self, at::Storage source, c10::SymInt offset, SymIntArrayRef size,
                    SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset.expect_int());
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.itemsize();
  return set_strided(self, std::move(source), 0, c10::SymInt(count), c10::SymInt(1));
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_strided(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor random_state() { return Tensor(default_generator().unsafeGetGeneratorImpl()->get_state()); }
void set_random_state(const Tensor& state) {
  default_generator().unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
}
}  // namespace
}  // namespace simulated_cuda

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(simulated_cuda::empty));
  m.impl("empty_strided", TORCH_FN(simulated_cuda::empty_strided));
  m.impl("_efficientzerotensor", TORCH_FN(simulated_cuda::zeros));
  m.impl("copy_", TORCH_FN(simulated_cuda::copy_));
  m.impl("resize_", TORCH_FN(simulated_cuda::resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(simulated_cuda::set_strided));
  m.impl("set_.source_Storage", TORCH_FN(simulated_cuda::set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(simulated_cuda::set_tensor));
}
TORCH_LIBRARY(simulated_cuda, m) {
  m.def("random_state() -> Tensor", TORCH_FN(simulated_cuda::random_state));
  m.def("set_random_state(Tensor state) -> ()", TORCH_FN(simulated_cuda::set_random_state));
}
