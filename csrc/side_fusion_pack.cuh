// The first launch of either direction: parameters into the form the other kernels read (side_fusion_device.cuh).
#pragma once

#include "side_fusion_device.cuh"

namespace fastadapt::side_fusion {

constexpr int kPackBlocks = 32;  // for each adapter

// A warp packs a row of D, whose product with beta it sums meanwhile.
template <class T>
__device__ void pack_down(const Call& call, int i, int row) {
  const Adapter& adapter = call.adapters[i];
  const int lane = threadIdx.x % 32;
  const bool norm = call.has(i, kNorm), norm_bias = call.has(i, kNormBias), inside = row < adapter.hidden;
  float bias = 0.0f;
  for (int k = 2 * lane; k < call.inputs_padded; k += 64) {
    float pair[2] = {0.0f, 0.0f};
    for (int j = 0; j < 2; ++j) {
      if (!inside || k + j >= adapter.inputs) continue;
      const float weight = parameter<T>(adapter, kDown, static_cast<int64_t>(row) * adapter.inputs + k + j);
      if (norm_bias) bias += weight * parameter<T>(adapter, kNormBias, k + j);
      pair[j] = norm ? weight * parameter<T>(adapter, kNorm, k + j) : weight;
    }
    store_pair(call.down(i) + static_cast<int64_t>(row) * call.inputs_padded + k, narrow<T>(pair[0], pair[1]));
  }
  bias = sum_over_lanes(bias);
  if (inside && call.has(i, kDownBias)) bias += parameter<T>(adapter, kDownBias, row);
  if (lane == 0) call.down_bias(i)[row] = bias;
}

// A warp packs a row of [U; S], and one thread the row's constants.
template <class T>
__device__ void pack_up(const Call& call, int i, int row) {
  const Adapter& adapter = call.adapters[i];
  const int lane = threadIdx.x % 32;
  const bool own = row < adapter.own, inside = row < call.outputs;
  const bool counts = inside && adapter.scale != 0.0f;  // sums are in units of the scale; for 0, which is none, W is 0
  const int64_t place = own ? row : row - adapter.own;
  for (int k = 2 * lane; k < kHidden; k += 64) {
    float pair[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t number = place * adapter.hidden + k + j;
      pair[j] = counts && k + j < adapter.hidden ? parameter<T>(adapter, own ? kUp : kShared, number) : 0.0f;
    }
    store_pair(call.up(i) + static_cast<int64_t>(row) * kHidden + k, narrow<T>(pair[0], pair[1]));
  }
  if (lane > 0) return;
  const int bias = own ? kUpBias : kSharedBias;
  call.up_bias(i)[row] = inside && call.has(i, bias) ? adapter.scale * parameter<T>(adapter, bias, place) : 0.0f;
  call.out_weight(i)[row] = inside && call.has(i, kOutNorm) ? parameter<T>(adapter, kOutNorm, row) : 0.0f;
  call.out_bias(i)[row] = inside && call.has(i, kOutNormBias) ? parameter<T>(adapter, kOutNormBias, row) : 0.0f;
}

// Grid (kPackBlocks, adapters).  `tiles` counters are set to 0; a float32 dout, where there is one, is rounded to part 0 of dy.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Call call, int tiles) {
  const int i = blockIdx.y;
  for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < kHidden + call.outputs_padded; row += gridDim.x * kWarps) {
    if (row < kHidden) {
      pack_down<T>(call, i, row);
    } else {
      pack_up<T>(call, i, row - kHidden);
    }
  }
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
  const int64_t all = static_cast<int64_t>(gridDim.x) * gridDim.y * kThreads;
  for (int64_t tile = first; tile < tiles; tile += all) call.arrived[tile] = 0;
  if (call.dout == nullptr || !call.wide_out) return;
  const float* dout = static_cast<const float*>(call.dout);
  for (int64_t n = 2 * first; n < call.rows * call.outputs; n += 2 * all) {
    store_pair(call.dy + n, narrow<T>(dout[n], dout[n + 1]));
  }
}

}  // namespace fastadapt::side_fusion
