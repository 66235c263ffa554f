// The GPU's instructions that C++ has no words for, each behind one function, with its meaning on a CPU.
//
// nvcc compiles the left branch of each.  g++ compiles the right one, on the threads of tests/cuda/cuda_on_cpu.h: there the
// kernels run, and race and bounds checkers watch them, without a GPU.  16-bit numbers are uint16_t in memory; what they
// mean is the tag's, Half's or Bfloat's.
#pragma once

#include <stdint.h>

#ifndef __CUDACC__
#include "cuda_on_cpu.h"
#endif

namespace fastadapt {

struct Half {};
struct Bfloat {};

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// 16 bytes from global to shared memory, some time before cp_wait returns.
__device__ __forceinline__ void cp_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// All copies since the last commit are one group.
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// This thread's groups but for the LATEST newest have arrived.
template <int LATEST>
__device__ __forceinline__ void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
}

// Four 8x8 matrices; lane 8 i + j names row j of matrix i, and gets numbers 2 (lane % 4) and the next of row lane / 4 of each.
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the matrices' transposes.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b of a warp: a (16, 16) by rows, b (16, 8) by columns, d (16, 8) in float32.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<Bfloat>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ __forceinline__ float widen(uint16_t bits);

template <>
__device__ __forceinline__ float widen<Half>(uint16_t bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}

template <>
__device__ __forceinline__ float widen<Bfloat>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Two numbers rounded to the nearest of 16 bits, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t narrow(float low, float high);

template <>
__device__ __forceinline__ uint32_t narrow<Half>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

template <>
__device__ __forceinline__ uint32_t narrow<Bfloat>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

#else  // on a CPU

inline unsigned char* shared_memory() { return emulated::block->shared; }

inline void cp_async(void* to, const void* from) { emulated::thread.copies.start(to, from); }
inline void cp_commit() { emulated::thread.copies.commit(); }
template <int LATEST>
void cp_wait() {
  emulated::thread.copies.wait(LATEST);
}

inline void ldmatrix_rows(uint32_t (&to)[4], const uint16_t* row, bool transposed) {
  emulated::check_aligned(row);
  const unsigned lane = emulated::lane();
  const auto rows = emulated::exchange(row);
  for (unsigned i = 0; i < 4; ++i) {
    const auto number = [&](unsigned j, unsigned k) -> uint32_t {
      return transposed ? rows[8 * i + k][j] : rows[8 * i + j][k];
    };
    to[i] = number(lane / 4, 2 * (lane % 4)) | number(lane / 4, 2 * (lane % 4) + 1) << 16;
  }
}
inline void ldmatrix(uint32_t (&to)[4], const uint16_t* row) { ldmatrix_rows(to, row, false); }
inline void ldmatrix_transposed(uint32_t (&to)[4], const uint16_t* row) { ldmatrix_rows(to, row, true); }

template <class T>
float widen(uint16_t bits);
template <>
inline float widen<Half>(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}
template <>
inline float widen<Bfloat>(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

template <class T>
uint16_t narrow_one(float number);
template <>
inline uint16_t narrow_one<Half>(float number) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(number));
}
template <>
inline uint16_t narrow_one<Bfloat>(float number) {
  const uint32_t bits = std::bit_cast<uint32_t>(number);
  return number != number ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T>
uint32_t narrow(float low, float high) {
  return narrow_one<T>(low) | static_cast<uint32_t>(narrow_one<T>(high)) << 16;
}

// Lane 4 g + q holds, of rows g and g + 8 of a, numbers 2q, 2q + 1 and 8 more; of column g of b the same; and of rows g and
// g + 8 of d, numbers 2q and 2q + 1.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Words {
    uint32_t a[4], b[2];
  };
  const auto all = emulated::exchange(Words{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = emulated::lane() / 4, q = emulated::lane() % 4;
  const auto half_of = [](uint32_t word, unsigned k) { return widen<T>(static_cast<uint16_t>(word >> 16 * (k % 2))); };
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned holder = k % 8 / 2, upper = k / 8;
    for (unsigned row = 0; row < 2; ++row) {
      for (unsigned column = 0; column < 2; ++column) {
        d[2 * row + column] += half_of(all[4 * g + holder].a[2 * upper + row], k) *
                               half_of(all[4 * (2 * q + column) + holder].b[upper], k);
      }
    }
  }
}

#endif

}  // namespace fastadapt
