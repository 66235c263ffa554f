// What a kernel on blocks of rows needs: pieces of a stretch of rows, threads that share them, memory, products, and rows and
// parameters of any dtype as numbers of one, T: float or double.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "matrix.h"
#include "rows.h"

namespace fastadapt {

template <class T>
constexpr torch::headeronly::ScalarType kTypeOf =
    std::is_same_v<T, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

// A stretch of rows in pieces of one size but for the last, `most` rows at the most, and about a multiple of `multiple` pieces.
struct Pieces {
  int64_t rows, size, count;

  Pieces(int64_t rows, int64_t most, int64_t multiple = 1) : rows(rows) {
    const int64_t wanted = multiple * ceil_div(rows, multiple * std::max<int64_t>(1, most));
    size = std::max<int64_t>(1, ceil_div(rows, std::max<int64_t>(1, wanted)));
    count = ceil_div(rows, size);
  }
  int64_t first(int64_t piece) const { return piece * size; }
  int64_t length(int64_t piece) const { return std::min(size, rows - first(piece)); }
};

// Uninitialised memory for `count` numbers.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count)
      : tensor_(torch::stable::empty({count}, kTypeOf<T>)), next_(static_cast<T*>(tensor_.mutable_data_ptr())) {}

  T* take(int64_t count) { return std::exchange(next_, next_ + count); }
  Matrix<T> take(int64_t rows, int64_t cols) { return {take(rows * cols), rows, cols, cols}; }

 private:
  torch::stable::Tensor tensor_;
  T* next_;
};

// `work()` makes each thread's worker, which is called with every item that the thread takes.
template <class F>
void share(int64_t items, const F& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = work();
    for (int64_t item = next++; item < items; item = next++) worker(item);
  });
}

template <class T>
torch::stable::Tensor as_tensor(Matrix<T> matrix) {
  const int64_t sizes[] = {matrix.rows, matrix.cols}, strides[] = {matrix.row_stride, matrix.col_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      matrix.data, 2, sizes, strides, 0, static_cast<int32_t>(kTypeOf<T>), aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// out = beta out + alpha left right
template <class T>
void multiply(Matrix<T> out, Matrix<T> left, Matrix<T> right, double beta, double alpha) {
  const torch::stable::Tensor result = as_tensor(out);
  addmm_out(result, result, as_tensor(left), as_tensor(right), beta, alpha);
}

// A tensor as rows, in whatever dtype it has.
struct Rows {
  torch::stable::Tensor tensor;

  explicit Rows(const torch::stable::Tensor& tensor) : tensor(flat_rows(tensor)) {}

  const void* at(int64_t row) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + row * tensor.stride(0) * tensor.element_size();
  }

  // These rows where they are if they can be worked on there, else as a copy in `room`.
  template <class T>
  Matrix<T> read(int64_t first, int64_t count, T* room) const {
    const int64_t cols = tensor.size(1);
    if (tensor.scalar_type() == kTypeOf<T> && tensor.stride(1) == 1) {
      return {static_cast<T*>(const_cast<void*>(at(first))), count, cols, tensor.stride(0)};
    }
    const Matrix<T> copy{room, count, cols, cols};
    load(at(first), tensor.scalar_type(), tensor.stride(0), tensor.stride(1), copy);
    return copy;
  }

  template <class T>
  void add_to(Matrix<T> sum, int64_t first) const {
    load(at(first), tensor.scalar_type(), tensor.stride(0), tensor.stride(1), sum, true);
  }
};

// A parameter in T: the vector (size) or the matrix (rows, cols), contiguous; nothing where it is absent.
template <class T>
class Parameter {
 public:
  explicit Parameter(const std::optional<torch::stable::Tensor>& given) {
    if (!given) return;
    const torch::stable::Tensor& tensor = *given;
    rows_ = tensor.dim() == 2 ? tensor.size(0) : 1;
    cols_ = tensor.size(-1);
    if (tensor.scalar_type() == kTypeOf<T> && tensor.is_contiguous()) {
      data_ = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
      return;
    }
    copy_.resize(rows_ * cols_);
    data_ = copy_.data();
    const int64_t row_stride = tensor.dim() == 2 ? tensor.stride(0) : 0;
    load(tensor.const_data_ptr(), tensor.scalar_type(), row_stride, tensor.stride(-1), matrix());
  }

  T* data() const { return data_; }
  Matrix<T> matrix() const { return {data_, rows_, cols_, cols_}; }

 private:
  std::vector<T> copy_;
  T* data_ = nullptr;
  int64_t rows_ = 0, cols_ = 0;
};

}  // namespace fastadapt
