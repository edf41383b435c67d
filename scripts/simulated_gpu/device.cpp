// A CUDA device that is not there, for a build of PyTorch without CUDA.
//
// Its tensors say that they are on "cuda:N", its memory is host memory handed out as PyTorch's
// caching allocator does it (512-byte blocks in 2 MiB, 20 MiB or larger segments), and its
// operators are the CPU's. What is real here: which tensor is where and when, what is allocated at
// every moment, and running out of it. What is not: any time, anything that runs at the same time
// as something else, and the scratch memory that CUDA kernels take.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::kCPU;
using c10::kCUDA;

namespace {

constexpr size_t MiB = 1 << 20;
constexpr int MAX_DEVICES = 8;

// ------------------------------------------------------------------ memory

struct Segment;

struct Block {
  char* data;
  size_t bytes;
  bool used = false;
  Block *before = nullptr, *after = nullptr;
  Segment* segment;
};

struct Segment {
  char* data;
  size_t bytes;
  bool small;
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return a->bytes != b->bytes ? a->bytes < b->bytes : a->data < b->data;
  }
};

struct Memory {
  size_t total = 0, context = 0;
  double fraction = 1.0;
  size_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0;
  size_t allocations = 0, retries = 0, failures = 0;
  int64_t fail_in = -1;  // allocations until one fails whatever is free; negative: never
  std::set<Block*, BySize> free_small, free_large;
  std::map<void*, Block*> used;
};

std::mutex lock;
Memory memories[MAX_DEVICES];
int device_count = 1;
thread_local DeviceIndex current = 0;

std::string mib(size_t bytes) {
  std::ostringstream out;
  out.precision(2);
  if (bytes >= 1024 * MiB) out << std::fixed << bytes / 1073741824.0 << " GiB";
  else out << std::fixed << bytes / 1048576.0 << " MiB";
  return out.str();
}

void release_unused(Memory& memory) {
  for (auto* pool : {&memory.free_small, &memory.free_large}) {
    for (auto at = pool->begin(); at != pool->end();) {
      Block* block = *at;
      if (block->bytes == block->segment->bytes) {
        munmap(block->data, block->bytes);
        memory.reserved -= block->bytes;
        delete block->segment;
        delete block;
        at = pool->erase(at);
      } else ++at;
    }
  }
}

size_t used_of_device(const Memory& memory) {
  return memory.context + memory.reserved;
}

bool has_room(const Memory& memory, size_t bytes) {
  return memory.reserved + bytes <= memory.fraction * memory.total &&
      used_of_device(memory) + bytes <= memory.total;
}

void* take(DeviceIndex device, size_t wanted) {
  if (wanted == 0) return nullptr;
  std::lock_guard<std::mutex> guard(lock);
  Memory& memory = memories[device];
  memory.allocations++;
  const size_t bytes = std::max<size_t>(512, (wanted + 511) / 512 * 512);
  const bool small = bytes <= MiB;
  auto& pool = small ? memory.free_small : memory.free_large;
  bool refused = memory.fail_in == 0;
  if (memory.fail_in >= 0) memory.fail_in--;
  Block key{nullptr, bytes};
  auto found = pool.lower_bound(&key);
  Block* block = nullptr;
  if (!refused && found != pool.end()) {
    block = *found;
    pool.erase(found);
  } else if (!refused) {
    const size_t segment = small ? 2 * MiB
        : bytes < 10 * MiB ? 20 * MiB
                           : (bytes + 2 * MiB - 1) / (2 * MiB) * (2 * MiB);
    if (!has_room(memory, segment)) {
      memory.retries++;
      release_unused(memory);
    }
    refused = !has_room(memory, segment);
    if (!refused) {
      auto* data = static_cast<char*>(mmap(
          nullptr, segment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
          -1, 0));
      TORCH_CHECK(data != MAP_FAILED, "the host has no memory for the simulated device");
      block = new Block{data, segment};
      block->segment = new Segment{data, segment, small};
      memory.reserved += segment;
      memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
    }
  }
  if (refused) {
    memory.failures++;
    const size_t free = memory.total - std::min(memory.total, used_of_device(memory));
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", mib(bytes), ". GPU ",
        static_cast<int>(device), " has a total capacity of ", mib(memory.total), " of which ",
        mib(free), " is free. Including non-PyTorch memory, this process has ",
        mib(memory.context + memory.reserved), " memory in use. Of the allocated memory ",
        mib(memory.allocated), " is allocated by PyTorch, and ",
        mib(memory.reserved - memory.allocated), " is reserved by PyTorch but unallocated.");
  }
  const size_t rest = block->bytes - bytes;
  if (small ? rest >= 512 : rest > MiB) {
    auto* left = new Block{block->data + bytes, rest};
    left->segment = block->segment;
    left->before = block;
    left->after = block->after;
    if (left->after) left->after->before = left;
    block->after = left;
    block->bytes = bytes;
    pool.insert(left);
  }
  block->used = true;
  memory.used[block->data] = block;
  memory.allocated += block->bytes;
  memory.peak_allocated = std::max(memory.peak_allocated, memory.allocated);
  return block->data;
}

void give_back(DeviceIndex device, void* data) {
  if (!data) return;
  std::lock_guard<std::mutex> guard(lock);
  Memory& memory = memories[device];
  auto found = memory.used.find(data);
  if (found == memory.used.end()) return;
  Block* block = found->second;
  memory.used.erase(found);
  memory.allocated -= block->bytes;
  block->used = false;
  auto& pool = block->segment->small ? memory.free_small : memory.free_large;
  if (Block* next = block->after; next && !next->used) {
    pool.erase(next);
    block->bytes += next->bytes;
    block->after = next->after;
    if (block->after) block->after->before = block;
    delete next;
  }
  if (Block* last = block->before; last && !last->used) {
    pool.erase(last);
    last->bytes += block->bytes;
    last->after = block->after;
    if (last->after) last->after->before = last;
    delete block;
    block = last;
  }
  pool.insert(block);
}

template <int index>
void deleter(void* data) {
  give_back(index, data);
}

constexpr c10::DeleterFnPtr deleters[MAX_DEVICES] = {
    deleter<0>, deleter<1>, deleter<2>, deleter<3>,
    deleter<4>, deleter<5>, deleter<6>, deleter<7>};

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = take(current, bytes);
    return {data, data, deleters[current], Device(kCUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    std::lock_guard<std::mutex> guard(lock);
    for (auto& memory : memories) release_unused(memory);
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(lock);
    const Memory& memory = memories[device];
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& allocated = stats.allocated_bytes[0];
    allocated.current = memory.allocated;
    allocated.peak = memory.peak_allocated;
    auto& reserved = stats.reserved_bytes[0];
    reserved.current = memory.reserved;
    reserved.peak = memory.peak_reserved;
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(lock);
    memories[device].peak_allocated = memories[device].allocated;
    memories[device].peak_reserved = memories[device].reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(lock);
    const Memory& memory = memories[device];
    return {memory.total - std::min(memory.total, used_of_device(memory)), memory.total};
  }
};

Allocator allocator;

std::mutex pinned_lock;
std::map<void*, size_t> pinned;
size_t pinned_bytes = 0, peak_pinned_bytes = 0;

void unpin(void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto found = pinned.find(data);
  if (found == pinned.end()) return;
  pinned_bytes -= found->second;
  munmap(data, found->second);
  pinned.erase(found);
}

// CUDA's pinned host memory comes in powers of two.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t wanted) override {
    if (wanted == 0) return {nullptr, nullptr, &unpin, Device(kCPU)};
    size_t bytes = 4096;
    while (bytes < wanted) bytes *= 2;
    void* data =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(data != MAP_FAILED, "the host has no memory to pin");
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[data] = bytes;
    pinned_bytes += bytes;
    peak_pinned_bytes = std::max(peak_pinned_bytes, pinned_bytes);
    return {data, data, &unpin, Device(kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(const_cast<void*>(data));
  if (after == pinned.begin()) return false;
  const auto& [start, bytes] = *std::prev(after);
  return data < static_cast<char*>(start) + bytes;
}

// ------------------------------------------------------------------ random numbers

// Draws as a CPU generator does, and says that it is a device's.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex device)
      : c10::GeneratorImpl(
            Device(kCUDA, device), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  at::Generator inner;

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
};

at::Generator generators[MAX_DEVICES];

const at::Generator& default_generator(DeviceIndex device) {
  auto& generator = generators[device < 0 ? current : device];
  if (!generator.defined())
    generator = at::make_generator<Generator>(device < 0 ? current : device);
  return generator;
}

// ------------------------------------------------------------------ device and streams

double now() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

thread_local c10::StreamId streams[MAX_DEVICES] = {};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device device) const override {
    Device was(kCUDA, current);
    setDevice(device);
    return was;
  }
  Device getDevice() const override { return Device(kCUDA, current); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(Device device) const override { return stream(device, false); }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, whole(device));
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return stream(device, true);
  }
  c10::Stream getNewStream(Device device, int) const override { return stream(device, true); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto& id = streams[whole(stream.device()).index()];
    c10::Stream was(c10::Stream::UNSAFE, whole(stream.device()), id);
    id = stream.id();
    return was;
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<double*>(event);
  }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag)
      const override {
    if (!*event) *event = new double;
    *static_cast<double*>(*event) = now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    return *static_cast<double*>(end) - *static_cast<double*>(start);
  }

 private:
  static Device whole(Device device) {
    return Device(kCUDA, device.index() < 0 ? current : device.index());
  }
  static c10::Stream stream(Device device, bool fresh) {
    static std::atomic<c10::StreamId> next{1};
    device = whole(device);
    return c10::Stream(
        c10::Stream::UNSAFE, device, fresh ? next++ % 32 + 1 : streams[device.index()]);
  }
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex deviceCount() const override { return device_count; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return std::exchange(current, device);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current : std::exchange(current, device);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, current); }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current : device);
  }
};

// ------------------------------------------------------------------ operators

// The same memory, as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const auto& storage = tensor.storage();
  c10::Storage shared(
      c10::Storage::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(const_cast<void*>(storage.data()), Device(kCPU)), nullptr, false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  out.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  out._set_conj(tensor.is_conj());
  out._set_neg(tensor.is_neg());
  return out;
}

void require_same_device(const Tensor& one, const Tensor& other, const char* where) {
  TORCH_CHECK(
      !other.defined() || other.dim() == 0 || one.device() == other.device(),
      "Expected all tensors to be on the same device, but found at least two devices, ",
      one.device(), " and ", other.device(), "! (when checking ", where, ")");
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(kCUDA, current)));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype));
}

Tensor empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<Device> device, std::optional<bool>,
    std::optional<c10::MemoryFormat> memory_format) {
  c10::DeviceGuard guard(device.value_or(Device(kCUDA, current)));
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), memory_format);
}

Tensor to_device(const Tensor& tensor, Device device) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  auto out = empty_strided(
      tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, device, {});
  on_cpu(out).copy_(tensor);
  return out;
}

Tensor& copy_(Tensor& self, const Tensor& src, bool) {
  on_cpu(self).copy_(on_cpu(src));
  return self;
}

const Tensor& resize_(
    const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  int64_t count = 1;
  for (auto side : size) count *= side;
  const size_t bytes = (self.storage_offset() + count) * self.itemsize();
  auto storage = self.storage();
  if (bytes > storage.nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto data = allocator.allocate(bytes);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(data));
    storage.set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  if (format && *format != c10::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage(
    Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
    c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  int64_t last = offset;
  for (size_t i = 0; i < size.size(); i++)
    last += size[i] ? (size[i] - 1) * (stride.data() ? stride[i] : 0) : 0;
  TORCH_CHECK(
      static_cast<size_t>(last) * self.itemsize() <= source.nbytes(),
      "the simulated device cannot enlarge a storage that a tensor is set to");
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.data()) impl->set_sizes_and_strides(size, stride);
  else impl->set_sizes_contiguous(size);
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(
      self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(Tensor&, at::Stream) {}

// Fused, as on a GPU: without the scores in memory, unless only the plain kernel is allowed.
Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
    bool gqa) {
  for (const auto& other : {key, value, mask.value_or(Tensor())})
    require_same_device(query, other, "scaled_dot_product_attention");
  auto& context = at::globalContext();
  if (!context.userEnabledFlashSDP() && !context.userEnabledMemEfficientSDP() &&
      !context.userEnabledCuDNNSDP())
    return std::get<0>(at::_scaled_dot_product_attention_math(
        query, key, value, mask, dropout, causal, std::nullopt, scale, gqa));
  std::optional<Tensor> cpu_mask;
  if (mask && mask->defined()) cpu_mask = on_cpu(*mask);
  return to_device(
      at::scaled_dot_product_attention(
          on_cpu(query), on_cpu(key), on_cpu(value), cpu_mask, dropout, causal, scale, gqa),
      query.device());
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
    bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  TORCH_CHECK(
      input.device() == weight.device(), "Input type (", input.toString(), " on ", input.device(),
      ") and weight type (", weight.toString(), " on ", weight.device(), ") should be the same");
  require_same_device(input, bias.value_or(Tensor()), "convolution");
  std::optional<Tensor> cpu_bias;
  if (bias && bias->defined()) cpu_bias = on_cpu(*bias);
  return to_device(
      at::convolution_symint(
          on_cpu(input), on_cpu(weight), cpu_bias, stride, padding, dilation, transposed,
          output_padding, groups),
      input.device());
}

// cuBLAS's workspace, which PyTorch takes at the first product and keeps.
constexpr size_t WORKSPACE = 2 * 4096 * 1024 + 8 * 16 * 1024;
void* workspaces[MAX_DEVICES] = {};

void use_cublas(DeviceIndex device) {
  if (!workspaces[device]) workspaces[device] = take(device, WORKSPACE);
}

void clear_workspaces() {
  for (int device = 0; device < MAX_DEVICES; device++)
    give_back(device, std::exchange(workspaces[device], nullptr));
}

bool is_product(const std::string& name) {
  for (const char* product : {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
    if (name == product) return true;
  return false;
}

bool is_generator(const c10::Argument& argument) {
  return argument.type()->str().find("Generator") != std::string::npos;
}

// Everything else: the CPU's operator over the same memory.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), start = stack->size() - count;
  std::optional<Device> device;
  struct Pair { Tensor ours, theirs; };
  std::vector<Pair> pairs;

  auto lend = [&](const Tensor& tensor, bool written) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      if (tensor.defined() && tensor.dim() > 0 && tensor.device().is_cpu()) pairs.push_back({tensor, tensor});
      return tensor;
    }
    if (!device) device = tensor.device();
    const bool unsized = written && tensor.numel() == 0;
    auto lent = unsized ? at::empty({0}, tensor.options().device(kCPU)) : on_cpu(tensor);
    pairs.push_back({tensor, lent});
    return lent;
  };

  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[start + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor()) {
      value = lend(value.toTensor(), written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(lend(tensor, written));
      value = c10::List<Tensor>(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList())
        tensors.push_back(tensor ? std::optional<Tensor>(lend(*tensor, written)) : tensor);
      value = tensors;
    } else if (value.isDevice()) {
      if (value.toDevice().is_cuda()) {
        if (!device) device = value.toDevice();
        value = Device(kCPU);
      }
    } else if (value.isNone() && is_generator(schema.arguments()[i])) {
      const auto& own = default_generator(device ? device->index() : current);
      value = static_cast<Generator*>(own.unsafeGetGeneratorImpl())->inner;
    } else if (value.isGenerator()) {
      if (auto* ours = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl()))
        value = ours->inner;
    }
  }
  if (!device) device = Device(kCUDA, current);
  const std::string name = schema.name();
  const bool indexes = name == "aten::index" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_";  // with indices that may be the host's
  for (const auto& [ours, theirs] : pairs)
    TORCH_CHECK(
        ours.device() == *device || (ours.device().is_cpu() && (ours.dim() == 0 || indexes)),
        "Expected all tensors to be on the same device, but found at least two devices, ",
        *device, " and ", ours.device(), "! (when checking ", name, ")");

  if (is_product(name)) use_cublas(device->index());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (const auto& [ours, theirs] : pairs)
    if (ours.numel() == 0 && theirs.numel() > 0 && ours.is_cuda()) {
      resize_(ours, theirs.sizes(), {});
      on_cpu(ours).copy_(theirs);
    }
  auto ours_of = [&](const Tensor& out) -> Tensor {
    if (!out.defined()) return out;
    for (const auto& [ours, theirs] : pairs)
      if (out.is_same(theirs)) return ours;
    for (const auto& [ours, theirs] : pairs)
      if (ours.is_cuda() && out.has_storage() && ours.numel() > 0 &&
          out.storage().data() == ours.storage().data()) {
        auto view = at::detail::make_tensor<c10::TensorImpl>(
            c10::Storage(ours.storage()), c10::DispatchKeySet(c10::DispatchKey::CUDA),
            out.dtype());
        view.unsafeGetTensorImpl()->set_storage_offset(out.storage_offset());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(out.sizes(), out.strides());
        return view;
      }
    return to_device(out, *device);
  };
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t i = 0; i < results; i++) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = ours_of(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(ours_of(tensor));
      value = c10::List<Tensor>(tensors);
    }
  }
}

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("scaled_dot_product_attention", TORCH_FN(attention));
  m.impl("convolution", TORCH_FN(convolution));
  // For these PyTorch would rather take them apart than fall back.
  for (const char* whole : {"native_group_norm", "native_layer_norm", "_fused_rms_norm"})
    m.impl(whole, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

extern "C" {

void simulate(int devices, size_t total, size_t context) {
  device_count = devices;
  c10::SetAllocator(kCUDA, &allocator);
  for (auto& memory : memories) {
    memory.total = total;
    memory.context = context;
  }
}

// NVML, as far as it is asked. pynvml loads "libnvidia-ml.so.1", which is this library's name.

struct Utilization { unsigned int gpu, memory; };
struct MemoryInfo { unsigned long long total, free, used; };
struct Process { unsigned int pid; unsigned long long used; unsigned int gpu, compute; };

static int tell(char* out, unsigned int size, const std::string& text) {
  std::snprintf(out, size, "%s", text.c_str());
  return 0;
}
static int index_of(Memory* gpu) { return gpu - memories; }
static std::string uuid_of(Memory* gpu) {
  return "GPU-00000000-0000-0000-0000-00000000000" + std::to_string(index_of(gpu));
}

int nvmlInit_v2() { return 0; }
int nvmlInitWithFlags(unsigned int) { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "not simulated"; }
int nvmlSystemGetDriverVersion(char* out, unsigned int size) { return tell(out, size, "580.0"); }
int nvmlDeviceGetCount_v2(unsigned int* out) { *out = device_count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Memory** out) {
  if (index >= static_cast<unsigned int>(device_count)) return 2;
  *out = &memories[index];
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char* uuid, Memory** out) {
  for (int index = 0; index < device_count; index++)
    if (uuid_of(&memories[index]) == uuid) { *out = &memories[index]; return 0; }
  return 6;
}
int nvmlDeviceGetIndex(Memory* gpu, unsigned int* out) { *out = index_of(gpu); return 0; }
int nvmlDeviceGetName(Memory*, char* out, unsigned int size) {
  return tell(out, size, "Simulated GPU");
}
int nvmlDeviceGetUUID(Memory* gpu, char* out, unsigned int size) {
  return tell(out, size, uuid_of(gpu));
}
int nvmlDeviceGetMemoryInfo(Memory* gpu, MemoryInfo* out) {
  const auto [free, total] = allocator.getMemoryInfo(index_of(gpu));
  *out = {total, free, total - free};
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(Memory*, int* major, int* minor) {
  *major = 8;
  *minor = 6;
  return 0;
}
int nvmlDeviceGetUtilizationRates(Memory*, Utilization* out) { *out = {0, 0}; return 0; }
int nvmlDeviceGetGraphicsRunningProcesses_v3(Memory*, unsigned int* count, Process*) {
  *count = 0;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Memory* gpu, unsigned int* count, Process* out) {
  const bool has_room = out && *count >= 1;
  *count = 1;
  if (!has_room) return 7;
  out[0] = {static_cast<unsigned int>(getpid()), gpu->context + gpu->reserved, 0, 0};
  return 0;
}

void set_fraction(int device, double fraction) { memories[device].fraction = fraction; }
double get_fraction(int device) { return memories[device].fraction; }
void fail_in(int device, int64_t allocations) { memories[device].fail_in = allocations; }
void clear_cublas() { clear_workspaces(); }
void empty_cache() { allocator.emptyCache(); }
void reset_pinned() {
  std::lock_guard<std::mutex> guard(pinned_lock);
  peak_pinned_bytes = pinned_bytes;
}
void reset_peak(int device) { allocator.resetPeakStats(device); }
void set_default_generator(int device, void* generator) {
  generators[device] = at::Generator(c10::intrusive_ptr<c10::GeneratorImpl>::reclaim_copy(
      static_cast<c10::GeneratorImpl*>(generator)));
}
int get_device() { return current; }
void set_device(int device) { if (device >= 0) current = device; }

void stats(int device, size_t* out) {
  std::lock_guard<std::mutex> guard(lock);
  const Memory& memory = memories[device];
  const size_t values[] = {
      memory.allocated, memory.peak_allocated, memory.reserved, memory.peak_reserved,
      memory.allocations, memory.retries, memory.failures,
      memory.total - std::min(memory.total, used_of_device(memory)), memory.total,
      pinned_bytes, peak_pinned_bytes};
  std::copy(std::begin(values), std::end(values), out);
}
}
