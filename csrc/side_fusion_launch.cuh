// side_fusion as launches: what follows from a call's sizes, the memory it needs meanwhile, and its kernels in their order.
//
// launch(kernel, grid, bytes of shared memory, arguments...) starts a kernel of kThreads; on a GPU it is a stream's, in the
// tests the emulation's.  The order of every sum is that of the sizes alone, the same on every GPU.
#pragma once

#include <algorithm>

#include "side_fusion_pack.cuh"
#include "side_fusion_rows.cuh"
#include "side_fusion_weights.cuh"

namespace fastadapt::side_fusion {

constexpr int kProductBlocks = 264;     // as many as two for each multiprocessor of the larger GPUs
constexpr int kLeastSplitRows = 64;

// Parts of a block of memory; without one, its size.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class V>
  void take(V*& part, int64_t numbers) {
    part = memory_ ? reinterpret_cast<V*>(memory_ + bytes_) : nullptr;
    bytes_ += round_up(numbers * static_cast<int64_t>(sizeof(V)), 256);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Fills in what follows from the adapters and `outputs`.
inline void plan(Call& call) {
  int inputs = 0, parts = 0;
  call.groups = 0;
  for (int i = 0; i < call.count; ++i) {
    inputs = call.adapters[i].inputs > inputs ? call.adapters[i].inputs : inputs;
    const bool alone = call.has(i, kOutNorm);
    if (i == 0 || alone || call.has(i - 1, kOutNorm)) {
      call.unit[call.groups] = 1.0f;
      call.group_first[call.groups++] = static_cast<unsigned char>(i);
    }
    float& unit = call.unit[call.groups - 1];
    const float scale = call.adapters[i].scale == 0.0f ? unit : call.adapters[i].scale;
    call.to_unit[i] = unit / scale;
    unit = scale;
    call.dy_part[i] = static_cast<unsigned char>(alone ? ++parts : 0);
  }
  call.group_first[call.groups] = static_cast<unsigned char>(call.count);
  call.inputs_padded = static_cast<int>(round_up(inputs, kDepth));
  call.outputs_padded = static_cast<int>(round_up(call.outputs, kColumns));
}

inline bool narrow_tower(const Call& call) { return call.outputs <= kColumns && call.inputs_padded <= kColumns; }
inline int64_t row_tiles(const Call& call) {
  const int rows = narrow_tower(call) ? 64 : 32;
  return (call.rows + rows - 1) / rows;
}

inline void take_packed(Call& call, Arena& arena) {
  arena.take(call.packed, call.count * call.packed_numbers());
  arena.take(call.constants, static_cast<int64_t>(call.count) * call.constant_numbers());
  arena.take(call.arrived, row_tiles(call));
}

// The bytes of a forward's memory; in `memory`, unless it is null, the call's parts are placed.
inline int64_t place_forward(Call& call, void* memory) {
  Arena arena(memory);
  take_packed(call, arena);
  if (call.groups > 1) arena.take(call.partial, call.groups * call.rows * call.outputs);
  return arena.bytes();
}

template <class T, class Launch>
void forward(const Call& call, const Launch& launch) {
  if (call.rows == 0) return;
  launch(pack_kernel<T>, dim3{kPackBlocks, static_cast<unsigned>(call.count)}, 0, call, static_cast<int>(row_tiles(call)));
  const dim3 grid{static_cast<unsigned>(call.groups * row_tiles(call))};
  if (narrow_tower(call)) {
    launch(forward_kernel<T, 2>, grid, Rows<T, 2>::shared_bytes(call), call);
  } else {
    launch(forward_kernel<T, 1>, grid, Rows<T, 1>::shared_bytes(call), call);
  }
}

// The products that a backward needs.  grads: for each adapter kEach pointers, null where no gradient is wanted.
inline int64_t place_backward(Call& call, Products& products, void* const (*grads)[kEach], void* memory) {
  constexpr int kDownGrads[] = {kDown, kDownBias, kNorm, kNormBias}, kUpGrads[] = {kUp, kUpBias, kShared, kSharedBias};
  Arena arena(memory);
  take_packed(call, arena);
  const int64_t part = call.rows * call.outputs;
  int parts = 1;
  for (int i = 0; i < call.count; ++i) parts = call.dy_part[i] >= parts ? call.dy_part[i] + 1 : parts;
  arena.take(call.hidden, call.count * call.rows * kHidden);
  arena.take(call.dhidden, call.count * call.rows * kHidden);
  arena.take(call.dy, parts * part);
  arena.take(call.stats, 2 * call.count * call.rows);
  products.count = products.tiles = 0;
  products.rows = call.rows;
  for (int i = 0; i < call.count; ++i) {
    const Adapter& adapter = call.adapters[i];
    for (const bool down : {true, false}) {
      Product product{};
      bool wanted = false;
      for (int g = 0; g < 4; ++g) {
        const int tensor = (down ? kDownGrads : kUpGrads)[g];
        product.grads[g] = grads[i][tensor];
        product.wide_grads |= (adapter.wide >> tensor & 1) << g;
        wanted = wanted || product.grads[g] != nullptr;
      }
      if (!wanted) continue;
      const uint16_t* tap = static_cast<const uint16_t*>(adapter.tensors[kTap]);
      const uint16_t* dout = call.wide_out ? call.dy : static_cast<const uint16_t*>(call.dout);
      product.wide = down ? tap : call.dy_part[i] ? call.dy + call.dy_part[i] * part : dout;
      product.narrow = (down ? call.dhidden : call.hidden) + i * call.rows * kHidden;
      product.stats = down && call.has(i, kNorm) ? call.stats + 2 * i * call.rows : nullptr;
      product.weight = adapter.tensors[kDown];
      product.norm_weight = adapter.tensors[kNorm];
      product.norm_bias = adapter.tensors[kNormBias];
      product.width = down ? adapter.inputs : call.outputs;
      product.hidden = adapter.hidden;
      product.own = adapter.own;
      product.scale = adapter.scale;
      product.down = down;
      product.first_tile = products.tiles;
      products.tiles += (product.width + kTileColumns - 1) / kTileColumns;
      products.items[products.count++] = product;
    }
  }
  const int64_t most = round_up(call.rows, kLeastSplitRows) / kLeastSplitRows, tiles = products.tiles;
  const int64_t splits = tiles == 0 || call.rows == 0 ? 1 : std::min(most, round_up(kProductBlocks, tiles) / tiles);
  products.split_rows = std::max<int64_t>(kChunk, round_up(round_up(call.rows, splits) / splits, kChunk));
  products.splits = static_cast<int>((call.rows + products.split_rows - 1) / products.split_rows);
  arena.take(products.partial, products.splits * tiles * kTileColumns * kHidden);
  arena.take(products.sums, products.splits * tiles * kTileColumns);
  return arena.bytes();
}

template <class T, class Launch>
void backward(const Call& call, const Products& products, const Launch& launch) {
  if (products.tiles == 0) return;
  const unsigned tiles = products.tiles;
  if (call.rows > 0) {
    launch(pack_kernel<T>, dim3{kPackBlocks, static_cast<unsigned>(call.count)}, 0, call, 0);
    const dim3 grid{static_cast<unsigned>(call.count * row_tiles(call))};
    if (narrow_tower(call)) {
      launch(hidden_grad_kernel<T, 2>, grid, Rows<T, 2>::shared_bytes(call), call);
    } else {
      launch(hidden_grad_kernel<T, 1>, grid, Rows<T, 1>::shared_bytes(call), call);
    }
    launch(product_kernel<T>, dim3{tiles, static_cast<unsigned>(products.splits)}, kProductBytes, products);
  }
  launch(finish_kernel<T>, dim3{kTileColumns / kFinishColumns, tiles}, kFinishBytes, products);
}

}  // namespace fastadapt::side_fusion
