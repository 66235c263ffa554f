// Dropout as a plain function, for the other sources of the library.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fastadapt {

// x (rows, cols) where the mask of (seed, threshold, member) keeps, 0 elsewhere.
torch::stable::Tensor masked(
    const torch::stable::Tensor& x, const torch::stable::Tensor& seed, int64_t threshold, int64_t member);

}  // namespace fastadapt
