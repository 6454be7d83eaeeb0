// GroupNorm, scale and shift, SiLU on a GPU: a block for each group of each image, whose channels
// lie beside each other in every pixel. It reads x three times and its gradient twice; but for the
// first time they come from the caches.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "block_sum.cuh"
#include "ddpm_math.h"
#include "norm.h"

namespace fused_ddpm::norm {

constexpr int THREADS = 128;

// A block has a group; those of an image follow each other, as they share sectors of memory.
struct Place {
  int64_t image, first, corner;  // first: the group's first channel; corner: where its values begin

  template <class Acc>
  __device__ explicit Place(const NormNumbers<Acc>& numbers)
      : image(blockIdx.x / numbers.groups),
        first(static_cast<int64_t>(blockIdx.x % numbers.groups) * numbers.group),
        corner(image * numbers.channels * numbers.pixels + first) {}
};

// Each thread has a channel and every rows-th pixel, from `row`; with more channels than threads,
// several channels.
struct Walk {
  int width, rows, channel, row;

  __device__ explicit Walk(int group)
      : width(group < THREADS ? group : THREADS),
        rows(THREADS / width),
        channel(threadIdx.x % width),
        row(threadIdx.x / width) {}

  template <class F>
  __device__ void pixels(int64_t count, const F& f) const {
    if (row < rows)  // the last threads may be left over
      for (int64_t p = row; p < count; p += rows) f(p);
  }
};

template <class T, class Acc>
__global__ void __launch_bounds__(THREADS) forward_kernel(
    T* __restrict__ y, Acc* __restrict__ stats, const T* __restrict__ x, NormNumbers<Acc> numbers,
    double eps) {
  const Place place(numbers);
  const int64_t b = place.image, first = place.first, corner = place.corner;
  const int64_t channels = numbers.channels;
  const Walk walk(numbers.group);
  Acc sum = 0;
  for (int c = walk.channel; c < numbers.group; c += walk.width)
    walk.pixels(numbers.pixels,
                [&](int64_t p) { sum += static_cast<Acc>(x[corner + p * channels + c]); });
  const Acc near = static_cast<Acc>(block_sum(sum) * numbers.each);
  Acc rest_of_mean = 0, squares = 0;  // what rounding has left of it, see norm_cpu.cpp
  for (int c = walk.channel; c < numbers.group; c += walk.width)
    walk.pixels(numbers.pixels, [&](int64_t p) {
      const Acc off = static_cast<Acc>(x[corner + p * channels + c]) - near;
      rest_of_mean += off, squares += off * off;
    });
  const double off = block_sum(rest_of_mean) * numbers.each,
               variance = block_sum(squares) * numbers.each - off * off;
  const Acc mean = static_cast<Acc>(near + off);
  const Acc rstd = 1 / sqrt(static_cast<Acc>((variance > 0 ? variance : 0) + eps));
  if (threadIdx.x == 0) stats[2 * blockIdx.x] = mean, stats[2 * blockIdx.x + 1] = rstd;
  for (int c = walk.channel; c < numbers.group; c += walk.width) {
    const Acc a = rstd * numbers.weighted(b, first + c),
              rest = numbers.added(b, first + c) - a * mean;
    walk.pixels(numbers.pixels, [&](int64_t p) {
      const int64_t i = corner + p * channels + c;
      y[i] = static_cast<T>(silu<Acc>(a * static_cast<Acc>(x[i]) + rest));
    });
  }
}

// The gradient of x, and sums (2, B, C): see norm_gradients; what is done with them here, see
// norm_cpu.cpp.
template <class T, class Acc>
__global__ void __launch_bounds__(THREADS) backward_kernel(
    T* __restrict__ dx, Acc* __restrict__ sums, const T* __restrict__ grad, const T* __restrict__ x,
    const Acc* __restrict__ stats, NormNumbers<Acc> numbers) {
  __shared__ Acc parts[THREADS];
  __shared__ Acc parts_x[THREADS];
  const Place place(numbers);
  const int64_t b = place.image, first = place.first, corner = place.corner;
  const int64_t channels = numbers.channels;
  const int64_t images = gridDim.x / numbers.groups;
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
        sum += parts[r * walk.width + walk.channel],
            sum_x += parts_x[r * walk.width + walk.channel];
      sums[b * channels + first + c] = sum, sums[(images + b) * channels + first + c] = sum_x;
      all += static_cast<double>(w) * sum, all_x += static_cast<double>(w) * sum_x;
    }
  }
  const double over = block_sum(all) * numbers.each, over_x = block_sum(all_x) * numbers.each;
  const Acc of_x = static_cast<Acc>(-over_x * rstd * rstd),
            left = static_cast<Acc>(-over * rstd) - of_x * mean;
  for (int c = walk.channel; c < numbers.group; c += walk.width) {
    const Acc a = rstd * numbers.weighted(b, first + c),
              rest = numbers.added(b, first + c) - a * mean;
    walk.pixels(numbers.pixels, [&](int64_t p) {
      const int64_t i = corner + p * channels + c;
      dx[i] = static_cast<T>(a * gradient(i, a, rest) + of_x * static_cast<Acc>(x[i]) + left);
    });
  }
}

// Calls f(T, numbers, grid, stream) for x, channels_last.
template <class F>
void launch(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
            const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
            int64_t groups, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_silu", [&] {
    const NormInputs<Wide<scalar_t>> inputs(x, weight, bias, scale, shift, groups);
    const NormNumbers<Wide<scalar_t>>& numbers = inputs;
    const dim3 grid(static_cast<unsigned>(x.size(0) * groups));
    f(scalar_t{}, numbers, grid, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<at::Tensor, at::Tensor> norm_silu_cuda(const at::Tensor& x_, const at::Tensor& weight,
                                                  const at::Tensor& bias,
                                                  const std::optional<at::Tensor>& scale,
                                                  const std::optional<at::Tensor>& shift,
                                                  int64_t groups, double eps) {
  check_norm_silu(x_, weight, bias, scale, shift, groups);
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), y = at::empty_like(x);
  const at::Tensor stats = at::empty({x.size(0), groups, 2}, wide_options(x));
  if (x.numel() == 0) return {y, stats.zero_()};
  launch(x, weight, bias, scale, shift, groups,
         [&](auto zero, const auto& numbers, dim3 grid, auto stream) {
    using T = decltype(zero);
    using Acc = Wide<T>;
    forward_kernel<T, Acc><<<grid, THREADS, 0, stream>>>(y.mutable_data_ptr<T>(),
                                                         stats.mutable_data_ptr<Acc>(),
                                                         x.const_data_ptr<T>(), numbers, eps);
  });
  return {y, stats};
}

NormGradients norm_silu_backward_cuda(const at::Tensor& grad_, const at::Tensor& x_,
                                      const at::Tensor& weight, const at::Tensor& bias,
                                      const std::optional<at::Tensor>& scale,
                                      const std::optional<at::Tensor>& shift,
                                      const at::Tensor& stats, int64_t groups) {
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
    launch(x, weight, bias, scale, shift, groups,
           [&](auto zero, const auto& numbers, dim3 grid, auto stream) {
      using T = decltype(zero);
      using Acc = Wide<T>;
      backward_kernel<T, Acc><<<grid, THREADS, 0, stream>>>(
          dx.mutable_data_ptr<T>(), sums.mutable_data_ptr<Acc>(), grad.const_data_ptr<T>(),
          x.const_data_ptr<T>(), stats.const_data_ptr<Acc>(), numbers);
    });
  }
  return norm_gradients(dx, sums, weight, bias, scale);
}

TORCH_LIBRARY_IMPL(fused_ddpm, CUDA, m) {
  m.impl("norm_silu", norm_silu_cuda);
  m.impl("norm_silu_backward", norm_silu_backward_cuda);
}

}  // namespace fused_ddpm::norm
