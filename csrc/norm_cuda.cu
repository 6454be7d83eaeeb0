// GroupNorm, scale and shift, SiLU on a GPU: a block for each group of each image, whose channels lie beside each other in
// every pixel. It reads x three times and its gradient twice; but for the first time they come from the caches.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ddpm_math.h"
#include "norm.h"

namespace fused_ddpm::norm {

constexpr int THREADS = 128;

// The sum over the block, by a tree of fixed shape: the same bits each run.
__device__ double block_sum(double mine) {
  __shared__ double all[THREADS];
  __syncthreads();  // an earlier sum has been read
  all[threadIdx.x] = mine;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) all[threadIdx.x] += all[threadIdx.x + half];
  }
  __syncthreads();
  return all[0];
}

template <class Acc>
struct Numbers {
  const Acc *weight, *bias, *scale, *shift;  // the last two null where there are none
  int64_t channels, pixels;
  int groups, group;  // channels in one
  double each;  // 1 / (values in one)

  // A block has a group; those of an image follow each other, as they share sectors of memory.
  __device__ int64_t image() const { return blockIdx.x / groups; }
  __device__ int64_t first() const { return static_cast<int64_t>(blockIdx.x % groups) * group; }  // its first channel

  // What the normalised x is multiplied with, and what is added, for channel c of image b.
  __device__ Acc weighted(int64_t b, int64_t c) const { return weight[c] * (scale ? 1 + scale[b * channels + c] : Acc(1)); }
  __device__ Acc added(int64_t b, int64_t c) const {
    return bias[c] * (scale ? 1 + scale[b * channels + c] : Acc(1)) + (shift ? shift[b * channels + c] : Acc(0));
  }
};

// Each thread has a channel and every rows-th pixel, from `row`; with more channels than threads, several channels.
struct Walk {
  int width, rows, channel, row;

  __device__ explicit Walk(int group)
      : width(group < THREADS ? group : THREADS), rows(THREADS / width), channel(threadIdx.x % width), row(threadIdx.x / width) {}

  template <class F>
  __device__ void pixels(int64_t count, const F& f) const {
    if (row < rows)  // the last threads may be left over
      for (int64_t p = row; p < count; p += rows) f(p);
  }
};

template <class T, class Acc>
__global__ void __launch_bounds__(THREADS) forward_kernel(
    T* __restrict__ y, Acc* __restrict__ stats, const T* __restrict__ x, Numbers<Acc> numbers, double eps) {
  const int64_t b = numbers.image(), first = numbers.first(), channels = numbers.channels;
  const int64_t corner = b * channels * numbers.pixels + first;
  const Walk walk(numbers.group);
  Acc sum = 0;
  for (int c = walk.channel; c < numbers.group; c += walk.width)
    walk.pixels(numbers.pixels, [&](int64_t p) { sum += static_cast<Acc>(x[corner + p * channels + c]); });
  const Acc near = static_cast<Acc>(block_sum(sum) * numbers.each);
  Acc rest_of_mean = 0, squares = 0;  // what rounding has left of it, see norm_cpu.cpp
  for (int c = walk.channel; c < numbers.group; c += walk.width)
    walk.pixels(numbers.pixels, [&](int64_t p) {
      const Acc off = static_cast<Acc>(x[corner + p * channels + c]) - near;
      rest_of_mean += off, squares += off * off;
    });
  const double off = block_sum(rest_of_mean) * numbers.each, variance = block_sum(squares) * numbers.each - off * off;
  const Acc mean = static_cast<Acc>(near + off);
  const Acc rstd = 1 / sqrt(static_cast<Acc>((variance > 0 ? variance : 0) + eps));
  if (threadIdx.x == 0) stats[2 * blockIdx.x] = mean, stats[2 * blockIdx.x + 1] = rstd;
  for (int c = walk.channel; c < numbers.group; c += walk.width) {
    const Acc a = rstd * numbers.weighted(b, first + c), rest = numbers.added(b, first + c) - a * mean;
    walk.pixels(numbers.pixels, [&](int64_t p) {
      const int64_t i = corner + p * channels + c;
      y[i] = static_cast<T>(silu<Acc>(a * static_cast<Acc>(x[i]) + rest));
    });
  }
}

// The gradient of x, and sums (2, B, C): see norm_gradients; what is done with them here, see norm_cpu.cpp.
template <class T, class Acc>
__global__ void __launch_bounds__(THREADS) backward_kernel(
    T* __restrict__ dx, Acc* __restrict__ sums, const T* __restrict__ grad, const T* __restrict__ x,
    const Acc* __restrict__ stats, Numbers<Acc> numbers) {
  __shared__ Acc parts[THREADS];
  __shared__ Acc parts_x[THREADS];
  const int64_t b = numbers.image(), first = numbers.first(), channels = numbers.channels;
  const int64_t corner = b * channels * numbers.pixels + first, images = gridDim.x / numbers.groups;
  const Acc mean = stats[2 * blockIdx.x], rstd = stats[2 * blockIdx.x + 1];
  const Walk walk(numbers.group);
  const auto gradient = [&](int64_t i, Acc a, Acc rest) {  // of silu's argument
    return static_cast<Acc>(grad[i]) * silu_grad<Acc>(a * static_cast<Acc>(x[i]) + rest);
  };
  double all = 0, all_x = 0;
  for (int from = 0; from < numbers.group; from += walk.width) {
    const int c = from + walk.channel;
    const bool mine = c < numbers.group;
    const Acc w = mine ? numbers.weighted(b, first + c) : Acc(0);
    const Acc a = rstd * w, rest = mine ? numbers.added(b, first + c) - a * mean : Acc(0);
    Acc sum = 0, sum_x = 0;
    if (mine)
      walk.pixels(numbers.pixels, [&](int64_t p) {
        const int64_t i = corner + p * channels + c;
        const Acc du = gradient(i, a, rest);
        sum += du, sum_x += du * (static_cast<Acc>(x[i]) - mean) * rstd;
      });
    __syncthreads();  // those of the last channels have been read
    parts[threadIdx.x] = sum, parts_x[threadIdx.x] = sum_x;
    __syncthreads();
    if (mine && walk.row == 0) {
      for (int r = 1; r < walk.rows; ++r)
        sum += parts[r * walk.width + walk.channel], sum_x += parts_x[r * walk.width + walk.channel];
      sums[b * channels + first + c] = sum, sums[(images + b) * channels + first + c] = sum_x;
      all += static_cast<double>(w) * sum, all_x += static_cast<double>(w) * sum_x;
    }
  }
  const double over = block_sum(all) * numbers.each, over_x = block_sum(all_x) * numbers.each;
  const Acc of_x = static_cast<Acc>(-over_x * rstd * rstd), left = static_cast<Acc>(-over * rstd) - of_x * mean;
  for (int c = walk.channel; c < numbers.group; c += walk.width) {
    const Acc a = rstd * numbers.weighted(b, first + c), rest = numbers.added(b, first + c) - a * mean;
    walk.pixels(numbers.pixels, [&](int64_t p) {
      const int64_t i = corner + p * channels + c;
      dx[i] = static_cast<T>(a * gradient(i, a, rest) + of_x * static_cast<Acc>(x[i]) + left);
    });
  }
}

// Calls f(T, Numbers) for x, channels_last, with what else the kernels read.
template <class F>
void with_numbers(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, int64_t groups, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_silu", [&] {
    using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const at::Tensor w = as<Acc>(weight), b = as<Acc>(bias), s = as<Acc>(scale), t = as<Acc>(shift);
    const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<Acc>() : nullptr; };
    f(scalar_t{}, Numbers<Acc>{
                      data(w), data(b), data(s), data(t), x.size(1), x.size(2) * x.size(3),
                      static_cast<int>(groups), static_cast<int>(x.size(1) / groups), static_cast<double>(groups * x.size(0)) / x.numel()});
  });
}

std::tuple<at::Tensor, at::Tensor> norm_silu_cuda(
    const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& shift, int64_t groups, double eps) {
  check_norm_silu(x_, weight, bias, scale, shift, groups);
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), y = at::empty_like(x);
  const at::Tensor stats = at::empty({x.size(0), groups, 2}, wide_options(x));
  if (x.numel() == 0) return {y, stats.zero_()};
  const dim3 grid(static_cast<unsigned>(x.size(0) * groups));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_numbers(x, weight, bias, scale, shift, groups, [&](auto zero, const auto& numbers) {
    using T = decltype(zero);
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    forward_kernel<T, Acc><<<grid, THREADS, 0, stream>>>(
        y.mutable_data_ptr<T>(), stats.mutable_data_ptr<Acc>(), x.const_data_ptr<T>(), numbers, eps);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, stats};
}

NormGradients norm_silu_backward_cuda(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, const at::Tensor& stats, int64_t groups) {
  check_norm_silu(x_, weight, bias, scale, shift, groups);
  check_like(grad_, x_, "norm_silu", "grad");
  check_stats(stats, x_, groups);
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), dx = at::empty_like(x);
  const at::Tensor grad = grad_.to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor sums = at::empty({2, x.size(0), x.size(1)}, stats.options());
  if (x.numel() == 0) {
    sums.zero_();
  } else {
    const dim3 grid(static_cast<unsigned>(x.size(0) * groups));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    with_numbers(x, weight, bias, scale, shift, groups, [&](auto zero, const auto& numbers) {
      using T = decltype(zero);
      using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
      backward_kernel<T, Acc><<<grid, THREADS, 0, stream>>>(
          dx.mutable_data_ptr<T>(), sums.mutable_data_ptr<Acc>(), grad.const_data_ptr<T>(), x.const_data_ptr<T>(),
          stats.const_data_ptr<Acc>(), numbers);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return norm_gradients(dx, sums, weight, bias, scale);
}

TORCH_LIBRARY_IMPL(fused_ddpm, CUDA, m) {
  m.impl("norm_silu", norm_silu_cuda);
  m.impl("norm_silu_backward", norm_silu_backward_cuda);
}

}  // namespace fused_ddpm::norm
