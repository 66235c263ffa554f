// The gradients of side_fusion's parameters on the CPU.  Adapters do not meet in the backward: a thread takes an adapter's
// chunk of rows, block by block.  Chunks depend on sizes only, and their parts of a gradient are added in order.
//
// An LN_out needs y again, or only products of the hidden's width: with r = [r, 1], W = [[U; S], [u; s]] centred over its rows
// and G = W^T W, the variance of scale r W^T is scale^2 r G r^T / N, and as dy sums to 0 over the columns
//
//     scale dy W = scale rstd (c - lean r G)        c = dout (gamma o W)        lean = scale^2 rstd^2 c.r / N
//     dW = scale (gamma o dout^T (rstd r) - W (rstd r)^T (lean r)), centred over its rows
//
// so that where there are rows enough to repay G, nothing as wide as the result is computed but those two products.
#include "side_adapter.h"

namespace fastadapt::side {
namespace {

constexpr int64_t kLeastChunk = 128;  // rows
constexpr int64_t kChunks = 64;       // pieces of the backward, about, where there are rows enough

// What a chunk adds up of an adapter's gradients: dU (n, h), dS (m, h), dD (h, K) before LayerNorm's affine, [du, ds] (N) and
// dd (h); or, for all but dD and dd, dout^T (rstd r) (N, h + 1) and (rstd r)^T (lean r) (h + 1, h + 1).
enum Sum { kOwn, kShared, kDown, kOutBias, kHiddenBias, kOuter, kInner, kSums };

// Numbers from one row of [r, 1] to the next: a product of unaligned rows takes a tenth longer.
int64_t extended_stride(int64_t hidden) { return 16 * ceil_div(hidden + 1, 16); }

// LN_out by products of the hidden's width.
template <class T>
struct ProjectedNorm {
  Memory<T> memory;
  Matrix<T> weight, scaled, gram;  // W; gamma o W; G

  explicit ProjectedNorm(const Adapter<T>& adapter)
      : memory((2 * adapter.call.width + adapter.call.hidden + 1) * extended_stride(adapter.call.hidden)),
        weight(room(adapter.call, adapter.call.width)), scaled(room(adapter.call, adapter.call.width)),
        gram(room(adapter.call, adapter.call.hidden + 1)) {
    const Operands& call = adapter.call;
    Parameter<T> biases[] = {Parameter<T>(call[kUpBias]), Parameter<T>(call[kSharedBias])};
    const Matrix<T> weights[] = {adapter.up.matrix(), adapter.shared.matrix()};
    int64_t row = 0;
    for (int part = 0; part < 2; ++part) {
      for (int64_t i = 0; i < weights[part].rows; ++i, ++row) {
        std::copy_n(weights[part].row(i), call.hidden, weight.row(row));
        weight.row(row)[call.hidden] = biases[part].data() ? biases[part].data()[i] : T(0);
      }
    }
    centre(weight);
    scale_rows(weight, adapter.out_norm_weight.data(), scaled);
    multiply(gram, weight.t(), weight, 0, 1);
  }

 private:
  Matrix<T> room(const Operands& call, int64_t rows) {
    const int64_t stride = extended_stride(call.hidden);
    return {memory.take(rows * stride), rows, call.hidden + 1, stride};
  }
};

// An adapter, the tensors that its wanted gradients go to and how long each of a chunk's sums is.
template <class T>
struct Task {
  const Adapter<T>& adapter;
  const Wanted& wanted;
  std::optional<ProjectedNorm<T>> norm;
  std::array<int64_t, kSums> sizes{};

  Task(const Adapter<T>& adapter, const Wanted& wanted, int64_t rows) : adapter(adapter), wanted(wanted) {
    const Operands& call = adapter.call;
    const int64_t n = call.width, h = call.hidden;
    if (adapter.out_normed() && call.projects() && rows * (n - 2 * h) > 2 * n * h) norm.emplace(adapter);
    const bool ups = any({kUpWeight, kSharedWeight, kUpBias, kSharedBias});
    if (norm && ups) {
      sizes[kOuter] = n * extended_stride(h);
      sizes[kInner] = (h + 1) * extended_stride(h);
    } else if (ups) {
      sizes[kOwn] = wanted[kUpWeight] ? call.own_width * h : 0;
      sizes[kShared] = wanted[kSharedWeight] ? call.shared_width * h : 0;
      sizes[kOutBias] = any({kUpBias, kSharedBias}) ? n : 0;
    }
    sizes[kDown] = any({kDownWeight, kNormWeight}) ? h * call.depth : 0;
    sizes[kHiddenBias] = sizes[kDown] || any({kDownBias, kNormBias}) ? h : 0;
  }

  bool any(std::initializer_list<Role> roles) const {
    return std::any_of(roles.begin(), roles.end(), [this](Role role) { return wanted[role].has_value(); });
  }
};

// A chunk's sums, which are the gradients themselves where nothing else is to be done to them.
template <class T>
struct Part {
  std::optional<Memory<T>> memory;
  std::array<T*, kSums> sums{};

  Part(const Task<T>& task, bool first) {
    if (first) {
      direct(kOwn, task.wanted[kUpWeight]);
      direct(kShared, task.wanted[kSharedWeight]);
      direct(kDown, task.wanted[kDownWeight]);
    }
    int64_t numbers = 0;
    for (int sum = 0; sum < kSums; ++sum) numbers += sums[sum] ? 0 : task.sizes[sum];
    memory.emplace(numbers);
    for (int sum = 0; sum < kSums; ++sum) sums[sum] = sums[sum] ? sums[sum] : memory->take(task.sizes[sum]);
  }

  // Zero what is added to number by number, and what is a product's outcome where no row comes.
  void clear(const Task<T>& task, bool all) const {
    for (int sum = 0; sum < kSums; ++sum) {
      if (all || sum == kOutBias || sum == kHiddenBias) std::fill_n(sums[sum], task.sizes[sum], T(0));
    }
  }

  void add(const Task<T>& task, const Part& other) const {
    for (int sum = 0; sum < kSums; ++sum) {
      const int64_t size = task.sizes[sum];
      add_scaled<T>({other.sums[sum], 1, size, size}, 1, {sums[sum], 1, size, size});
    }
  }

  void direct(Sum sum, const std::optional<Tensor>& gradient) {
    if (gradient && gradient->scalar_type() == kTypeOf<T>) sums[sum] = static_cast<T*>(gradient->mutable_data_ptr());
  }
};

template <class T>
struct Worker {
  const Rows& dout;
  Memory<T> memory;
  T *input_room, *z_room, *r_room, *low_room, *lean_room, *y_room, *dout_room;

  Worker(const Rows& dout, int64_t rows, int64_t depth, int64_t hidden, int64_t width)
      : dout(dout), memory(rows * (depth + hidden + 3 * extended_stride(hidden) + 2 * width)),
        input_room(memory.take(rows * depth)), z_room(memory.take(rows * hidden)),
        r_room(memory.take(rows * extended_stride(hidden))), low_room(memory.take(rows * extended_stride(hidden))),
        lean_room(memory.take(rows * extended_stride(hidden))), y_room(memory.take(rows * width)),
        dout_room(memory.take(rows * width)) {}

  // Adds a block of rows to a part; `keep`: the sums that products make hold something already.
  void add_block(const Task<T>& task, int64_t first, int64_t count, const Part<T>& part, bool keep) const {
    const Adapter<T>& adapter = task.adapter;
    const Operands& call = adapter.call;
    const int64_t width = call.width, h = call.hidden, stride = extended_stride(h);
    const auto& [own, shared, down, out_bias, hidden_bias, outer, inner] = part.sums;
    Matrix<T> dy = dout.read(first, count, dout_room), input{};
    const Matrix<T> z{z_room, count, h, h}, low{low_room, count, h, stride};
    const Matrix<T> extended{r_room, count, h + 1, stride}, r = extended.cols_from(0, h);
    const bool through = task.sizes[kHiddenBias];
    const bool curved = through && call.activation != Activation::kIdentity;
    if (curved || adapter.out_normed() || task.sizes[kOwn] || task.sizes[kShared] || task.sizes[kDown]) {
      input = adapter.input(first, count, input_room);
      adapter.activated(input, z, r);
    }
    if (task.norm) {
      const Matrix<T> lean{lean_room, count, h + 1, stride}, c{low_room, count, h + 1, stride};
      fill_rows<T>(extended.cols_from(h, 1), &kOne);
      multiply(lean, extended, task.norm->gram, 0, 1);
      multiply(c, dy, task.norm->scaled, 0, 1);
      through_projected_norm(extended, lean, c, width, call.scale, call.out_norm_eps);
      if (task.sizes[kOuter]) {
        multiply({outer, width, h + 1, stride}, dy.t(), extended, keep, 1);
        multiply({inner, h + 1, h + 1, stride}, extended.t(), lean, keep, 1);
      }
      if (through) through_activation(call.activation, z, low, 1, low);
    } else {
      if (adapter.out_normed()) {
        const Matrix<T> y{y_room, count, width, width};
        adapter.project(r, y, 0);
        through_norm<T>(y, adapter.out_shift(), adapter.out_norm_weight.data(), call.out_norm_eps, dy);
        dy = y;
      }
      const Matrix<T> to_own = dy.cols_from(0, call.own_width), to_shared = dy.cols_from(call.own_width, call.shared_width);
      if (task.sizes[kOwn]) multiply({own, call.own_width, h, h}, to_own.t(), r, keep, call.scale);
      if (task.sizes[kShared]) multiply({shared, call.shared_width, h, h}, to_shared.t(), r, keep, call.scale);
      if (task.sizes[kOutBias]) add_column_sums(dy, call.scale, out_bias);
      if (through) {
        if (adapter.up.data()) multiply(low, to_own, adapter.up.matrix(), 0, 1);
        if (adapter.shared.data()) multiply(low, to_shared, adapter.shared.matrix(), adapter.up.data() ? 1 : 0, 1);
        through_activation(call.activation, z, call.projects() ? low : dy, call.scale, low);
      }
    }
    if (through) add_column_sums(low, 1, hidden_bias);
    if (task.sizes[kDown]) multiply({down, h, call.depth, call.depth}, low.t(), input, keep, 1);
  }

  static constexpr T kOne = 1;
};

// The gradients of an adapter's parameters, from the sums of all its chunks.
template <class T>
void finish(const Task<T>& task, const Part<T>& part) {
  const Adapter<T>& adapter = task.adapter;
  const Operands& call = adapter.call;
  const int64_t h = call.hidden, stride = extended_stride(h);
  const auto& [own, shared, down, out_bias, hidden_bias, outer, inner] = part.sums;
  const auto write = [&](Role role, Matrix<T> from) {
    const std::optional<Tensor>& to = task.wanted[role];
    if (to && to->const_data_ptr() != from.data) store(from, to->mutable_data_ptr(), to->scalar_type());
  };
  const auto vector = [](T* data, int64_t size) { return Matrix<T>{data, 1, size, size}; };
  if (task.sizes[kOuter]) {
    const Matrix<T> dw{outer, call.width, h + 1, stride};
    scale_rows(dw, adapter.out_norm_weight.data(), dw);
    multiply(dw, task.norm->weight, {inner, h + 1, h + 1, stride}, call.scale, -call.scale);
    centre(dw);
    const Matrix<T> own_part = dw.rows_from(0, call.own_width), shared_part = dw.rows_from(call.own_width, call.shared_width);
    write(kUpWeight, own_part.cols_from(0, h));
    write(kUpBias, own_part.cols_from(h, 1));
    write(kSharedWeight, shared_part.cols_from(0, h));
    write(kSharedBias, shared_part.cols_from(h, 1));
  } else {
    write(kUpWeight, {own, call.own_width, h, h});
    write(kSharedWeight, {shared, call.shared_width, h, h});
    write(kUpBias, vector(out_bias, call.own_width));
    write(kSharedBias, vector(out_bias + call.own_width, call.shared_width));
  }
  write(kDownBias, vector(hidden_bias, h));
  const Matrix<T> product{down, h, call.depth, call.depth};
  if (adapter.normed()) {
    const T *gamma = adapter.norm_weight.data(), *beta = adapter.norm_bias.data();
    std::vector<T> dgamma(call.depth, 0), dbeta(call.depth, 0);
    for (int64_t i = 0; i < h; ++i) {
      const T* weight = adapter.down.matrix().row(i);
      if (task.wanted[kNormBias]) {
        for (int64_t j = 0; j < call.depth; ++j) dbeta[j] += hidden_bias[i] * weight[j];
      }
      if (!task.sizes[kDown]) continue;
      T* row = product.row(i);
      for (int64_t j = 0; j < call.depth; ++j) {
        dgamma[j] += weight[j] * row[j];
        row[j] = row[j] * gamma[j] + (beta ? hidden_bias[i] * beta[j] : T(0));
      }
    }
    write(kNormWeight, vector(dgamma.data(), call.depth));
    write(kNormBias, vector(dbeta.data(), call.depth));
  }
  write(kDownWeight, product);
}

}  // namespace

template <class T>
void gradients(const std::vector<Operands>& calls, const std::vector<Wanted>& wanted, const Tensor& grad) {
  const Adapters<T> adapters = prepared<T>(calls);
  const int64_t depth = most(calls, &Operands::depth), hidden = most(calls, &Operands::hidden);
  const int64_t width = calls.front().width, count = adapters.size();
  const Rows dout(grad);
  const int64_t rows = dout.tensor.size(0);
  // a chunk reads more than the gradients that it adds to
  const int64_t least = std::max(kLeastChunk, 4 * hidden);
  const int64_t pieces = std::clamp<int64_t>(rows / least, 1, ceil_div(kChunks, count));
  const Pieces chunks(rows, ceil_div(rows, pieces));
  std::vector<std::optional<Task<T>>> tasks(count);
  std::vector<std::optional<Part<T>>> parts(count * pieces);
  share(count, [&] { return [&](int64_t i) { tasks[i].emplace(*adapters[i], wanted[i], rows); }; });
  share(count * pieces, [&] {
    return [&, worker = Worker<T>(dout, std::min(kBlockRows, chunks.size), depth, hidden, width)](int64_t item) {
      const int64_t i = item % count, chunk = item / count;
      parts[item].emplace(*tasks[i], chunk == 0);
      const Pieces blocks(chunk < chunks.count ? chunks.length(chunk) : 0, kBlockRows);
      parts[item]->clear(*tasks[i], blocks.count == 0);
      for (int64_t block = 0; block < blocks.count; ++block) {
        worker.add_block(*tasks[i], chunks.first(chunk) + blocks.first(block), blocks.length(block), *parts[item], block > 0);
      }
    };
  });
  share(count, [&] {
    return [&](int64_t i) {
      for (int64_t chunk = 1; chunk < pieces; ++chunk) parts[i]->add(*tasks[i], *parts[chunk * count + i]);
      finish(*tasks[i], *parts[i]);
    };
  });
}

template void gradients<float>(const std::vector<Operands>&, const std::vector<Wanted>&, const Tensor&);
template void gradients<double>(const std::vector<Operands>&, const std::vector<Wanted>&, const Tensor&);

}  // namespace fastadapt::side
