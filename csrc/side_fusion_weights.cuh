// side_fusion's gradients of the weights: products over all rows, in parts, and the parts' sums.
//
//     d[U; S] = scale dy^T r          M = dz^T xhat        as (width, kHidden): wide^T narrow, wide being dy or xhat
//     dD = M o gamma + dd beta^T      dgamma = sum_h D o M        dbeta = D^T dd
#pragma once

#include "side_fusion_device.cuh"

namespace fastadapt::side_fusion {

constexpr int kTileColumns = 128, kChunk = 32, kChunkPitch = kTileColumns + kPad, kChunkStages = 3;
constexpr int kChunkNumbers = 2 * kChunk * kChunkPitch;  // of a stage: the wide rows, then the narrow ones
constexpr int kProductBytes = 2 * kChunkStages * kChunkNumbers;
constexpr int kFinishColumns = 32;  // of a tile, a block's
constexpr int kFinishBytes = 4 * (kFinishColumns * (kHidden + 1) + kHidden + 2 * kWarps * kFinishColumns);

// The gradients that one product gives, null where they are not wanted.  Down: D, d, gamma, beta.  Up: U, u, S, s.
struct Product {
  const uint16_t* wide;    // (rows, width)
  const uint16_t* narrow;  // (rows, kHidden)
  const float* stats;      // where `wide` is a tap with a norm
  const void *weight, *norm_weight, *norm_bias;  // of the down-projection
  void* grads[4];
  unsigned wide_grads;  // which of these are float32; the parameters are what their gradients are
  int width, hidden, own, first_tile;
  float scale;
  bool down;
};

struct Products {
  Product items[2 * kMaxAdapters];
  float* partial;  // (splits, tiles, kTileColumns, kHidden)
  float* sums;     // (splits, tiles, kTileColumns): of dy's columns; of dz's in a down-projection's first tile
  int64_t rows, split_rows;
  int count, tiles, splits;

  __host__ __device__ const Product& of(int tile) const {
    int i = count - 1;
    while (items[i].first_tile > tile) --i;
    return items[i];
  }
};
static_assert(sizeof(Products) <= 4096, "a kernel's arguments");

// Eight warps, four above each other, hold a tile of a product; each thread also sums the columns it brings.
template <class T>
struct ProductTile {
  const Product& product;
  const int64_t rows, end;
  const int column0;
  uint16_t* const stages;
  float sums[8] = {};

  // What a thread brings of a chunk: columns 8 (thread % 16) and on, of rows thread / 16 and 16 later.
  __device__ int column() const { return threadIdx.x % 16 * 8; }
  __device__ int row(int half) const { return threadIdx.x / 16 + 16 * half; }
  __device__ bool has_wide(int64_t t) const { return t < end && column0 + column() < product.width; }
  __device__ uint16_t* wide(int turn) const { return stages + turn * kChunkNumbers; }
  __device__ uint16_t* narrow(int turn) const { return wide(turn) + kChunk * kChunkPitch; }

  __device__ void bring(int64_t t0, int turn) {
    for (int half = 0; half < 2; ++half) {
      const int64_t t = t0 + row(half);
      const int place = row(half) * kChunkPitch + column();
      if (has_wide(t)) {
        cp_async(wide(turn) + place, product.wide + t * product.width + column0 + column());
      } else {
        piece_at(wide(turn) + place) = {0, 0, 0, 0};
      }
      if (t < end) {
        cp_async(narrow(turn) + place, product.narrow + t * kHidden + column());
      } else {
        piece_at(narrow(turn) + place) = {0, 0, 0, 0};
      }
    }
    cp_commit();
  }

  // Of what this thread brought: the tap's rows become xhat, and columns are summed.
  __device__ void digest(int64_t t0, int turn) {
    for (int half = 0; half < 2; ++half) {
      const int64_t t = t0 + row(half);
      const int place = row(half) * kChunkPitch + column();
      float numbers[8];
      if (product.stats != nullptr && has_wide(t)) {
        const float mean = product.stats[2 * t], rstd = product.stats[2 * t + 1];
        unpack<T>(piece_at(wide(turn) + place), numbers);
        for (float& number : numbers) number = (number - mean) * rstd;
        piece_at(wide(turn) + place) = pack<T>(numbers);
      }
      unpack<T>(piece_at((product.down ? narrow(turn) : wide(turn)) + place), numbers);
      for (int j = 0; j < 8; ++j) sums[j] += numbers[j];
    }
  }
};

// Grid (tiles, splits).
template <class T>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const __grid_constant__ Products products) {
  const Product& product = products.of(blockIdx.x);
  const int64_t begin = blockIdx.y * products.split_rows;
  const int64_t end = begin + products.split_rows < products.rows ? begin + products.split_rows : products.rows;
  const int tile = blockIdx.x - product.first_tile;
  ProductTile<T> work{product, products.rows, end, tile * kTileColumns, reinterpret_cast<uint16_t*>(shared_memory())};
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
  float d[2][8][4];
  clear(d);
  for (int s = 0; s < kChunkStages - 1; ++s) work.bring(begin + s * kChunk, s);
  int turn = 0;
  for (int64_t t = begin; t < end; t += kChunk) {
    cp_wait<kChunkStages - 2>();
    work.digest(t, turn);
    __syncthreads();
    work.bring(t + (kChunkStages - 1) * kChunk, (turn + kChunkStages - 1) % kChunkStages);
    multiply<T, 8, kChunk, true, true>(
        d, work.wide(turn) + warp_row, kChunkPitch, work.narrow(turn) + warp_column, kChunkPitch);
    turn = (turn + 1) % kChunkStages;
  }
  cp_wait<0>();
  const int64_t place = static_cast<int64_t>(blockIdx.y) * products.tiles + blockIdx.x;
  float* partial = products.partial + place * kTileColumns * kHidden;
  for_each_pair(d, [&](int r, int column, float low, float high) {
    float* to = partial + (warp_row + row_of(r)) * kHidden + warp_column + column;
    to[0] = low;
    to[1] = high;
  });
  __syncthreads();  // the stages are free
  float* columns = reinterpret_cast<float*>(shared_memory());
  for (int j = 0; j < 8; ++j) columns[work.row(0) * kTileColumns + work.column() + j] = work.sums[j];
  __syncthreads();
  if (threadIdx.x >= kTileColumns) return;
  float sum = 0.0f;
  for (int row = 0; row < 16; ++row) sum += columns[row * kTileColumns + threadIdx.x];
  products.sums[place * kTileColumns + threadIdx.x] = sum;
}

// Number `place` of a tile, summed over the splits in their order.
__device__ inline float over_splits(const float* partial, const Products& products, int tile, int numbers, int place) {
  float sum = 0.0f;
  for (int s = 0; s < products.splits; ++s) {
    sum += partial[(static_cast<int64_t>(s) * products.tiles + tile) * numbers + place];
  }
  return sum;
}

template <class T>
__device__ void give(const Product& product, int grad, int64_t place, float number) {
  if (product.grads[grad] != nullptr) store<T>(product.grads[grad], product.wide_grads >> grad & 1, place, number);
}

// The rows of U and S, and u and s, that a block's columns are.
template <class T>
__device__ void finish_up(const Products& products, const Product& product, int tile, int first) {
  const int column0 = (tile - product.first_tile) * kTileColumns;
  for (int p = threadIdx.x; p < kFinishColumns * kHidden; p += kThreads) {
    const int column = first + p / kHidden, k = p % kHidden, n = column0 + column;
    if (n >= product.width || k >= product.hidden) continue;
    const bool own = n < product.own;
    const float sum = over_splits(products.partial, products, tile, kTileColumns * kHidden, column * kHidden + k);
    give<T>(product, own ? 0 : 2, static_cast<int64_t>(own ? n : n - product.own) * product.hidden + k, product.scale * sum);
  }
  const int n = column0 + first + threadIdx.x;
  if (threadIdx.x >= kFinishColumns || n >= product.width) return;
  const bool own = n < product.own;
  const float sum = over_splits(products.sums, products, tile, kTileColumns, first + threadIdx.x);
  give<T>(product, own ? 1 : 3, own ? n : n - product.own, product.scale * sum);
}

// The columns of D, and the numbers of gamma and beta; d with the first block.
template <class T>
__device__ void finish_down(const Products& products, const Product& product, int tile, int first) {
  constexpr int kPitch = kHidden + 1;
  float* m = reinterpret_cast<float*>(shared_memory());  // (kFinishColumns, kPitch)
  float* dd = m + kFinishColumns * kPitch;               // (kHidden)
  float* of_warps = dd + kHidden;                        // (2, kWarps, kFinishColumns): parts of dgamma and dbeta
  const int column0 = (tile - product.first_tile) * kTileColumns + first;
  for (int p = threadIdx.x; p < kFinishColumns * kHidden; p += kThreads) {
    m[p / kHidden * kPitch + p % kHidden] =
        product.scale * over_splits(products.partial, products, tile, kTileColumns * kHidden, first * kHidden + p);
  }
  if (threadIdx.x < kHidden) {
    dd[threadIdx.x] = product.scale * over_splits(products.sums, products, product.first_tile, kTileColumns, threadIdx.x);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = column0 + lane;
  float dgamma = 0.0f, dbeta = 0.0f;
  if (k < product.width) {
    const float gamma = product.norm_weight ? load<T>(product.norm_weight, product.wide_grads >> 2 & 1, k) : 1.0f;
    const float beta = product.norm_bias ? load<T>(product.norm_bias, product.wide_grads >> 3 & 1, k) : 0.0f;
    for (int h = warp; h < product.hidden; h += kWarps) {
      const int64_t place = static_cast<int64_t>(h) * product.width + k;
      const float number = m[lane * kPitch + h], weight = load<T>(product.weight, product.wide_grads & 1, place);
      give<T>(product, 0, place, number * gamma + dd[h] * beta);
      dgamma += weight * number;
      dbeta += weight * dd[h];
    }
  }
  of_warps[warp * kFinishColumns + lane] = dgamma;
  of_warps[(kWarps + warp) * kFinishColumns + lane] = dbeta;
  __syncthreads();
  if (column0 == 0 && 32 * warp + lane < product.hidden) give<T>(product, 1, 32 * warp + lane, dd[32 * warp + lane]);
  if (warp > 1 || k >= product.width) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += of_warps[(warp * kWarps + w) * kFinishColumns + lane];
  give<T>(product, 2 + warp, k, sum);
}

// Grid (kTileColumns / kFinishColumns, tiles).
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Products products) {
  const int tile = blockIdx.y, first = blockIdx.x * kFinishColumns;
  const Product& product = products.of(tile);
  if (product.down) {
    finish_down<T>(products, product, tile, first);
  } else {
    finish_up<T>(products, product, tile, first);
  }
}

}  // namespace fastadapt::side_fusion
