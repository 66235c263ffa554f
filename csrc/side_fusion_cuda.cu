// side_fusion on a GPU: checks, memory and launches for the kernels of side_fusion_*.cuh.
//
// Like the library's other sources it uses the stable ABI only, and cudart is linked statically: the one library loads into any
// PyTorch, also one without CUDA, where the weak symbol below is null.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "side_fusion_launch.cuh"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastadapt::side_fusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensors = std::vector<std::optional<Tensor>>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kAnySize = -1;
constexpr const char* kNames[kEach] = {
    "tap",         "down_weight", "down_bias", "up_weight",       "up_bias",      "shared_weight",
    "shared_bias", "norm_weight", "norm_bias", "out_norm_weight", "out_norm_bias"};

// What an operator's arguments say of each adapter besides its tensors.
struct Options {
  const std::vector<int64_t>& activations;
  const std::vector<double>&scales, &norm_eps, &out_norm_eps;
};

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= kIdentity && code <= kQuickGelu, "activations: expected 0 to ", int{kQuickGelu}, ", got ", code);
  return static_cast<Activation>(code);
}

// A call's tensors as the kernels read them: contiguous, 16 bytes dividing their addresses, on one device.
class Operands {
 public:
  explicit Operands(const Tensor& tap)
      : device_(tap.get_device_index()), dtype_(tap.scalar_type()), guard_(device_), like_(tap) {
    STD_TORCH_CHECK(dtype_ == ScalarType::Half || dtype_ == ScalarType::BFloat16, "tap: expected float16 or bfloat16");
    STD_TORCH_CHECK(tap.dim() > 0, "tap: expected 1 dimension or more");
  }

  bool half() const { return dtype_ == ScalarType::Half; }

  // Memory of `tensor`, which lives as long as this, whose sizes end in `sizes`; `wide` is set to whether it is float32.
  const void* read(const Tensor& tensor, const char* name, std::vector<int64_t> sizes, bool& wide) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name, ": expected a tensor on the taps' GPU");
    const ScalarType dtype = tensor.scalar_type();
    wide = dtype == ScalarType::Float;
    STD_TORCH_CHECK(wide || dtype == dtype_, name, ": expected the taps' dtype or float32");
    bool fits = tensor.dim() >= static_cast<int64_t>(sizes.size());
    for (size_t d = 0; fits && d < sizes.size(); ++d) {
      fits = sizes[d] == kAnySize || tensor.size(tensor.dim() - sizes.size() + d) == sizes[d];
    }
    STD_TORCH_CHECK(fits, name, ": its shape does not fit the other tensors'");
    Tensor memory = torch::stable::contiguous(tensor);
    if (reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % 16) memory = torch::stable::clone(memory);
    kept_.push_back(memory);
    return memory.const_data_ptr();
  }

  Tensor empty(Sizes sizes, ScalarType dtype) const { return torch::stable::new_empty(like_, sizes, dtype); }
  ScalarType dtype() const { return dtype_; }

  // `bytes` of memory for the kernels' own use.
  void* workspace(int64_t bytes) {
    kept_.push_back(empty({bytes}, ScalarType::Byte));
    return kept_.back().mutable_data_ptr();
  }

  cudaStream_t stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "side_fusion: this PyTorch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  const int32_t device_;
  const ScalarType dtype_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor like_;
  std::vector<Tensor> kept_;
};

// Starts kernels on a stream.
struct Launch {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int shared, const Arguments&... arguments) const {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) {
      kernel<<<grid, kThreads, shared, stream>>>(arguments...);
      error = cudaGetLastError();
    }
    STD_TORCH_CHECK(error == cudaSuccess, "side_fusion: ", cudaGetErrorString(error));
  }
};

// The call's next adapter, from the kEach tensors that start at `tensors`.
void add_adapter(Call& call, Operands& operands, const std::optional<Tensor>* tensors, const Options& options, size_t i) {
  STD_TORCH_CHECK(call.count < kMaxAdapters, "side_fusion: at most ", kMaxAdapters, " adapters");
  STD_TORCH_CHECK(tensors[kTap] && tensors[kDown], "tap and down_weight: expected tensors, got None");
  STD_TORCH_CHECK(tensors[kDown]->dim() == 2, "down_weight: expected 2 dimensions");
  Adapter& adapter = call.adapters[call.count++];
  const auto rows_of = [&](int t) { return tensors[t] && tensors[t]->dim() == 2 ? tensors[t]->size(0) : 0; };
  const int64_t inputs = tensors[kTap]->size(-1), hidden = rows_of(kDown), own = rows_of(kUp), shared = rows_of(kShared);
  const int64_t outputs = own + shared;
  for (const int64_t width : {inputs, outputs}) {
    STD_TORCH_CHECK(width > 0 && width <= kMaxWidth && width % 8 == 0, "tap and result: expected a width of 8, 16, ..., ",
                    kMaxWidth, ", got ", width);
  }
  STD_TORCH_CHECK(hidden > 0 && hidden <= kHidden, "down_weight: expected a hidden width of 1 to ", kHidden);
  const int64_t rows = tensors[kTap]->numel() / inputs;
  if (call.count == 1) {
    STD_TORCH_CHECK(rows < int64_t{1} << 31, "tap: expected fewer than 2^31 rows");
    call.rows = rows;
    call.outputs = static_cast<int>(outputs);
  }
  STD_TORCH_CHECK(rows == call.rows && outputs == call.outputs, "adapters: expected results of one shape");
  const std::vector<int64_t> sizes[kEach] = {{inputs}, {hidden, inputs}, {hidden}, {own, hidden}, {own},     {shared, hidden},
                                             {shared}, {inputs},         {inputs}, {outputs},     {outputs}};
  for (int t = 0; t < kEach; ++t) {
    if (!tensors[t]) continue;
    bool wide = false;
    adapter.tensors[t] = operands.read(*tensors[t], kNames[t], sizes[t], wide);
    STD_TORCH_CHECK(t == kTap ? !wide : tensors[t]->dim() == static_cast<int64_t>(sizes[t].size()), kNames[t],
                    ": expected ", t == kTap ? "16 bits" : "fewer dimensions");
    adapter.wide |= static_cast<unsigned>(wide) << t;
  }
  adapter.inputs = static_cast<int>(inputs);
  adapter.hidden = static_cast<int>(hidden);
  adapter.own = static_cast<int>(own);
  adapter.shared = static_cast<int>(shared);
  adapter.activation = activation_of(options.activations[i]);
  adapter.scale = static_cast<float>(options.scales[i]);
  adapter.norm_eps = static_cast<float>(options.norm_eps[i]);
  adapter.out_eps = static_cast<float>(options.out_norm_eps[i]);
}

size_t adapter_count(const OptionalTensors& tensors, int64_t base_count, const Options& options) {
  const size_t count = options.scales.size();
  STD_TORCH_CHECK(count > 0 && options.activations.size() == count && options.norm_eps.size() == count &&
                      options.out_norm_eps.size() == count && base_count >= 0 &&
                      tensors.size() == base_count + kEach * count,
                  "side_fusion: lists of ", count, " adapters and ", base_count, " bases expected, and their tensors");
  return count;
}

std::vector<Tensor> side_fusion(
    const OptionalTensors& tensors, int64_t base_count, const std::vector<int64_t>& activations,
    const std::vector<double>& scales, const std::vector<double>& norm_eps, const std::vector<double>& out_norm_eps) {
  const Options options{activations, scales, norm_eps, out_norm_eps};
  const size_t count = adapter_count(tensors, base_count, options);
  STD_TORCH_CHECK(base_count <= kMaxBases, "bases: expected at most ", kMaxBases);
  STD_TORCH_CHECK(tensors[base_count].has_value(), "tap: expected a tensor, got None");
  const Tensor& tap = *tensors[base_count];
  Operands operands(tap);
  Call call{};
  for (size_t i = 0; i < count; ++i) add_adapter(call, operands, &tensors[base_count + kEach * i], options, i);
  call.base_count = static_cast<int>(base_count);
  for (int b = 0; b < call.base_count; ++b) {
    STD_TORCH_CHECK(tensors[b] && tensors[b]->numel() == call.rows * call.outputs,
                    "bases: expected tensors of the result's shape");
    bool wide = false;
    call.bases[b] = operands.read(*tensors[b], "bases", {call.outputs}, wide);
    call.wide_bases |= static_cast<unsigned>(wide) << b;
  }
  call.wide_out = call.wide_bases != 0;
  plan(call);
  std::vector<int64_t> sizes(tap.sizes().begin(), tap.sizes().end());
  sizes.back() = call.outputs;
  Tensor out = operands.empty(sizes, call.wide_out ? ScalarType::Float : operands.dtype());
  call.out = out.mutable_data_ptr();
  place_forward(call, operands.workspace(place_forward(call, nullptr)));
  const Launch launch{operands.stream()};
  operands.half() ? forward<Half>(call, launch) : forward<Bfloat>(call, launch);
  return {out};
}

std::vector<Tensor> side_fusion_backward(
    const OptionalTensors& saved, const OptionalTensors& grads, const std::vector<bool>& needs, int64_t base_count,
    const std::vector<int64_t>& activations, const std::vector<double>& scales, const std::vector<double>& norm_eps,
    const std::vector<double>& out_norm_eps) {
  const Options options{activations, scales, norm_eps, out_norm_eps};
  const size_t count = adapter_count(saved, base_count, options);
  STD_TORCH_CHECK(needs.size() == saved.size(), "needs: expected ", saved.size(), " entries, got ", needs.size());
  STD_TORCH_CHECK(grads.size() == 1 && grads[0], "grads: expected one tensor");
  std::vector<Tensor> wanted;
  void* pointers[kMaxAdapters][kEach] = {};
  Call call{};
  std::optional<Operands> operands;
  for (size_t j = 0; j < saved.size(); ++j) {
    const size_t adapter = (j - base_count) / kEach, tensor = (j - base_count) % kEach;
    const bool own = static_cast<int64_t>(j) >= base_count;
    STD_TORCH_CHECK(!needs[j] || (own && saved[j] && tensor != kTap && tensor < kOutNorm),
                    "needs: expected none of a base, a tap, a norm of the result, or of what was not saved");
    if (own && tensor == kTap && saved[j]) {  // an adapter without a tap wants nothing
      if (!operands) operands.emplace(*saved[j]);
      add_adapter(call, *operands, &saved[j], options, adapter);
    }
    if (!needs[j]) continue;
    wanted.push_back(operands->empty(saved[j]->sizes(), saved[j]->scalar_type()));
    pointers[call.count - 1][tensor] = wanted.back().mutable_data_ptr();
  }
  if (wanted.empty()) return wanted;
  STD_TORCH_CHECK(grads[0]->numel() == call.rows * call.outputs, "grads: expected a tensor of the result's shape");
  call.dout = operands->read(*grads[0], "grads", {call.outputs}, call.wide_out);
  plan(call);
  Products products{};
  place_backward(call, products, pointers, operands->workspace(place_backward(call, products, pointers, nullptr)));
  const Launch launch{operands->stream()};
  operands->half() ? backward<Half>(call, products, launch) : backward<Bfloat>(call, products, launch);
  return wanted;
}

}  // namespace
}  // namespace fastadapt::side_fusion

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CUDA, m) {
  m.impl("side_fusion", TORCH_BOX(&fastadapt::side_fusion::side_fusion));
  m.impl("side_fusion_backward", TORCH_BOX(&fastadapt::side_fusion::side_fusion_backward));
}
