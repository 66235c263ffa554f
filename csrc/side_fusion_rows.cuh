// side_fusion over tiles of rows: the forward, and the backward down to the hidden layers' gradients.
//
// A block holds a tile of a tap's rows in shared memory and streams the packed weights past it in two stages, the next on its
// way while the tensor cores work on this one.  What passes from one product to the next stays in registers, or in shared
// memory in 16 bits.
#pragma once

#include "side_fusion_device.cuh"

namespace fastadapt::side_fusion {

// WM warps above each other, 32 rows each: WM 2 for narrow towers, whose 256 columns 4 warps side by side hold; WM 1 for up to
// kMaxWidth columns.
template <class T, int WM>
struct Rows {
  static constexpr int kRows = 32 * WM, kAcross = kWarps / WM, kBlocks = WM == 2 ? 1 : kMaxWidth / kColumns;
  static constexpr int kHiddenTiles = kHidden / kAcross / 8, kColumnTiles = kColumns / kAcross / 8;
  using Hidden = float[2][kHiddenTiles][4];
  using Columns = float[kBlocks][2][kColumnTiles][4];

  static constexpr int kHiddenNumbers = kRows * kHiddenPitch;

  __host__ __device__ static int pitch_of(const Call& call) {
    const int outputs = static_cast<int>(round_up(call.outputs, kDepth));
    return (call.inputs_padded > outputs ? call.inputs_padded : outputs) + kPad;
  }
  __host__ __device__ static int sum_pitch_of(const Call& call) { return call.outputs + kPad / 2; }
  __host__ __device__ static int shared_bytes(const Call& call) {
    const int streaming = 2 * (kHiddenNumbers + 2 * kStage + kRows * pitch_of(call)), sums = 4 * kRows * sum_pitch_of(call);
    return streaming > sums ? streaming : sums;
  }

  const Call& call;
  const int64_t row0;
  int turn = 0;  // which stage is read

  __device__ Rows(const Call& call, int64_t row0) : call(call), row0(row0) {}

  // Computed where they are needed: registers are for products.
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp_row() { return warp() / kAcross * 32; }
  __device__ static int warp_column() { return warp() % kAcross; }
  __device__ static int row(int r) { return warp_row() + row_of(r); }
  __device__ static int hidden_column(int column) { return warp_column() * 8 * kHiddenTiles + column; }
  __device__ int pitch() const { return pitch_of(call); }
  __device__ int sum_pitch() const { return sum_pitch_of(call); }

  __device__ static uint16_t* hidden() { return reinterpret_cast<uint16_t*>(shared_memory()); }  // (kRows, kHiddenPitch)
  __device__ static uint16_t* stage(int turn) { return hidden() + kHiddenNumbers + turn * kStage; }
  __device__ static uint16_t* tile() { return stage(2); }                                // (kRows, pitch): a tap, later dy
  __device__ static float* sums() { return reinterpret_cast<float*>(shared_memory()); }  // (kRows, sum_pitch), in place of all

  // Starts copying rows of (call.rows, width) to the tile: number first, ..., last - 1 of those that are this warp's.
  __device__ void bring(const void* source, int width, int padded, int first, int last) {
#pragma unroll 1
    for (int r = first; r < last; ++r) {
      const int row = warp() + kWarps * r;
      const uint16_t* from = static_cast<const uint16_t*>(source) + (row0 + row) * width;
#pragma unroll 1
      for (int k = 8 * lane(); k < padded; k += 256) {
        if (row0 + row < call.rows && k < width) {
          cp_async(tile() + row * pitch() + k, from + k);
        } else {
          piece_at(tile() + row * pitch() + k) = {0, 0, 0, 0};
        }
      }
    }
  }
  __device__ void bring_tap(int i, int first, int last) {
    bring(call.adapters[i].tensors[kTap], call.adapters[i].inputs, call.inputs_padded, first, last);
  }

  // Starts copying ROWS x COLUMNS numbers to the stage that is not read.
  template <int ROWS, int COLUMNS>
  __device__ void bring_stage(const uint16_t* from, int from_pitch) {
    constexpr int kAtOnce = 8 * kThreads / COLUMNS;  // rows
    const int row = threadIdx.x / (COLUMNS / 8), column = threadIdx.x % (COLUMNS / 8) * 8;
    uint16_t* to = stage(turn ^ 1) + row * (COLUMNS + kPad) + column;
    from += row * from_pitch + column;
#pragma unroll 1  // more addresses than one would spill
    for (int r = 0; r < ROWS; r += kAtOnce) {
      cp_async(to, from);
      to += kAtOnce * (COLUMNS + kPad);
      from += kAtOnce * from_pitch;
    }
    cp_commit();
  }

  // The stage brought last, now to be read; nobody reads the other any more.
  __device__ const uint16_t* next_stage() {
    cp_wait<0>();
    __syncthreads();
    turn ^= 1;
    return stage(turn);
  }

  // rows of the tile -> xhat, by the threads that brought them; the copy of a stage may be under way.
  __device__ void normalise_tap(int i, float* stats) {
    cp_wait<1>();
    const int inputs = call.adapters[i].inputs;
#pragma unroll 1
    for (int r = 0; r < kRows / kWarps; ++r) {
      const int row = warp() + kWarps * r;
      float numbers[8], sum = 0.0f, squares = 0.0f;
#pragma unroll 1
      for (int k = 8 * lane(); k < inputs; k += 256) {
        unpack<T>(piece_at(tile() + row * pitch() + k), numbers);
        for (int j = 0; j < 8; ++j) sum += numbers[j];
      }
      const float mean = sum_over_lanes(sum) / inputs;
#pragma unroll 1
      for (int k = 8 * lane(); k < inputs; k += 256) {
        unpack<T>(piece_at(tile() + row * pitch() + k), numbers);
        for (int j = 0; j < 8; ++j) squares += (numbers[j] - mean) * (numbers[j] - mean);
      }
      const float rstd = rsqrtf(sum_over_lanes(squares) / inputs + call.adapters[i].norm_eps);
#pragma unroll 1
      for (int k = 8 * lane(); k < inputs; k += 256) {
        unpack<T>(piece_at(tile() + row * pitch() + k), numbers);
        for (int j = 0; j < 8; ++j) numbers[j] = (numbers[j] - mean) * rstd;
        piece_at(tile() + row * pitch() + k) = pack<T>(numbers);
      }
      if (stats != nullptr && lane() == 0 && row0 + row < call.rows) {
        stats[2 * (row0 + row)] = mean;
        stats[2 * (row0 + row) + 1] = rstd;
      }
    }
  }

  // z of adapter i, whose tap has been brought, and what its norm found to `stats`.
  __device__ void down(int i, Hidden& z, float* stats) {
    const uint16_t* weight = call.down(i);
    bring_stage<kHidden, kDepth>(weight, call.inputs_padded);
    if (call.has(i, kNorm)) normalise_tap(i, stats);
    clear(z);
#pragma unroll 1
    for (int k = 0; k < call.inputs_padded; k += kDepth) {
      const uint16_t* stage = next_stage();
      if (k + kDepth < call.inputs_padded) bring_stage<kHidden, kDepth>(weight + k + kDepth, call.inputs_padded);
      multiply<T, kHiddenTiles, kDepth, false, false>(
          z, tile() + warp_row() * pitch() + k, pitch(), stage + hidden_column(0) * (kDepth + kPad), kDepth + kPad);
    }
    const float* bias = call.down_bias(i);
    for_each_pair(z, [&](int, int column, float& low, float& high) {
      low += bias[hidden_column(column)];
      high += bias[hidden_column(column) + 1];
    });
  }

  // act(z) in 16 bits to shared memory, and to (call.rows, kHidden) `kept`.
  __device__ void activate(int i, Hidden& z, uint16_t* kept) {
    const Adapter& adapter = call.adapters[i];
    for_each_pair(z, [&](int r, int column, float low, float high) {
      const uint32_t pair = narrow<T>(activated(adapter.activation, low), activated(adapter.activation, high));
      store_pair(hidden() + row(r) * kHiddenPitch + hidden_column(column), pair);
      keep(kept, r, column, pair);
    });
  }
  __device__ void keep(uint16_t* kept, int r, int column, uint32_t pair) const {
    const int64_t t = row0 + row(r);
    if (kept != nullptr && t < call.rows) store_pair(kept + t * kHidden + hidden_column(column), pair);
  }

  // y += the hidden tile times [U; S]^T.  meanwhile(s), s = 0 to 3, starts copies; nobody reads the tile by then.
  template <class F>
  __device__ void up(int i, Columns& y, const F& meanwhile) {
    constexpr int kSteps = kHidden / kUpDepth;
    const uint16_t* weight = call.up(i);
    bring_stage<kColumns, kUpDepth>(weight, kHidden);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b * kColumns >= call.outputs) break;
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) {
        const uint16_t* stage = next_stage();
        if (b == 0) meanwhile(s);
        const int next = b * kSteps + s + 1;
        if (next < call.outputs_padded / kColumns * kSteps) {
          bring_stage<kColumns, kUpDepth>(weight + next / kSteps * kColumns * kHidden + next % kSteps * kUpDepth, kHidden);
        } else {
          cp_commit();  // of what `meanwhile` started
        }
        multiply<T, kColumnTiles, kUpDepth, false, false>(
            y[b], hidden() + warp_row() * kHiddenPitch + s * kUpDepth, kHiddenPitch,
            stage + warp_column() * 8 * kColumnTiles * (kUpDepth + kPad), kUpDepth + kPad);
      }
    }
  }

  // y *= factor.
  __device__ static void multiply_by(float factor, Columns& y) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      for_each_pair(y[b], [&](int, int, float& low, float& high) {
        low *= factor;
        high *= factor;
      });
    }
  }

  // y to `sums`, where every thread then sees it; nothing else is left in shared memory.
  __device__ void spread(Columns& y) {
    cp_wait<0>();
    __syncthreads();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      for_each_pair(y[b], [&](int r, int in_warp, float low, float high) {
        const int column = b * kColumns + warp_column() * 8 * kColumnTiles + in_warp;
        if (column >= call.outputs) return;
        sums()[row(r) * sum_pitch() + column] = low;
        sums()[row(r) * sum_pitch() + column + 1] = high;
      });
    }
    __syncthreads();
  }

  // body(t, the row's sums) for every row there is, each by a warp.
  template <class F>
  __device__ void for_each_row(const F& body) {
#pragma unroll 1
    for (int r = warp(); r < kRows && row0 + r < call.rows; r += kWarps) body(row0 + r, sums() + r * sum_pitch());
  }

  // A row of y -> yhat; returns rstd.
  __device__ float standardise(int i, float* y) const {
    float sum = 0.0f, squares = 0.0f;
    for (int n = lane(); n < call.outputs; n += 32) sum += y[n];
    const float mean = sum_over_lanes(sum) / call.outputs;
    for (int n = lane(); n < call.outputs; n += 32) squares += (y[n] - mean) * (y[n] - mean);
    const float rstd = rsqrtf(sum_over_lanes(squares) / call.outputs + call.adapters[i].out_eps);
    for (int n = lane(); n < call.outputs; n += 32) y[n] = (y[n] - mean) * rstd;
    return rstd;
  }
};

// Whether this block is the last of its tile's groups to have written their sums, which are then to be seen.
__device__ inline bool last_to_arrive(const Call& call, int64_t tile) {
  unsigned* last = reinterpret_cast<unsigned*>(shared_memory());
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(call.arrived + tile, 1u) + 1 == static_cast<unsigned>(call.groups);
  __syncthreads();
  __threadfence();
  return *last;
}

// Grid: groups x tiles.  A group's adapters are summed in registers, in units of the last one's scale: what is rounded to 16
// bits is never scaled.  Groups, if there are more, are summed in memory by the last of a tile to come, in the groups' order.
// An adapter with a norm of its result is a group by itself.
template <class T, int WM>
__global__ void __launch_bounds__(kThreads, WM) forward_kernel(const __grid_constant__ Call call) {
  using Tile = Rows<T, WM>;
  const int group = blockIdx.x % call.groups, first = call.group_first[group], end = call.group_first[group + 1];
  const int64_t tile = blockIdx.x / call.groups;
  Tile rows(call, tile * Tile::kRows);
  typename Tile::Columns y;
#pragma unroll
  for (auto& block : y) clear(block);
  rows.bring_tap(first, 0, Tile::kRows / kWarps);
  cp_commit();
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    if (call.to_unit[i] != 1.0f) rows.multiply_by(call.to_unit[i], y);
    typename Tile::Hidden z;
    rows.down(i, z, nullptr);
    rows.activate(i, z, nullptr);
    rows.up(i, y, [&](int s) {
      if (i + 1 < end) rows.bring_tap(i + 1, s * WM, s * WM + WM);  // a quarter of the rows
    });
  }
  rows.multiply_by(call.unit[group], y);
  rows.spread(y);
  const int lane = threadIdx.x % 32;
  const bool norm = call.has(first, kOutNorm), whole = call.groups == 1;
  const float *weight = call.out_weight(first), *bias = call.out_bias(first);
  const auto finished = [&](int64_t t, int n, float sum) {
    const int64_t place = t * call.outputs + n;
    for (int b = 0; b < call.base_count; ++b) sum += load<T>(call.bases[b], call.wide_bases >> b & 1, place);
    store<T>(call.out, call.wide_out, place, sum);
  };
  rows.for_each_row([&](int64_t t, float* sums) {
    for (int n = lane; n < call.outputs; n += 32) {
      for (int i = first; i < end; ++i) sums[n] += call.up_bias(i)[n];
    }
    if (norm) rows.standardise(first, sums);
    for (int n = lane; n < call.outputs; n += 32) {
      const float sum = norm ? sums[n] * weight[n] + bias[n] : sums[n];
      if (whole) {
        finished(t, n, sum);
      } else {
        call.partial[(group * call.rows + t) * call.outputs + n] = sum;
      }
    }
  });
  if (whole || !last_to_arrive(call, tile)) return;
  rows.for_each_row([&](int64_t t, float*) {
    for (int n = lane; n < call.outputs; n += 32) {
      float sum = 0.0f;
      for (int g = 0; g < call.groups; ++g) sum += call.partial[(g * call.rows + t) * call.outputs + n];
      finished(t, n, sum);
    }
  });
}

// Grid: adapters x tiles.  Computes the hidden layer again and writes act(z), dz without its scale, the statistics of the tap's
// norm, and dy where the adapter has a norm of its result; the weights' gradients are products of these.
template <class T, int WM>
__global__ void __launch_bounds__(kThreads, WM) hidden_grad_kernel(const __grid_constant__ Call call) {
  using Tile = Rows<T, WM>;
  const int i = blockIdx.x % call.count;
  Tile rows(call, blockIdx.x / call.count * static_cast<int64_t>(Tile::kRows));
  const Adapter& adapter = call.adapters[i];
  const void* dy = call.wide_out ? call.dy : call.dout;
  rows.bring_tap(i, 0, Tile::kRows / kWarps);
  cp_commit();
  typename Tile::Hidden z;
  rows.down(i, z, call.stats + 2 * i * call.rows);
  rows.activate(i, z, call.hidden + i * call.rows * kHidden);
  uint32_t short_z[4][Tile::kHiddenTiles];  // in 16 bits, as registers are few meanwhile
#pragma unroll
  for (int n = 0; n < Tile::kHiddenTiles; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) short_z[r][n] = narrow<T>(z[r / 2][n][r % 2 * 2], z[r / 2][n][r % 2 * 2 + 1]);
  }
  if (call.has(i, kOutNorm)) {
    uint16_t* behind = call.dy + call.dy_part[i] * call.rows * call.outputs;
    dy = behind;
    typename Tile::Columns y;
#pragma unroll
    for (auto& block : y) clear(block);
    rows.up(i, y, [](int) {});
    rows.multiply_by(adapter.scale, y);
    rows.spread(y);
    const float *weight = call.out_weight(i), *bias = call.up_bias(i);
    const int lane = threadIdx.x % 32;
    rows.for_each_row([&](int64_t t, float* yhat) {
      const auto scaled_dout = [&](int n) { return weight[n] * load<T>(call.dout, call.wide_out, t * call.outputs + n); };
      for (int n = lane; n < call.outputs; n += 32) yhat[n] += bias[n];
      const float rstd = rows.standardise(i, yhat);
      float sum = 0.0f, along = 0.0f;
      for (int n = lane; n < call.outputs; n += 32) {
        sum += scaled_dout(n);
        along += yhat[n] * scaled_dout(n);
      }
      const float mean = sum_over_lanes(sum) / call.outputs, slant = sum_over_lanes(along) / call.outputs;
      for (int n = lane; n < call.outputs; n += 32) {
        store<T>(behind, false, t * call.outputs + n, rstd * (scaled_dout(n) - mean - yhat[n] * slant));
      }
    });
  }
  __syncthreads();  // nobody reads the tile any more, and dy is there for every thread
  const int padded = static_cast<int>(round_up(call.outputs, kDepth));
  rows.bring(dy, call.outputs, padded, 0, Tile::kRows / kWarps);
  typename Tile::Hidden dr;
  clear(dr);
  const uint16_t* up = call.up(i);
  rows.template bring_stage<kDepth, kHidden>(up, kHidden);
#pragma unroll 1
  for (int n = 0; n < padded; n += kDepth) {
    const uint16_t* stage = rows.next_stage();
    if (n + kDepth < padded) rows.template bring_stage<kDepth, kHidden>(up + (n + kDepth) * kHidden, kHidden);
    multiply<T, Tile::kHiddenTiles, kDepth, false, true>(
        dr, rows.tile() + rows.warp_row() * rows.pitch() + n, rows.pitch(), stage + rows.hidden_column(0), kHiddenPitch);
  }
#pragma unroll
  for (int n = 0; n < Tile::kHiddenTiles; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float pair[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float number = widen<T>(static_cast<uint16_t>(short_z[r][n] >> 16 * j));
        pair[j] = dr[r / 2][n][r % 2 * 2 + j] * slope(adapter.activation, number);
      }
      const int column = 8 * n + 2 * (threadIdx.x % 4);
      rows.keep(call.dhidden + i * call.rows * kHidden, r, column, narrow<T>(pair[0], pair[1]));
    }
  }
}

}  // namespace fastadapt::side_fusion
