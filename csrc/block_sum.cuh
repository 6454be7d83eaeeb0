// A sum over the threads of a block.
#pragma once

namespace fused_ddpm {

constexpr int LARGEST_BLOCK = 128;  // threads, of any kernel here; a power of two

// A tree of fixed shape and no atomics: the same bits each run.
__device__ __forceinline__ double block_sum(double mine) {
  __shared__ double all[LARGEST_BLOCK];
  __syncthreads();  // an earlier sum has been read
  all[threadIdx.x] = mine;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) all[threadIdx.x] += all[threadIdx.x + half];
  }
  __syncthreads();
  return all[0];
}

}  // namespace fused_ddpm
