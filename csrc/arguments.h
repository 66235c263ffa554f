// Arguments of the operators as the dispatcher hands them over: lists of tensors, some of them absent.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace fastadapt {

using OptionalTensors = std::vector<std::optional<torch::stable::Tensor>>;

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text;
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return "(" + text + ")";
}

// The kernels see memory, not the lazy negation that a view such as a conjugate's imaginary part carries.
inline OptionalTensors resolved(OptionalTensors tensors) {
  for (auto& tensor : tensors) {
    if (!tensor) continue;
    STD_TORCH_CHECK(tensor->is_cpu(), "a lazily negated tensor among those of another device than the CPU: resolve_neg() it");
    StableIValue stack[] = {torch::stable::detail::from(*tensor)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::resolve_neg", "", stack, TORCH_ABI_VERSION));
    tensor = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  }
  return tensors;
}

}  // namespace fastadapt
