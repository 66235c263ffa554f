// What side_fusion's kernels share: their arguments, tiles, and products of tiles on the tensor cores.
//
// The kernels work on 16-bit taps.  Every parameter is first packed to that, padded with zeros to whole tiles, with LayerNorm's
// affine part folded into the down-projection:
//
//     LN(f) D^T + d = xhat (D o gamma)^T + (d + D beta)           xhat = rstd (f - mean)
//
// so the other kernels see but xhat, aligned matrices and no bounds of theirs.
#pragma once

#include "ptx.cuh"

namespace fastadapt::side_fusion {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxAdapters = 16, kMaxBases = 4;
constexpr int kHidden = 128;                     // hidden widths are padded to it
constexpr int kMaxWidth = 768;                   // of a tap and of the result
constexpr int kColumns = 256;                    // columns of the result a step makes; widths are padded to a multiple
constexpr int kDepth = 64, kUpDepth = 32;        // what a step of the down-projection, or of the up-projection, sums over
constexpr int kPad = 8;                          // numbers between rows in shared memory: rows fall on different banks
constexpr int kStage = kColumns * (kUpDepth + kPad);  // numbers of a stage, the largest
constexpr int kHiddenPitch = kHidden + kPad;

__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

enum Activation : int { kIdentity, kRelu, kGelu, kQuickGelu };

// The tensors of an adapter, in the order of the operator's list; their bits in Adapter::wide.
enum Tensors : int {
  kTap, kDown, kDownBias, kUp, kUpBias, kShared, kSharedBias, kNorm, kNormBias, kOutNorm, kOutNormBias, kEach
};

struct Adapter {
  const void* tensors[kEach];  // null where there is none
  int inputs, hidden, own, shared;
  int activation;
  unsigned wide;  // the tensors that are float32; the others are 16 bits wide
  float scale, norm_eps, out_eps;
};

// The arguments of all kernels but the weights' gradients.
struct Call {
  Adapter adapters[kMaxAdapters];
  const void* bases[kMaxBases];
  void* out;            // (rows, outputs), float32 or 16-bit
  const void* dout;     // the same
  uint16_t* packed;     // for each adapter: down (kHidden, padded inputs), up (padded outputs, kHidden)
  float* constants;     // for each adapter: down bias (kHidden), up bias, out weight, out bias (padded outputs each)
  unsigned* arrived;    // for each tile of rows, how many groups have their sum written
  float* partial;       // (groups, rows, outputs)
  uint16_t* hidden;     // (count, rows, kHidden): act(z)
  uint16_t* dhidden;    // (count, rows, kHidden): dz / scale
  uint16_t* dy;         // (parts, rows, outputs): a float32 dout in 16 bits, then dy of each adapter with a norm of its result
  float* stats;         // (count, rows, 2): mean and rstd of the taps
  int64_t rows;
  int outputs, inputs_padded, outputs_padded;
  int count, base_count, groups;
  unsigned wide_bases;
  bool wide_out;
  float to_unit[kMaxAdapters];  // what sums in the units of an adapter's predecessor are in its own, its scale; 0 is no unit
  float unit[kMaxAdapters];     // each group's last
  unsigned char group_first[kMaxAdapters + 1];  // the first adapter of each group, and the end
  unsigned char dy_part[kMaxAdapters];          // which part of dy an adapter's is

  __host__ __device__ int64_t packed_numbers() const {
    return static_cast<int64_t>(kHidden) * (inputs_padded + outputs_padded);
  }
  __host__ __device__ int constant_numbers() const { return kHidden + 3 * outputs_padded; }
  __device__ uint16_t* down(int i) const { return packed + i * packed_numbers(); }
  __device__ uint16_t* up(int i) const { return down(i) + static_cast<int64_t>(kHidden) * inputs_padded; }
  __device__ float* down_bias(int i) const { return constants + static_cast<int64_t>(i) * constant_numbers(); }
  __device__ float* up_bias(int i) const { return down_bias(i) + kHidden; }
  __device__ float* out_weight(int i) const { return up_bias(i) + outputs_padded; }
  __device__ float* out_bias(int i) const { return out_weight(i) + outputs_padded; }
  __host__ __device__ bool has(int i, int tensor) const { return adapters[i].tensors[tensor] != nullptr; }
};
static_assert(sizeof(Call) <= 4096, "a kernel's arguments");

// Number i of a tensor.
template <class T>
__device__ __forceinline__ float load(const void* tensor, bool wide, int64_t i) {
  return wide ? static_cast<const float*>(tensor)[i] : widen<T>(static_cast<const uint16_t*>(tensor)[i]);
}

template <class T>
__device__ __forceinline__ void store(void* tensor, bool wide, int64_t i, float number) {
  if (wide) {
    static_cast<float*>(tensor)[i] = number;
  } else {
    static_cast<uint16_t*>(tensor)[i] = static_cast<uint16_t>(narrow<T>(number, 0.0f));
  }
}

// Numbers i and i + 1, i even, as one word.
__device__ __forceinline__ void store_pair(uint16_t* to, uint32_t pair) { *reinterpret_cast<uint32_t*>(to) = pair; }

// An adapter's tensor.
template <class T>
__device__ __forceinline__ float parameter(const Adapter& adapter, int tensor, int64_t i) {
  return load<T>(adapter.tensors[tensor], adapter.wide >> tensor & 1, i);
}

template <int LANES = 32>
__device__ __forceinline__ float sum_over_lanes(float mine) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) mine += __shfl_xor_sync(~0u, mine, mask);
  return mine;
}

// Eight numbers of 16 bits as floats, and back.
template <class T>
__device__ __forceinline__ void unpack(const uint4& piece, float (&numbers)[8]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) numbers[j] = widen<T>(static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2)));
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&numbers)[8]) {
  return {narrow<T>(numbers[0], numbers[1]), narrow<T>(numbers[2], numbers[3]), narrow<T>(numbers[4], numbers[5]),
          narrow<T>(numbers[6], numbers[7])};
}

__device__ __forceinline__ uint4& piece_at(uint16_t* numbers) { return *reinterpret_cast<uint4*>(numbers); }

// d += A B of a warp, over DEPTH: A has 32 rows and B 8 * NT columns, in 16 bits.  A lies in shared memory by rows, or by
// columns where A_BY_COLUMNS; B by columns (a weight's rows), or by rows where B_BY_ROWS.
template <class T, int NT, int DEPTH, bool A_BY_COLUMNS, bool B_BY_ROWS>
__device__ __forceinline__ void multiply(
    float (&d)[2][NT][4], const uint16_t* a, int a_pitch, const uint16_t* b, int b_pitch) {
  const int lane = threadIdx.x % 32, in_eight = lane % 8, second = lane / 8 % 2, fourth = lane / 16;
#pragma unroll 1
  for (int k = 0; k < DEPTH; k += 16) {
    uint32_t left[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if constexpr (A_BY_COLUMNS) {
        ldmatrix_transposed(left[m], a + (k + 8 * fourth + in_eight) * a_pitch + 16 * m + 8 * second);
      } else {
        ldmatrix(left[m], a + (16 * m + lane % 16) * a_pitch + k + 8 * fourth);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t right[4];  // of two blocks of eight columns
      if constexpr (B_BY_ROWS) {
        ldmatrix_transposed(right, b + (k + lane % 16) * b_pitch + 8 * n + 8 * fourth);
      } else {
        ldmatrix(right, b + (8 * n + 8 * fourth + in_eight) * b_pitch + k + 8 * second);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma<T>(d[m][n], left[m], right[0], right[1]);
        mma<T>(d[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// A thread holds numbers of four rows of a warp's product, r = 0 to 3.
__device__ __forceinline__ int row_of(int r) { return 8 * r + threadIdx.x % 32 / 4; }

template <int NT>
__device__ __forceinline__ void clear(float (&d)[2][NT][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) d[m][n][j] = 0.0f;
    }
  }
}

// body(r, column, number, next) for each pair of neighbours that a thread holds of a warp's product.
template <int NT, class F>
__device__ __forceinline__ void for_each_pair(float (&d)[2][NT][4], const F& body) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) body(2 * m + j / 2, 8 * n + 2 * (threadIdx.x % 4), d[m][n][j], d[m][n][j + 1]);
    }
  }
}

__device__ __forceinline__ float activated(int activation, float z) {
  switch (activation) {
    case kRelu: return z < 0.0f ? 0.0f : z;
    case kGelu: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case kQuickGelu: return z / (1.0f + expf(-1.702f * z));
    default: return z;
  }
}

__device__ __forceinline__ float slope(int activation, float z) {
  switch (activation) {
    case kRelu: return z <= 0.0f ? 0.0f : 1.0f;
    case kGelu: return 0.5f * (1.0f + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
    case kQuickGelu: {
      const float gate = 1.0f / (1.0f + expf(-1.702f * z));
      return gate * (1.0f + 1.702f * z * (1.0f - gate));
    }
    default: return 1.0f;
  }
}

}  // namespace fastadapt::side_fusion
