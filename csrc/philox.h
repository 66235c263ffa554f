// Philox4x32-10 and the order its numbers are used in, in plain C++ (no torch), as fastadapt/core/philox.py defines.
//
// Loops over counters are written so that the compiler turns them into SIMD: one lane, one counter.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace fastadapt {

static_assert(std::endian::native == std::endian::little, "a word's low half must come first in memory");

struct Key {
  uint32_t low, high;
};

constexpr int kWords = 4;                         // 32-bit words of one Philox call
constexpr int kPieces = 2 * kWords;               // 16-bit numbers of one call: one for each of 8 columns
constexpr int kLanes = 16;                        // calls made side by side: 32-bit lanes of an AVX-512 register
constexpr int kBlockColumns = kLanes * kPieces;   // columns served by one block of calls

// The four random words of one counter.
__attribute__((always_inline)) inline void philox4x32(
    uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, Key key, uint32_t* words) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.low;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
    c3 = static_cast<uint32_t>(product0);
    key.low += 0x9E3779B9;
    key.high += 0xBB67AE85;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The 16-bit numbers of columns [8 * group, 8 * group + kBlockColumns) of one row, in column order.
__attribute__((always_inline)) inline void block_pieces(
    uint32_t row, uint32_t group, uint32_t member, Key key, uint16_t* pieces) {
  uint32_t words[kLanes * kWords];
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) {
    philox4x32(row, group + lane, member, 0, key, words + lane * kWords);
  }
  std::memcpy(pieces, words, sizeof words);
}

}  // namespace fastadapt
