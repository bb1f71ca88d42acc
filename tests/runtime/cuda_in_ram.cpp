// A CUDA device in the host's memory, for a CPU build of torch: tensors say `cuda:0`, are counted and limited as a
// card's are, and every operation on them runs the CPU's kernel. Tensors of two devices in one operation are refused, as
// CUDA's kernels refuse them. Has to be loaded before torch, whose hooks are looked up once.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

namespace {

constexpr c10::DeviceType CUDA = c10::DeviceType::CUDA;
const c10::Device DEVICE(CUDA, 0);

std::mutex lock;
size_t allocated = 0, peak = 0, limit = SIZE_MAX;
std::set<const void*> pinned;

size_t& size_before(void* block) {
  return *static_cast<size_t*>(block);
}

void free_device(void* block) {
  std::lock_guard<std::mutex> held(lock);
  allocated -= size_before(block);
  std::free(block);
}

void free_pinned(void* block) {
  std::lock_guard<std::mutex> held(lock);
  pinned.erase(block);
  std::free(block);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    size_t rounded = (bytes + 511) / 512 * 512;
    std::lock_guard<std::mutex> held(lock);
    TORCH_CHECK_WITH(
        OutOfMemoryError, allocated + rounded <= limit,
        "CUDA out of memory. Tried to allocate ", rounded >> 20, ".00 MiB. GPU 0 is a stand-in.");
    void* block = std::aligned_alloc(64, rounded + 64);
    size_before(block) = rounded;
    allocated += rounded;
    peak = std::max(peak, allocated);
    return {static_cast<char*>(block) + 64, block, &free_device, DEVICE};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* block = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
    std::lock_guard<std::mutex> held(lock);
    pinned.insert(block);
    return {block, block, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> held(lock);
    return pinned.count(data) > 0;
  }
};

at::Tensor show_to_cpu(const at::Tensor& tensor) {
  if (tensor.numel() == 0)  // an out tensor, perhaps, which the kernel resizes
    return at::detail::empty_strided_cpu(tensor.sizes(), tensor.strides(), tensor.scalar_type());
  auto storage = tensor.storage();
  auto bytes = static_cast<int64_t>(storage.nbytes());
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto flat = at::from_blob(
      storage.mutable_data(), {bytes / static_cast<int64_t>(tensor.dtype().itemsize())}, [storage](void*) {}, options);
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(flat.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) view._set_conj(true);
  if (tensor.is_neg()) view._set_neg(true);
  return view;
}

at::Tensor bring(const at::Tensor& result) {
  auto made = at::detail::empty_strided_generic(
      result.sizes(), result.strides(), &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      result.scalar_type());
  std::memcpy(
      made.storage().mutable_data(),
      static_cast<const char*>(result.storage().data()) + result.storage_offset() * result.dtype().itemsize(),
      made.storage().nbytes());
  return made;
}

struct Shown {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // (on the device, what the CPU's kernel sees)
  bool on_host = false, on_device = false, to_device = false;

  at::Tensor show(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      on_host = on_host || (tensor.dim() > 0 && tensor.device().is_cpu());
      return tensor;
    }
    on_device = true;
    for (auto& [device, cpu] : pairs)
      if (device.is_same(tensor)) return cpu;
    pairs.emplace_back(tensor, show_to_cpu(tensor));
    return pairs.back().second;
  }

  at::Tensor take(const at::Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (auto& [device, cpu] : pairs) {
      if (!cpu.is_same(result)) continue;
      if (cpu.sizes() != device.sizes()) {
        auto filled = bring(result);
        device.unsafeGetTensorImpl()->set_storage_keep_dtype(filled.storage());
        device.unsafeGetTensorImpl()->set_sizes_and_strides(filled.sizes(), filled.strides());
      }
      return device;
    }
    for (auto& [device, cpu] : pairs) {  // a view
      if (result.storage().data() != cpu.storage().data() || result.numel() == 0) continue;
      auto view = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(device.storage()), device.key_set(), result.dtype());
      view.unsafeGetTensorImpl()->set_storage_offset(result.storage_offset());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides());
      return view;
    }
    return bring(result);
  }
};

bool allows_two_devices(const std::string& name) {
  return name == "aten::copy_" || name == "aten::index" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_" || name == "aten::_unsafe_index_put";
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size(), begin = stack->size() - count;
  Shown shown;
  for (size_t index = begin; index < stack->size(); index++) {
    auto& value = (*stack)[index];
    if (value.isTensor()) {
      value = shown.show(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& one : value.toTensorVector()) tensors.push_back(shown.show(one));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (std::optional<at::Tensor> one : value.toOptionalTensorVector())
        tensors.push_back(one ? std::optional(shown.show(*one)) : one);
      value = tensors;
    } else if (value.isDevice()) {
      shown.to_device = value.toDevice().is_cuda();
      value = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(
      !(shown.on_host && shown.on_device) || allows_two_devices(schema.name()),
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", schema.name(),
      ")");
  TORCH_CHECK_NOT_IMPLEMENTED(
      op.hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
          op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
          op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd),
      schema.name(), " has no kernel on the CPU");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (!shown.on_device && !shown.to_device) return;
  for (size_t index = stack->size() - schema.returns().size(); index < stack->size(); index++) {
    auto& value = (*stack)[index];
    if (value.isTensor()) {
      value = shown.take(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& one : value.toTensorVector()) tensors.push_back(shown.take(one));
      value = tensors;
    }
  }
}

int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // plain arithmetic: the fused kernels exist on a GPU only
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);
namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &device_allocator);

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("_fused_sdp_choice", choose_attention);
}

TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {  // which has operations of its own for any device, compiled ones
  for (const char* name :
       {"quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise", "gemm_4bit", "gemv_4bit",
        "optimizer_update_32bit", "optimizer_update_8bit_blockwise"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

extern "C" {
size_t stand_in_allocated() { return allocated; }
size_t stand_in_peak() { return peak; }
void stand_in_reset_peak() { peak = allocated; }
void stand_in_limit(size_t bytes) { limit = bytes; }
}
