// The autograd node of fastadapt_native::lora_linear, so that a CPU in eager mode runs no Python between its products.
//
// It says what fastadapt/core/operation.py says for every backend: what the backward reads, and that a backward which is
// itself differentiated runs the reference.  Autograd has no stable ABI: this library fits one version of torch.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

namespace fastadapt {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensors = c10::List<std::optional<Tensor>>;

constexpr size_t kHead = 2;  // tensors before the members' own: x and seed
constexpr size_t kEach = 4;  // tensors of a member: weight, bias, lora_a, lora_b
enum Role { kWeight, kBias, kLoraA, kLoraB };

OptionalTensors optional(const variable_list& tensors) {
  OptionalTensors list;
  list.reserve(tensors.size());
  for (const Tensor& tensor : tensors) list.push_back(tensor.defined() ? std::optional(tensor) : std::nullopt);
  return list;
}

variable_list call(const char* name, torch::jit::Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return stack.front().toTensorVector();
}

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  // given: those of `tensors` that are tensors, the form in which autograd sees them
  static variable_list forward(
      AutogradContext* ctx, at::TensorList given, const OptionalTensors& tensors, const std::vector<double>& scales,
      int64_t threshold) {
    at::AutoDispatchBelowADInplaceOrView below;
    const size_t inputs = tensors.size(), members = scales.size();
    variable_list saved;
    for (const std::optional<Tensor>& tensor : tensors) saved.push_back(tensor.value_or(Tensor()));
    // a boxed call consumes the lists that it is given
    variable_list outputs = call("fastadapt_native::lora_linear", {optional(saved), scales, threshold});
    saved.resize(inputs + members);
    // x is read by the gradients of weight and lora_a, a low-rank product by that of lora_b
    bool reads_x = false;
    for (size_t i = kHead; i < inputs; ++i) {
      if (!saved[i].defined() || !saved[i].requires_grad()) continue;
      const size_t member = (i - kHead) / kEach, role = (i - kHead) % kEach;
      reads_x |= role == kWeight || role == kLoraA;
      if (role == kLoraB) saved[inputs + member] = outputs[members + member];
    }
    if (!reads_x) saved[0] = Tensor();
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["shape"] = given[0].sizes();
    ctx->saved_data["scales"] = scales;
    ctx->saved_data["threshold"] = threshold;
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t members = grads.size() / 2, inputs = saved.size() - members;
    const auto defined = [](const Tensor& tensor) { return tensor.defined(); };
    // x was given, though it may not have been saved; nothing goes to forward's other three arguments
    const size_t given = 1 + std::count_if(saved.begin() + 1, saved.begin() + inputs, defined);
    variable_list results(given + 3);
    const auto any = std::find_if(grads.begin(), grads.end(), defined);
    if (any == grads.end()) return results;
    std::vector<int64_t> shape = ctx->saved_data["shape"].toIntVector();
    for (size_t g = 0; g < members; ++g) {  // a result that nothing used
      if (grads[g].defined()) continue;
      shape.back() = saved[kHead + kEach * g + kWeight].size(0);
      grads[g] = at::zeros(shape, any->options());
    }
    c10::List<bool> needs;
    for (size_t i = 0, edge = 0; i < inputs; ++i) {
      needs.push_back((i == 0 || saved[i].defined()) && ctx->needs_input_grad(edge++));
    }
    const std::vector<double> scales = ctx->saved_data["scales"].toDoubleVector();
    const int64_t threshold = ctx->saved_data["threshold"].toInt();
    const bool differentiated = at::GradMode::is_enabled() ||
        std::any_of(grads.begin() + members, grads.end(), defined);
    variable_list wanted;
    if (differentiated) {
      const double dropout_p = static_cast<double>(threshold) / 65536;
      wanted = call("fastadapt::lora_linear_backward",
                    {optional(saved), optional(grads), needs, scales, dropout_p, std::string("reference")});
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      wanted = call("fastadapt_native::lora_linear_backward", {optional(saved), optional(grads), needs, scales, threshold});
    }
    auto next = wanted.begin();
    for (size_t edge = 0; edge < given; ++edge) {
      if (ctx->needs_input_grad(edge)) results[edge] = *next++;
    }
    return results;
  }
};

variable_list lora_linear(const OptionalTensors& tensors, at::ArrayRef<double> scales, int64_t threshold) {
  variable_list given;
  given.reserve(tensors.size());
  for (const std::optional<Tensor>& tensor : tensors) {
    if (tensor) given.push_back(*tensor);
  }
  return LoraLinear::apply(at::TensorList(given), tensors, scales.vec(), threshold);
}

}  // namespace
}  // namespace fastadapt

TORCH_LIBRARY_IMPL(fastadapt_native, Autograd, m) {
  m.impl("lora_linear", fastadapt::lora_linear);
}
