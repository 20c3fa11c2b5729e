// The device itself: memory, streams (none), hooks and generators, as torch looks for them when CUDA is present.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace simulated_cuda {
namespace {
using c10::Device;
using c10::DeviceType;
using c10::Stream;

std::atomic<int64_t> allocated{0}, peak{0}, limit{INT64_MAX};

void* aligned(size_t bytes) {
  void* data = nullptr;
  if (bytes) TORCH_CHECK(posix_memalign(&data, 64, bytes) == 0, "the host has no ", bytes, " bytes left");
  return data;
}

struct Block {
  void* data;
  size_t bytes;
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    reserve(bytes);
    auto* block = new Block{aligned(bytes), bytes};
    return {block->data, block, &release, DEVICE};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    unreserve(block->bytes);
    std::free(block->data);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &allocator);

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // start -> bytes

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = aligned(bytes);
    std::lock_guard<std::mutex> guard(pinned_lock);
    if (data) pinned[static_cast<char*>(data)] = bytes;
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(static_cast<char*>(data));
    std::free(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::DEFAULT, DEVICE); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() <= 0, "CUDA error: invalid device ordinal");
  }
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit DeviceGenerator(at::Generator own) : c10::GeneratorImpl(DEVICE, KEYS), host(std::move(own)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(host.clone()); }
};

at::Generator new_generator() {
  return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator(0));
}
}  // namespace

c10::Allocator& device_allocator() { return allocator; }

void reserve(size_t bytes) {
  int64_t now = allocated += bytes;
  if (now > limit) {
    allocated -= bytes;
    constexpr double mib = 1024 * 1024;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes / mib,
                     " MiB. GPU 0 has a total capacity of ", limit / mib / 1024, " GiB of which ",
                     (limit - allocated) / mib, " MiB is free.");
  }
  int64_t before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
}

void unreserve(size_t bytes) noexcept { allocated -= bytes; }

bool is_pinned(const void* pointer) {
  auto* address = static_cast<const char*>(pointer);
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  auto block = std::prev(after);
  return address < block->first + block->second;
}

at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}

const at::Generator& host_generator(const at::Generator& device_generator) {
  return static_cast<DeviceGenerator*>(device_generator.unsafeGetGeneratorImpl())->host;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex = -1) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const override { return new_generator(); }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
}  // namespace simulated_cuda

namespace at {  // where the registry looks
using simulated_cuda::Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}  // namespace at

extern "C" {
int64_t simulated_cuda_allocated() { return simulated_cuda::allocated; }
int64_t simulated_cuda_peak() { return simulated_cuda::peak; }
void simulated_cuda_reset_peak() { simulated_cuda::peak = simulated_cuda::allocated.load(); }
void simulated_cuda_limit(int64_t bytes) { simulated_cuda::limit = bytes; }
void simulated_cuda_seed(uint64_t seed) { simulated_cuda::default_generator().set_current_seed(seed); }
}
