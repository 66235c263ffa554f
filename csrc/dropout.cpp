// Dropout on the CPU: y = x where the Philox mask keeps, 0 elsewhere, without ever storing the mask.
//
// Built on LibTorch's stable ABI, so one library serves every torch >= 2.11 and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>

#include "cpu_versions.h"
#include "dropout.h"
#include "matrix.h"
#include "philox.h"

namespace fastadapt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What decides the mask, as the operators' arguments give it.
struct Mask {
  Key key;
  uint32_t threshold, member;
};

Mask make_mask(const Tensor& seed, int64_t threshold, int64_t member) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed: expected one int64 element, got ", seed.numel(), " of ",
                  torch::headeronly::toString(seed.scalar_type()));
  STD_TORCH_CHECK(threshold >= 0 && threshold <= 65536, "threshold: expected 0 to 65536, got ", threshold);
  STD_TORCH_CHECK(member >= 0 && member <= std::numeric_limits<uint32_t>::max(),
                  "member: expected 0 to 2^32 - 1, got ", member);
  const auto bits = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)},
          static_cast<uint32_t>(threshold), static_cast<uint32_t>(member)};
}

// y = x where kept, else zero bits, for one row of adjacent elements.  Bits is the unsigned integer as wide as an
// element, whose type does not matter; a dropped NaN or infinity becomes an exact +0 too.
template <class Bits>
FASTADAPT_CPU_VERSIONS void mask_row(const Bits* x, Bits* y, int64_t cols, int64_t row, Mask mask) {
  uint16_t pieces[kBlockColumns];
  for (int64_t start = 0; start < cols; start += kBlockColumns) {
    block_pieces(static_cast<uint32_t>(row), static_cast<uint32_t>(start / kPieces), mask.member, mask.key, pieces);
    const int count = static_cast<int>(std::min<int64_t>(kBlockColumns, cols - start));
#pragma omp simd
    for (int e = 0; e < count; ++e) {
      y[start + e] = x[start + e] & static_cast<Bits>(-static_cast<int64_t>(pieces[e] >= mask.threshold));
    }
  }
}

template <class Bits>
void mask_rows(const Tensor& x, Tensor& y, Mask mask) {
  const int64_t cols = x.size(1), stride = x.stride(0);
  const auto* from = static_cast<const Bits*>(x.const_data_ptr());
  auto* to = static_cast<Bits*>(y.mutable_data_ptr());
  for_each_row(x.size(0), cols, [=](int64_t row) { mask_row(from + row * stride, to + row * cols, cols, row, mask); });
}

}  // namespace

Tensor masked(const Tensor& input, const Tensor& seed, int64_t threshold, int64_t member) {
  STD_TORCH_CHECK(input.dim() == 2, "x: expected 2 dimensions (rows, cols), got ", input.dim());
  const Mask mask = make_mask(seed, threshold, member);
  // rows may lie anywhere; the elements of one row must be adjacent
  const Tensor x = input.stride(1) == 1 ? input : torch::stable::contiguous(input);
  Tensor y = empty(x.size(0), x.size(1), x);
  switch (x.scalar_type()) {
    case ScalarType::Double:
      mask_rows<uint64_t>(x, y, mask);
      break;
    case ScalarType::Float:
      mask_rows<uint32_t>(x, y, mask);
      break;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      mask_rows<uint16_t>(x, y, mask);
      break;
    default:
      STD_TORCH_CHECK(false, "x: expected float64, float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  return y;
}

namespace {

Tensor keep_mask(const Tensor& seed, int64_t rows, int64_t cols, int64_t threshold, int64_t member) {
  STD_TORCH_CHECK(rows >= 0, "rows: expected 0 or more, got ", rows);
  STD_TORCH_CHECK(cols >= 0, "cols: expected 0 or more, got ", cols);
  const Mask mask = make_mask(seed, threshold, member);
  Tensor keep = torch::stable::new_empty(seed, std::array{rows, cols}, ScalarType::Bool);
  auto* to = static_cast<uint8_t*>(keep.mutable_data_ptr());
  for_each_row(rows, cols, [=](int64_t row) {
    uint8_t* line = to + row * cols;
    std::fill_n(line, cols, uint8_t{1});
    mask_row<uint8_t>(line, line, cols, row, mask);
  });
  return keep;
}

}  // namespace
}  // namespace fastadapt

STABLE_TORCH_LIBRARY_IMPL(fastadapt_native, CPU, m) {
  m.impl("masked", TORCH_BOX(&fastadapt::masked));
  m.impl("keep_mask", TORCH_BOX(&fastadapt::keep_mask));
}
