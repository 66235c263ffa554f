// LoRA linear on the CPU, the computation of fastadapt/kernels/lora_linear/reference.py call by call, driven from C++:
// on small tensors Python's own time is most of the reference's.
//
//     s_g = m_g(x) A_g^T
//     y_g = x W_g^T + b_g + alpha_g s_g B_g^T        alpha_g = scale_g / (1 - p)
//
//     low_g = dy_g B_g
//     dx    = sum_g dy_g W_g + alpha_g m_g(low_g A_g)
//     dA_g  = alpha_g low_g^T m_g(x)      dB_g = alpha_g dy_g^T s_g      dW_g = dy_g^T x      db_g = sum_rows dy_g
//
// The products are ATen's, so results equal the reference's bit for bit.  They are called through the C functions that
// AOTInductor's models use: those take alpha and beta, which the stable dispatcher call cannot pass, and cost the host
// a fraction of it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "dropout.h"
#include "matrix.h"

namespace fastadapt {
namespace {

using torch::stable::Tensor;

constexpr size_t kHead = 2;  // tensors before the members' own: x and seed
constexpr size_t kEach = 4;  // tensors of a member: weight, bias, lora_a, lora_b
constexpr int64_t kAnySize = -1;

const Tensor& given(const std::optional<Tensor>& tensor, const char* name, size_t member) {
  STD_TORCH_CHECK(tensor.has_value(), name, " of member ", member, ": expected a tensor, got None");
  return *tensor;
}

void check_matrix(const Tensor& tensor, int64_t rows, int64_t cols, const char* name, size_t member) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && (rows == kAnySize || tensor.size(0) == rows) && tensor.size(1) == cols,
      name, " of member ", member, ": expected shape (", rows, ", ", cols, "), where -1 is any size, got ",
      shape_text(tensor));
}

// One member's tensors, of shapes that fit each other.
struct Member {
  const Tensor& weight;               // (N, K)
  const std::optional<Tensor>& bias;  // (N,)
  const Tensor& lora_a;               // (r, K)
  const Tensor& lora_b;               // (N, r)

  Member(const OptionalTensors& flat, size_t g, int64_t width)
      : weight(given(flat[kHead + kEach * g], "weight", g)),
        bias(flat[kHead + kEach * g + 1]),
        lora_a(given(flat[kHead + kEach * g + 2], "lora_a", g)),
        lora_b(given(flat[kHead + kEach * g + 3], "lora_b", g)) {
    check_matrix(weight, kAnySize, width, "weight", g);
    check_matrix(lora_a, kAnySize, width, "lora_a", g);
    check_matrix(lora_b, weight.size(0), lora_a.size(0), "lora_b", g);
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias of member ", g,
                    ": expected shape (", weight.size(0), "), got ", shape_text(*bias));
  }
};

Tensor cast(const Tensor& tensor, const Tensor& like) {
  return dtype_of(tensor) == dtype_of(like) ? tensor : torch::stable::to(tensor, like.scalar_type());
}

Tensor product(const Tensor& left, const Tensor& right) {
  Tensor out = empty(left.size(0), right.size(1), left);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  return out;
}

// alpha * left^T right in `like`'s dtype.
Tensor scaled_product(const Tensor& left, const Tensor& right, double alpha, const Tensor& like) {
  Tensor out = empty(left.size(1), right.size(1), left);
  addmm_out(out, out, transposed(left), right, 0, alpha);  // beta = 0: out is not read
  return cast(out, like);
}

// `row` in every row of a new matrix; ATen's own broadcasting copy costs the host more than a small product.
Tensor repeated(const Tensor& row, int64_t rows) {
  const Tensor source = row.is_contiguous() ? row : torch::stable::contiguous(row);
  const int64_t cols = row.size(0);
  const size_t bytes = cols * row.element_size();
  Tensor out = empty(rows, cols, row);
  const void* from = source.const_data_ptr();
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for_each_row(rows, cols, [=](int64_t i) { std::memcpy(to + i * bytes, from, bytes); });
  return out;
}

// rows weight^T + bias
Tensor linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor across = transposed(cast(weight, rows));
  if (!bias) return product(rows, across);
  Tensor out = repeated(cast(*bias, rows), rows.size(0));
  addmm_out(out, out, rows, across, 1, 1);
  return out;
}

Tensor dropped(const Tensor& x, const std::optional<Tensor>& seed, int64_t threshold, size_t member) {
  return seed ? masked(x, *seed, threshold, static_cast<int64_t>(member)) : x;
}

Tensor add(const Tensor& self, const Tensor& other, double alpha) {
  AtenTensorHandle sum;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(self.get(), other.get(), alpha, &sum));
  return Tensor(sum);
}

double inv_keep(int64_t threshold) {
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold: expected 0 to 65535, got ", threshold);
  return 65536.0 / static_cast<double>(65536 - threshold);
}

void check_length(size_t length, size_t expected, const char* name) {
  STD_TORCH_CHECK(length == expected, name, ": expected ", expected, " entries, as `scales` has it, got ", length);
}

const Tensor& rows_tensor(const std::optional<Tensor>& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.has_value() && tensor->dim() > 0, name, ": expected a tensor of 1 dimension or more");
  return *tensor;
}

std::vector<Tensor> lora_linear(const OptionalTensors& tensors, const std::vector<double>& scales, int64_t threshold) {
  const size_t count = scales.size();
  STD_TORCH_CHECK(count > 0, "scales: expected one entry a member, got none");
  check_length(tensors.size(), kHead + kEach * count, "tensors");
  const Tensor& x = rows_tensor(tensors[0], "x");
  const std::optional<Tensor>& seed = tensors[1];
  const Tensor rows = flat_rows(x);
  const double rescale = inv_keep(threshold);
  std::vector<Tensor> outputs, products;
  for (size_t g = 0; g < count; ++g) {
    const Member member(tensors, g, x.size(-1));
    const Tensor low = linear(dropped(rows, seed, threshold, g), member.lora_a, std::nullopt);
    const Tensor y = linear(rows, member.weight, member.bias);
    addmm_out(y, y, low, transposed(cast(member.lora_b, x)), 1, scales[g] * rescale);
    outputs.push_back(unflat_rows(y, x));
    products.push_back(low);
  }
  outputs.insert(outputs.end(), products.begin(), products.end());
  return outputs;
}

std::vector<Tensor> lora_linear_backward(
    const OptionalTensors& saved, const OptionalTensors& grads, const std::vector<bool>& needs,
    const std::vector<double>& scales, int64_t threshold) {
  const size_t count = scales.size(), flat_count = kHead + kEach * count;
  STD_TORCH_CHECK(count > 0, "scales: expected one entry a member, got none");
  check_length(saved.size(), flat_count + count, "saved");
  check_length(grads.size(), 2 * count, "grads");
  check_length(needs.size(), flat_count, "needs");
  const std::optional<Tensor>&x = saved[0], &seed = saved[1];
  const double rescale = inv_keep(threshold);
  const int64_t width = given(saved[kHead], "weight", 0).size(-1);
  const bool need_x = needs[0];
  std::optional<Tensor> dx;
  std::vector<Tensor> wanted;
  for (size_t g = 0; g < count; ++g) {
    STD_TORCH_CHECK(!grads[count + g], "grads: expected None for the low-rank product of member ", g, ", got a tensor");
    const Member member(saved, g, width);
    const Tensor dy = flat_rows(rows_tensor(grads[g], "grads"));
    const size_t own = kHead + kEach * g;
    const bool need_weight = needs[own], need_bias = needs[own + 1], need_a = needs[own + 2], need_b = needs[own + 3];
    const double alpha = scales[g] * rescale;
    std::optional<Tensor> low;
    if (need_x || need_a) low = product(dy, cast(member.lora_b, dy));
    if (need_x) {
      const Tensor weight = cast(member.weight, dy), lora_a = cast(member.lora_a, dy);
      if (dx) {
        addmm_out(*dx, *dx, dy, weight, 1, 1);
      } else {
        dx = product(dy, weight);
      }
      if (seed) {
        dx = add(*dx, dropped(product(*low, lora_a), seed, threshold, g), alpha);
      } else {
        addmm_out(*dx, *dx, *low, lora_a, 1, alpha);
      }
    }
    if (need_weight) wanted.push_back(cast(product(transposed(dy), flat_rows(rows_tensor(x, "x"))), member.weight));
    if (need_bias) wanted.push_back(cast(torch::stable::sum(dy, Sizes{int64_t{0}}), given(member.bias, "bias", g)));
    if (need_a) {
      const Tensor kept = dropped(flat_rows(rows_tensor(x, "x")), seed, threshold, g);
      wanted.push_back(scaled_product(*low, kept, alpha, member.lora_a));
    }
    if (need_b) {
      wanted.push_back(scaled_product(dy, given(saved[flat_count + g], "product", g), alpha, member.lora_b));
    }
  }
  if (dx) wanted.insert(wanted.begin(), unflat_rows(*dx, *grads[0]));
  return wanted;
}

std::vector<Tensor> lora_linear_negative(
    const OptionalTensors& tensors, const std::vector<double>& scales, int64_t threshold) {
  return lora_linear(resolved(tensors), scales, threshold);
}

std::vector<Tensor> lora_linear_backward_negative(
    const OptionalTensors& saved, const OptionalTensors& grads, const std::vector<bool>& needs,
    const std::vector<double>& scales, int64_t threshold) {
  return lora_linear_backward(resolved(saved), resolved(grads), needs, scales, threshold);
}

}  // namespace
}  // namespace fastadapt

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&fastadapt::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&fastadapt::lora_linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, Negative, m) {
  m.impl("lora_linear", TORCH_BOX(&fastadapt::lora_linear_negative));
  m.impl("lora_linear_backward", TORCH_BOX(&fastadapt::lora_linear_backward_negative));
}
