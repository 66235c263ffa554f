// The arguments of side_fusion (fastadapt/kernels/side_fusion/reference.py), checked: for its CPU and CUDA kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "rows.h"

namespace fastadapt::side {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensors of an adapter in a call's flat list, after the bases.
enum Role {
  kTap, kDownWeight, kDownBias, kUpWeight, kUpBias, kSharedWeight, kSharedBias, kNormWeight, kNormBias, kOutNormWeight,
  kOutNormBias, kEach
};
constexpr std::array<const char*, kEach> kNames = {
    "tap",         "down_weight", "down_bias", "up_weight",       "up_bias",      "shared_weight",
    "shared_bias", "norm_weight", "norm_bias", "out_norm_weight", "out_norm_bias"};

// What an operator is told besides its tensors, a number for each adapter.
struct Options {
  int64_t base_count;
  const std::vector<int64_t>& activations;
  const std::vector<double>&scales, &norm_eps, &out_norm_eps;

  size_t adapters() const { return scales.size(); }
  size_t tensors() const { return static_cast<size_t>(base_count) + kEach * adapters(); }
};

// One adapter's tensors, of shapes that fit each other.
struct Operands {
  const std::optional<Tensor>* own;  // kEach of them
  size_t index;
  Activation activation;
  double scale, norm_eps, out_norm_eps;
  int64_t depth, hidden, own_width, shared_width, width;  // K, h, n, m, N

  Operands(const OptionalTensors& flat, size_t i, const Options& options)
      : own(&flat[options.base_count + kEach * i]), index(i),
        activation(static_cast<Activation>(options.activations[i])), scale(options.scales[i]),
        norm_eps(options.norm_eps[i]), out_norm_eps(options.out_norm_eps[i]) {
    STD_TORCH_CHECK(options.activations[i] >= 0 && options.activations[i] < kActivations, "activations[", i,
                    "]: expected 0 to ", kActivations - 1, ", got ", options.activations[i]);
    STD_TORCH_CHECK(given(kTap).dim() > 0, "adapters[", i, "].tap: expected 1 dimension or more, got 0");
    depth = given(kTap).size(-1);
    hidden = rows_of(kDownWeight, depth);
    own_width = own[kUpWeight] ? rows_of(kUpWeight, hidden) : 0;
    shared_width = own[kSharedWeight] ? rows_of(kSharedWeight, hidden) : 0;
    width = projects() ? own_width + shared_width : hidden;
    check_vector(kDownBias, hidden, kDownWeight);
    check_vector(kUpBias, own_width, kUpWeight);
    check_vector(kSharedBias, shared_width, kSharedWeight);
    check_vector(kNormWeight, depth, kTap);
    check_vector(kNormBias, depth, kNormWeight);
    check_vector(kOutNormWeight, width, kTap);
    check_vector(kOutNormBias, width, kOutNormWeight);
  }

  const std::optional<Tensor>& operator[](Role role) const { return own[role]; }
  bool projects() const { return own[kUpWeight].has_value() || own[kSharedWeight].has_value(); }

  const Tensor& given(Role role) const {
    STD_TORCH_CHECK(own[role].has_value(), name(role), ": expected a tensor, got None");
    return *own[role];
  }

 private:
  std::string name(Role role) const { return "adapters[" + std::to_string(index) + "]." + kNames[role]; }

  int64_t rows_of(Role role, int64_t cols) const {
    const Tensor& matrix = given(role);
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(1) == cols, name(role), ": expected shape (any, ", cols, "), got ",
                    shape_text(matrix));
    return matrix.size(0);
  }

  void check_vector(Role role, int64_t size, Role owner) const {
    if (!own[role]) return;
    given(owner);
    STD_TORCH_CHECK(own[role]->dim() == 1 && own[role]->size(0) == size, name(role), ": expected shape (", size,
                    "), got ", shape_text(*own[role]));
  }
};

inline void check_options(const Options& options) {
  const size_t count = options.adapters();
  STD_TORCH_CHECK(count > 0, "scales: expected one entry an adapter, got none");
  STD_TORCH_CHECK(options.base_count >= 0, "base_count: expected 0 or more, got ", options.base_count);
  const auto check = [count](const char* name, size_t length) {
    STD_TORCH_CHECK(length == count, name, ": expected ", count, " entries, as `scales` has it, got ", length);
  };
  check("activations", options.activations.size());
  check("norm_eps", options.norm_eps.size());
  check("out_norm_eps", options.out_norm_eps.size());
}

inline void check_length(size_t length, size_t expected, const char* name) {
  STD_TORCH_CHECK(length == expected, name, ": expected ", expected, " entries, got ", length);
}

inline void check_type(const Tensor& tensor, const std::string& name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
          type == ScalarType::BFloat16,
      name, ": expected float64, float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
}

// `tensor` has the leading dimensions of `tap` and then `width` columns.
inline void check_like(const Tensor& tensor, const Tensor& tap, int64_t width, const std::string& name) {
  bool same = tensor.dim() == tap.dim() && tensor.size(-1) == width;
  for (int64_t d = 0; same && d + 1 < tap.dim(); ++d) same = tensor.size(d) == tap.size(d);
  STD_TORCH_CHECK(same, name, ": expected the leading dimensions of a tap of ", shape_text(tap), " and then ", width,
                  " columns, got ", shape_text(tensor));
}

// The adapters of a call, but those that come as nothing (all None) where `skip_absent`: they agree with each other.
inline std::vector<Operands> adapters_of(const OptionalTensors& flat, const Options& options, bool skip_absent) {
  std::vector<Operands> adapters;
  for (size_t i = 0; i < options.adapters(); ++i) {
    const auto* own = &flat[options.base_count + kEach * i];
    if (skip_absent && std::none_of(own, own + kEach, [](const auto& tensor) { return tensor.has_value(); })) continue;
    adapters.emplace_back(flat, i, options);
    const Operands &adapter = adapters.back(), &first = adapters.front();
    const std::string name = "adapters[" + std::to_string(i) + "]";
    for (size_t role = 0; role < kEach; ++role) {
      if (own[role]) check_type(*own[role], name + "." + kNames[role]);
    }
    STD_TORCH_CHECK(own[kTap]->scalar_type() == first.given(kTap).scalar_type(), name,
                    ".tap: expected the dtype of adapters[", first.index, "].tap");
    check_like(*own[kTap], first.given(kTap), adapter.depth, name + ".tap");
    STD_TORCH_CHECK(adapter.width == first.width, name, ": expected a result of ", first.width, " columns, got ",
                    adapter.width);
  }
  return adapters;
}

}  // namespace fastadapt::side
