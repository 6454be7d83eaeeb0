// Runs the kernels of a .cu file on a CPU, on CPU tensors: blocks one after another, a block's
// threads as fibers. What is not C++ is rewritten by test_cuda_on_cpu.py. Each load and store of a
// kernel is checked, see emulator.cpp. Speed, streams and graphs only a GPU shows.
#pragma once
#include <c10/core/Device.h>

#include <functional>
#include <tuple>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

struct Index {
  dim3 thread, block, grid, threads;
};
extern Index at;

int64_t setting(const char* name, int64_t value);  // of the environment, where it has one
[[noreturn]] void fail_assertion(const char* what);  // ends the thread
void barrier(int line);
void shared(const void* data, size_t size);
void run(dim3 grid, dim3 threads, const std::function<void()>& thread);

struct Launch {
  dim3 grid, threads;
  template <class Stream>
  Launch(dim3 g, dim3 t, size_t, const Stream&) : grid(g), threads(t) {}

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), A&&... a) const {
    const std::tuple<P...> parameters{static_cast<P>(a)...};
    run(grid, threads, [&] { std::apply(kernel, parameters); });
  }
};

}  // namespace emulator

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline int getCurrentCUDAStream() { return 0; }
}  // namespace c10::cuda

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx emulator::at.thread
#define blockIdx emulator::at.block
#define gridDim emulator::at.grid
#define blockDim emulator::at.threads
#define __syncthreads() emulator::barrier(__LINE__)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) emulator::fail_assertion("assertion failed: " #condition)
