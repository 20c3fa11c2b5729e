// Every operator of the device: its operands are taken to the CPU's side of the same memory, the CPU's kernel
// runs, its results are taken back. What a GPU refuses is refused in torch's words.
#include "device.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <unordered_set>

namespace simulated_cuda {
namespace {
using at::Tensor;
using c10::IValue;

// Their results' sizes, or values, are needed on the host.
const std::unordered_set<std::string> WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero",            "aten::masked_select", "aten::equal",
    "aten::_unique2",            "aten::unique_dim",         "aten::is_nonzero",    "aten::unique_consecutive",
    "aten::bincount",            "aten::histc",              "aten::_linalg_eigh",  "aten::_linalg_svd",
    "aten::linalg_lstsq",        "aten::repeat_interleave"};
const std::unordered_set<std::string> INDEXING = {"aten::index", "aten::_index_put_impl_"};

struct Operator {  // what is worth knowing of a schema once
  std::string name;
  bool waits, indexes, puts;  // `index` uploads indices and counts masks in operators of its own, `put` inside
  std::vector<bool> optional_tensors, generators, written;
  std::vector<int> result_argument;  // the argument that a result is, or -1
  Counter& kernel;

  explicit Operator(const c10::FunctionSchema& schema)
      : name(schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name()),
        waits(WAITING.count(schema.name()) > 0),
        indexes(INDEXING.count(schema.name()) > 0),
        puts(schema.name() == "aten::_index_put_impl_"),
        kernel(kernel_counter(name)) {
    for (const auto& argument : schema.arguments()) {
      const auto type = argument.type()->str();
      optional_tensors.push_back(type.find("Tensor?[]") != std::string::npos ||
                                 type.find("Tensor?") != std::string::npos);
      generators.push_back(type.find("Generator") != std::string::npos);
      written.push_back(argument.alias_info() && argument.alias_info()->isWrite());
    }
    for (const auto& result : schema.returns()) result_argument.push_back(argument_of(schema, result));
  }

  static int argument_of(const c10::FunctionSchema& schema, const c10::Argument& result) {
    const auto* alias = result.alias_info();
    if (!alias || !alias->isWrite()) return -1;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other && other->isWrite() && other->beforeSets() == alias->beforeSets()) return static_cast<int>(i);
    }
    TORCH_CHECK(false, "the simulated device cannot place the result of ", schema.name());
  }
};

const Operator& operator_of(const c10::FunctionSchema& schema) {
  static std::mutex lock;
  static std::unordered_map<const c10::FunctionSchema*, Operator> operators;
  std::lock_guard<std::mutex> guard(lock);
  auto entry = operators.find(&schema);
  if (entry == operators.end()) entry = operators.emplace(&schema, Operator(schema)).first;
  return entry->second;
}

class Call {
 public:
  Call(const c10::OperatorHandle& handle, torch::jit::Stack& stack)
      : handle_(handle),
        op_(operator_of(handle.schema())),
        stack_(stack),
        count_(handle.schema().arguments().size()),
        begin_(stack.size() - count_),
        given_(stack.begin() + begin_, stack.end()) {}

  void run() {
    for (size_t i = 0; i < count_; ++i) operand(i);
    check_devices();
    if (op_.puts) count_index_waits();
    if (op_.waits) wait();
    handle_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    for (auto& [device, host] : pairs_)
      if (host.sizes() != device.sizes()) resize(device, host);
    if (!results()) count_kernel(op_.kernel);
  }

 private:
  const std::string& argument(size_t i) const { return handle_.schema().arguments()[i].name(); }

  void operand(size_t i) {
    IValue& value = stack_[begin_ + i];
    if (value.isTensor()) {
      value = to_host(value.toTensor(), i);
    } else if (value.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(to_host(tensor, i));
      value = IValue(std::move(tensors));
    } else if (value.isList() && op_.optional_tensors[i]) {
      c10::List<std::optional<Tensor>> tensors;
      for (const IValue& item : value.toListRef())
        tensors.push_back(item.isTensor() ? std::optional<Tensor>(to_host(item.toTensor(), i)) : std::nullopt);
      value = IValue(std::move(tensors));
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = IValue(c10::Device(c10::DeviceType::CPU));
      on_device_ = true;
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      if (value.toGenerator().device().is_cpu()) {
        host_generator_ = true;
      } else {
        device_generator_ = true;
        value = IValue(host_generator(value.toGenerator()));
      }
    } else if (value.isNone() && op_.generators[i]) {
      value = IValue(host_generator(default_generator()));
    }
  }

  Tensor to_host(const Tensor& tensor, size_t i) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().is_cuda()) {
      on_device_ = true;
      pairs_.emplace_back(tensor, aliases_.to_host(tensor));
      return pairs_.back().second;
    }
    TORCH_CHECK(tensor.device().is_cpu(), op_.name, " of a tensor on ", tensor.device(), " and one on cuda:0");
    // A number's tensor may lie on the host, unless it is written to; so may indices.
    const bool indices = op_.indexes && argument(i) == "indices";
    if ((tensor.dim() > 0 || op_.written[i]) && !indices) foreign_ = &argument(i);
    return tensor;
  }

  void check_devices() const {
    TORCH_CHECK(!(foreign_ && on_device_),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                "(when checking argument for argument ",
                foreign_ ? *foreign_ : op_.name, " in method wrapper_CUDA_", op_.name, ")");
    TORCH_CHECK(!(host_generator_ && on_device_), "Expected a 'cuda' device type for generator but found 'cpu'");
    TORCH_CHECK(!device_generator_ || on_device_, "Expected a 'cpu' device type for generator but found 'cuda'");
  }

  // The sizes of masks are needed on the host, but where one number fills them; indices of the host are uploaded.
  void count_index_waits() {
    bool fills = false;
    size_t indices = 0;
    for (size_t i = 0; i < count_; ++i) {
      if (argument(i) == "indices") indices = i;
      if (argument(i) == "values") fills = given_[i].toTensor().device().is_cpu() && given_[i].toTensor().numel() == 1;
    }
    for (const IValue& item : given_[indices].toListRef()) {
      if (!item.isTensor() || !item.toTensor().defined()) continue;
      const Tensor index = item.toTensor();
      if (index.device().is_cpu()) {
        count_upload(index.nbytes());
        count_wait(op_.name + " (indices of the host)");
      }
      const bool mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
      if (mask && !fills) count_wait(op_.name + " (mask)");
    }
  }

  void wait() {
    if (op_.name == "aten::_local_scalar_dense") count_download(given_[0].toTensor().itemsize());
    if (op_.name == "aten::repeat_interleave.Tensor" && !given_[1].isNone()) return;  // the size is given
    count_wait(op_.name);
  }

  // An `out` that the CPU's kernel has given another size.
  void resize(const Tensor& device, const Tensor& host) {
    at::NoGradGuard no_grad;
    const size_t bytes = host.numel() * host.itemsize();
    auto* storage = device.storage().unsafeGetStorageImpl();
    if (storage->nbytes() < bytes) {
      storage->set_data_ptr(device_allocator().allocate(bytes));
      storage->set_nbytes(bytes);
    }
    const Tensor compact = host.contiguous();
    if (bytes) std::memcpy(storage->mutable_data(), compact.const_data_ptr(), bytes);
    device.unsafeGetTensorImpl()->set_storage_offset(0);
    device.unsafeGetTensorImpl()->set_sizes_contiguous(host.sizes());
  }

  // Whether all results are views, which need no kernel.
  bool results() {
    const size_t results = op_.result_argument.size(), first = stack_.size() - results;
    bool only_views = results > 0;
    for (size_t i = 0; i < results; ++i) {
      IValue& value = stack_[first + i];
      bool view = false;
      if (op_.result_argument[i] >= 0) {
        value = given_[op_.result_argument[i]];
      } else if (value.isTensor()) {
        value = aliases_.to_device(value.toTensor(), view);
      } else if (value.isTensorList()) {
        c10::List<Tensor> tensors;
        for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(aliases_.to_device(tensor, view));
        value = IValue(std::move(tensors));
      }
      only_views &= view;
    }
    return only_views;
  }

  const c10::OperatorHandle& handle_;
  const Operator& op_;
  torch::jit::Stack& stack_;
  const size_t count_, begin_;
  const std::vector<IValue> given_;
  Aliases aliases_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;  // of the device, of the host
  bool on_device_ = false, host_generator_ = false, device_generator_ = false;
  const std::string* foreign_ = nullptr;  // the argument that lies on the host
};

void fallback(const c10::OperatorHandle& handle, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call(handle, *stack).run();
}
}  // namespace
}  // namespace simulated_cuda

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Composites that would look for one of CUDA's libraries inside: whole to the CPU.
  for (const char* name :
       {"convolution", "convolution_overrideable", "convolution_backward", "convolution_backward_overrideable",
        "_convolution", "native_group_norm", "native_group_norm_backward", "native_layer_norm",
        "native_layer_norm_backward", "native_batch_norm", "native_batch_norm_backward", "cudnn_batch_norm",
        "_batch_norm_with_update", "linalg_lstsq"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&simulated_cuda::fallback>());
}
TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated_cuda::fallback>());
}
