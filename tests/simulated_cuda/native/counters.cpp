// What is counted: kernels, waits of the host for the device, and bytes copied between the two.
#include "device.h"

#include <atomic>
#include <map>
#include <mutex>

namespace simulated_cuda {

struct Counter {
  std::atomic<int64_t> count{0};
};

namespace {
std::mutex lock;
std::map<std::string, Counter> kernels, waits;
std::atomic<int64_t> uploaded{0}, downloaded{0};
std::atomic<void (*)(const char*)> on_wait{nullptr};

Counter& counter(std::map<std::string, Counter>& counters, const std::string& name) {
  std::lock_guard<std::mutex> guard(lock);
  return counters[name];  // a map's elements stay where they are
}

void reset(std::map<std::string, Counter>& counters) {
  for (auto& [name, counter] : counters) counter.count = 0;
}
}  // namespace

Counter& kernel_counter(const std::string& name) { return counter(kernels, name); }
void count_kernel(Counter& counter) { ++counter.count; }
void count_upload(size_t bytes) { uploaded += bytes; }
void count_download(size_t bytes) { downloaded += bytes; }

void count_wait(const std::string& reason) {
  ++counter(waits, reason).count;
  if (auto* callback = on_wait.load()) callback(reason.c_str());
}

}  // namespace simulated_cuda

using namespace simulated_cuda;

extern "C" {
int64_t simulated_cuda_uploaded() { return uploaded; }
int64_t simulated_cuda_downloaded() { return downloaded; }
void simulated_cuda_on_wait(void (*callback)(const char*)) { on_wait = callback; }

// Lines of name, tab, count; valid until the thread's next call.
const char* simulated_cuda_counts(bool of_waits) {
  thread_local std::string text;
  std::lock_guard<std::mutex> guard(lock);
  text.clear();
  for (auto& [name, counter] : of_waits ? waits : kernels)
    if (counter.count) text += name + "\t" + std::to_string(counter.count) + "\n";
  return text.c_str();
}

void simulated_cuda_reset_counts() {
  std::lock_guard<std::mutex> guard(lock);
  reset(kernels);
  reset(waits);
  uploaded = downloaded = 0;
}
}
