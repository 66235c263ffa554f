// A side adapter ready to be computed with on the CPU.
//
// LayerNorm's affine is folded into the weight, LN(f) D^T + d = xhat (D o gamma)^T + (d + D beta), so that one standardised
// block serves the product forward and the weight's gradient.
#pragma once

#include <memory>

#include "blocks.h"
#include "side_fusion.h"

namespace fastadapt::side {

constexpr int64_t kBlockRows = 256;  // rows that a core works on at a time, at the most

template <class T>
struct Adapter {
  Operands call;
  Rows tap;
  Parameter<T> down, norm_weight, norm_bias, up, shared, out_norm_weight, out_norm_bias;
  std::vector<T> folded;                // D o gamma
  std::vector<T> hidden_bias, out_bias;  // d + D beta; scale [u, s]

  explicit Adapter(const Operands& call)
      : call(call), tap(call.given(kTap)), down(call[kDownWeight]), norm_weight(call[kNormWeight]),
        norm_bias(call[kNormBias]), up(call[kUpWeight]), shared(call[kSharedWeight]), out_norm_weight(call[kOutNormWeight]),
        out_norm_bias(call[kOutNormBias]) {
    if (normed()) {
      folded.resize(call.hidden * call.depth);
      for (int64_t i = 0; i < call.hidden; ++i) {
        const T* row = down.matrix().row(i);
        for (int64_t j = 0; j < call.depth; ++j) folded[i * call.depth + j] = row[j] * norm_weight.data()[j];
      }
    }
    if (call[kDownBias] || call[kNormBias]) {
      hidden_bias.assign(call.hidden, 0);
      const Matrix<T> bias{hidden_bias.data(), 1, call.hidden, call.hidden};
      if (call[kNormBias]) multiply(bias, norm_bias.matrix(), down.matrix().t(), 0, 1);
      if (call[kDownBias]) add_scaled(Parameter<T>(call[kDownBias]).matrix(), 1, bias);
    }
    if (call[kUpBias] || call[kSharedBias]) {
      out_bias.assign(call.width, 0);
      const Matrix<T> bias{out_bias.data(), 1, call.width, call.width};
      const Parameter<T> own(call[kUpBias]), common(call[kSharedBias]);
      if (own.data()) add_scaled(own.matrix(), call.scale, bias);
      if (common.data()) add_scaled(common.matrix(), call.scale, bias.cols_from(call.own_width, call.shared_width));
    }
  }

  bool normed() const { return norm_weight.data(); }
  bool out_normed() const { return out_norm_weight.data(); }
  const T* out_shift() const { return out_bias.empty() ? nullptr : out_bias.data(); }

  // The tap's rows as the first product reads them: standardised where there is LayerNorm.
  Matrix<T> input(int64_t first, int64_t count, T* room) const {
    const Matrix<T> rows = tap.read(first, count, room);
    if (!normed()) return rows;
    const Matrix<T> standard{room, count, call.depth, call.depth};
    normalise(rows, standard, call.norm_eps);
    return standard;
  }

  // r and, in `z`, what it is the activation of; the two may be one.
  void activated(Matrix<T> input, Matrix<T> z, Matrix<T> r) const {
    const Matrix<T> weight = normed() ? Matrix<T>{const_cast<T*>(folded.data()), call.hidden, call.depth, call.depth}
                                      : down.matrix();
    multiply(z, input, weight.t(), 0, 1);
    activate(call.activation, z, hidden_bias.empty() ? nullptr : hidden_bias.data(), r);
  }

  // out = beta out + scale r W^T, where beta is 0 or 1
  void project(Matrix<T> r, Matrix<T> out, double beta) const {
    if (up.data()) multiply(out.cols_from(0, call.own_width), r, up.matrix().t(), beta, call.scale);
    if (shared.data()) {
      multiply(out.cols_from(call.own_width, call.shared_width), r, shared.matrix().t(), beta, call.scale);
    }
    if (call.projects()) return;
    if (beta == 0) fill_rows<T>(out, nullptr);
    add_scaled(r, call.scale, out);
  }
};

template <class T>
using Adapters = std::vector<std::unique_ptr<const Adapter<T>>>;

template <class T>
Adapters<T> prepared(const std::vector<Operands>& calls) {
  Adapters<T> adapters(calls.size());
  share(calls.size(), [&] { return [&](int64_t i) { adapters[i] = std::make_unique<const Adapter<T>>(calls[i]); }; });
  return adapters;
}

// The most numbers of any adapter.
inline int64_t most(const std::vector<Operands>& calls, int64_t Operands::*size) {
  int64_t found = 0;
  for (const Operands& call : calls) found = std::max(found, call.*size);
  return found;
}

// Of an adapter's tensors, those whose gradient is wanted, each with the tensor that it goes to.
using Wanted = std::array<std::optional<Tensor>, kEach>;

// Writes every wanted gradient, given the result's (side_fusion_backward.cpp).
template <class T>
void gradients(const std::vector<Operands>& calls, const std::vector<Wanted>& wanted, const Tensor& dout);

}  // namespace fastadapt::side
