// side_fusion on the CPU: the computation of fastadapt/kernels/side_fusion/reference.py on blocks of rows that stay in a
// core's cache, so that between an adapter's tap and the sum nothing goes to memory.
//
// The products are ATen's, what lies between them is rows.cpp's.  Everything is computed in float32 (float64 for float64
// taps); other dtypes are converted where a block is read and written.
#include <torch/csrc/stable/library.h>

#include "side_adapter.h"

namespace fastadapt::side {
namespace {

constexpr int64_t kFewRows = 64;  // of which more threads would have less, each packing all weights for its products

template <class T>
void sum_adapters(const std::vector<Operands>& calls, const std::vector<Rows>& bases, const Tensor& out) {
  const Adapters<T> adapters = prepared<T>(calls);
  const int64_t rows = out.size(0), threads = torch::stable::get_num_threads();
  const Pieces blocks(rows, kBlockRows, std::clamp<int64_t>(rows / kFewRows, 1, threads));
  const int64_t width = out.size(1), depth = most(calls, &Operands::depth), hidden = most(calls, &Operands::hidden);
  std::vector<T> bias(width, 0);
  for (const auto& adapter : adapters) {
    if (!adapter->out_normed() && adapter->out_shift()) {
      add_scaled<T>({const_cast<T*>(adapter->out_shift()), 1, width, width}, 1, {bias.data(), 1, width, width});
    }
  }
  const bool in_place = out.scalar_type() == kTypeOf<T>;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = width * out.element_size();
  share(blocks.count, [&] {
    Memory<T> memory(blocks.size * (depth + hidden + 2 * width));
    T *input_room = memory.take(blocks.size * depth), *hidden_room = memory.take(blocks.size * hidden);
    T *y_room = memory.take(blocks.size * width), *sum_room = memory.take(blocks.size * width);
    return [=, &adapters, &bases, &bias, memory = std::move(memory)](int64_t block) {
      const int64_t first = blocks.first(block), count = blocks.length(block);
      char* place = to + first * row_bytes;
      const Matrix<T> sum{in_place ? reinterpret_cast<T*>(place) : sum_room, count, width, width};
      fill_rows<T>(sum, bias.data());
      for (const Rows& base : bases) base.add_to(sum, first);
      for (const auto& adapter : adapters) {
        const Matrix<T> r{hidden_room, count, adapter->call.hidden, adapter->call.hidden}, y{y_room, count, width, width};
        adapter->activated(adapter->input(first, count, input_room), r, r);
        adapter->project(r, adapter->out_normed() ? y : sum, adapter->out_normed() ? 0 : 1);
        if (adapter->out_normed()) {
          add_normalised<T>(y, adapter->out_shift(), adapter->out_norm_weight.data(), adapter->out_norm_bias.data(),
                            adapter->call.out_norm_eps, sum);
        }
      }
      if (!in_place) store(sum, place, out.scalar_type());
    };
  });
}

// Contiguous, of a vector's or a matrix's shape and dtype.
Tensor empty_parameter(const Tensor& like) {
  return like.dim() == 2 ? empty(like.size(0), like.size(1), like)
                         : reinterpret(empty(1, like.size(0), like), {like.size(0)}, {1});
}

std::vector<Tensor> side_fusion(
    const OptionalTensors& tensors, int64_t base_count, const std::vector<int64_t>& activations,
    const std::vector<double>& scales, const std::vector<double>& norm_eps, const std::vector<double>& out_norm_eps) {
  const Options options{base_count, activations, scales, norm_eps, out_norm_eps};
  check_options(options);
  check_length(tensors.size(), options.tensors(), "tensors");
  const std::vector<Operands> calls = adapters_of(tensors, options, false);
  const Tensor& tap = calls.front().given(kTap);
  const Tensor* widest = nullptr;
  std::vector<Rows> bases;
  for (int64_t b = 0; b < base_count; ++b) {
    const std::string name = "bases[" + std::to_string(b) + "]";
    STD_TORCH_CHECK(tensors[b].has_value(), name, ": expected a tensor, got None");
    check_type(*tensors[b], name);
    check_like(*tensors[b], tap, calls.front().width, name);
    bases.emplace_back(*tensors[b]);
    if (!widest || tensors[b]->element_size() > widest->element_size()) widest = &*tensors[b];
  }
  const Tensor rows = flat_rows(tap);
  const Tensor out = empty(rows.size(0), calls.front().width, widest ? *widest : tap);
  tap.scalar_type() == ScalarType::Double ? sum_adapters<double>(calls, bases, out) : sum_adapters<float>(calls, bases, out);
  return {unflat_rows(out, tap)};
}

std::vector<Tensor> side_fusion_backward(
    const OptionalTensors& saved, const OptionalTensors& grads, const std::vector<bool>& needs, int64_t base_count,
    const std::vector<int64_t>& activations, const std::vector<double>& scales, const std::vector<double>& norm_eps,
    const std::vector<double>& out_norm_eps) {
  const Options options{base_count, activations, scales, norm_eps, out_norm_eps};
  check_options(options);
  check_length(saved.size(), options.tensors(), "saved");
  check_length(needs.size(), options.tensors(), "needs");
  check_length(grads.size(), 1, "grads");
  STD_TORCH_CHECK(grads[0].has_value(), "grads[0]: expected a tensor, got None");
  check_type(*grads[0], "grads[0]");
  STD_TORCH_CHECK(std::none_of(needs.begin(), needs.begin() + base_count, [](bool need) { return need; }),
                  "needs: expected False for the bases, whose gradient is the result's, got True");
  const std::vector<Operands> calls = adapters_of(saved, options, true);
  std::vector<Wanted> wanted(calls.size());
  std::vector<Tensor> results;
  auto call = calls.begin();
  for (size_t adapter = 0; adapter < options.adapters(); ++adapter) {
    const bool present = call != calls.end() && call->index == adapter;
    for (size_t role = 0; role < kEach; ++role) {
      if (!needs[base_count + kEach * adapter + role]) continue;
      STD_TORCH_CHECK(present && call->own[role] && role != kTap && role != kOutNormWeight && role != kOutNormBias,
                      "needs: expected False for adapters[", adapter, "].", kNames[role], ", got True");
      results.push_back(empty_parameter(*call->own[role]));
      wanted[call - calls.begin()][role] = results.back();
    }
    if (present) ++call;
  }
  if (results.empty()) return results;
  const Tensor& tap = calls.front().given(kTap);
  check_like(*grads[0], tap, calls.front().width, "grads[0]");
  tap.scalar_type() == ScalarType::Double ? gradients<double>(calls, wanted, *grads[0])
                                          : gradients<float>(calls, wanted, *grads[0]);
  return results;
}

std::vector<Tensor> side_fusion_negative(
    const OptionalTensors& tensors, int64_t base_count, const std::vector<int64_t>& activations,
    const std::vector<double>& scales, const std::vector<double>& norm_eps, const std::vector<double>& out_norm_eps) {
  return side_fusion(resolved(tensors), base_count, activations, scales, norm_eps, out_norm_eps);
}

std::vector<Tensor> side_fusion_backward_negative(
    const OptionalTensors& saved, const OptionalTensors& grads, const std::vector<bool>& needs, int64_t base_count,
    const std::vector<int64_t>& activations, const std::vector<double>& scales, const std::vector<double>& norm_eps,
    const std::vector<double>& out_norm_eps) {
  return side_fusion_backward(
      resolved(saved), resolved(grads), needs, base_count, activations, scales, norm_eps, out_norm_eps);
}

}  // namespace
}  // namespace fastadapt::side

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) {
  m.impl("side_fusion", TORCH_BOX(&fastadapt::side::side_fusion));
  m.impl("side_fusion_backward", TORCH_BOX(&fastadapt::side::side_fusion_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, Negative, m) {
  m.impl("side_fusion", TORCH_BOX(&fastadapt::side::side_fusion_negative));
  m.impl("side_fusion_backward", TORCH_BOX(&fastadapt::side::side_fusion_backward_negative));
}
