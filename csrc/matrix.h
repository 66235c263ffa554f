// Matrices of the CPU: allocated, seen under other shapes, multiplied, and their rows worked on by torch's threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

namespace fastadapt {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kGrain = 32768;  // elements for a thread at the least, as in ATen

inline int32_t dtype_of(const torch::stable::Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// An uninitialised matrix of `like`'s dtype; allocated past the dispatcher, to spare the host.
inline torch::stable::Tensor empty(int64_t rows, int64_t cols, const torch::stable::Tensor& like) {
  const int64_t sizes[] = {rows, cols}, strides[] = {cols, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype_of(like), aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// `tensor`'s memory under other sizes and strides.
inline torch::stable::Tensor reinterpret(const torch::stable::Tensor& tensor, Sizes sizes, Sizes strides) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), sizes.size(), sizes.data(), strides.data(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor transposed(const torch::stable::Tensor& matrix) {
  return reinterpret(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// `tensor` as (rows, width), a view wherever its strides allow one.
inline torch::stable::Tensor flat_rows(const torch::stable::Tensor& tensor) {
  const Sizes sizes = tensor.sizes();
  if (sizes.size() == 2) return tensor;
  const int64_t width = sizes.back();
  const int64_t rows = std::accumulate(sizes.begin(), sizes.end() - 1, int64_t{1}, std::multiplies<>());
  return tensor.is_contiguous() ? reinterpret(tensor, {rows, width}, {width, 1})
                                : torch::stable::reshape(tensor, {rows, width});
}

// A contiguous (rows, width) with the leading dimensions of `like`.
inline torch::stable::Tensor unflat_rows(const torch::stable::Tensor& matrix, const torch::stable::Tensor& like) {
  if (like.dim() == 2) return matrix;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end()), strides(sizes.size(), 1);
  sizes.back() = matrix.size(1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  return reinterpret(matrix, sizes, strides);
}

// out = beta * self + alpha * left right, where self may be out.
inline void addmm_out(
    const torch::stable::Tensor& out, const torch::stable::Tensor& self, const torch::stable::Tensor& left,
    const torch::stable::Tensor& right, double beta, double alpha) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), left.get(), right.get(), beta, alpha));
}

template <class F>
void for_each_row(int64_t rows, int64_t cols, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace fastadapt
