// Matrices of the CPU: allocated, and their rows worked on by torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace fastadapt {

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

template <class F>
void for_each_row(int64_t rows, int64_t cols, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace fastadapt
