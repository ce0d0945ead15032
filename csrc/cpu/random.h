// Counter-based random numbers: a draw is a pure function of (seed, stream, position). No state, so the order of rows,
// the batch they are in and the thread that draws cannot matter.
//
// Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

namespace dschat {

struct PhiloxBlock {
  uint32_t word[4];
};

inline PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * counter.word[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(product1 >> 32) ^ counter.word[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.word[3] ^ key1, uint32_t(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 53 random bits. key = seed, counter = (stream, position), each as low word, high word.
inline double philox_uniform(uint64_t seed, uint64_t stream, uint64_t position) {
  const PhiloxBlock counter{
      {uint32_t(stream), uint32_t(stream >> 32), uint32_t(position), uint32_t(position >> 32)}};
  const PhiloxBlock r = philox4x32_10(counter, uint32_t(seed), uint32_t(seed >> 32));
  const uint64_t bits = (uint64_t(r.word[0] >> 5) << 26) | (r.word[1] >> 6);
  return double(bits) * 0x1.0p-53;
}

}  // namespace dschat
