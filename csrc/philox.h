// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
// A keyed bijection on 128-bit counters, so the noise of a pixel is a pure function of
// (seed of the image, element, step, stream): no state, any order, any thread, any device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define DDPM_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DDPM_HD inline __attribute__((always_inline))
#else
#define DDPM_HD inline
#endif

namespace fused_ddpm {

struct Random4 {
  uint32_t w[4];
};

// counter = (group low, group high, step, stream), where group is the element's index / 4.
DDPM_HD Random4 philox(uint64_t seed, uint64_t group, uint32_t step, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = step, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;  // golden ratio
    k1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fused_ddpm
