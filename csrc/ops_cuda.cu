// CUDA kernels: one thread, four elements of a channel, one Philox call. Grid: x runs inside an
// image, y over images, both capped and strided, so that no index needs a 64-bit division. c10
// headers only: ATen/cuda/CUDAContext.h would need cuSPARSE's.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "block_sum.cuh"
#include "ddpm_math.h"
#include "layout.h"

namespace fused_ddpm {

// Blocks so small that 64 images of 32x32 make 256 of them.
constexpr int THREADS = 64, BLOCKS = 16;
constexpr int64_t MAX_GRID_X = 2048, MAX_GRID_Y = 1024;  // 2048 blocks fill a large GPU

// Resident blocks of threads that take C channels at once: 64 registers a thread, else 128. Nothing
// spills.
constexpr int resident(int C) { return C == 1 ? BLOCKS : BLOCKS / 2; }

// Four elements in one load or store.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

constexpr int64_t COLOURS =
    3;  // channels whose pixels a block reads together where they are interleaved

inline bool interleaved(const Layout& at) { return at.pixel_stride > 1; }

// Whether every group of four neighbours in runs of n elements can be loaded at once, or four
// interleaved pixels of n.
inline bool vectorizable(const at::Tensor& t, const Layout& at, int64_t n) {
  const bool neighbours = !interleaved(at) || at.pixel_stride == COLOURS;
  return n % 4 == 0 && neighbours &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (4 * t.element_size()) == 0;
}

// Whether a thread should take four pixels of all three colours: some tensor has them interleaved,
// and none stands against it.
template <class... L>
bool by_colours(const L&... at) {
  return (interleaved(at) || ...) &&
         ((at.channels == COLOURS && (at.vector || !interleaved(at))) && ...);
}

// Calls f(channels that a thread takes at once), a number that the compiler knows.
template <class F>
void with_channels(bool colours, const F& f) {
  if (colours) return f(std::integral_constant<int, COLOURS>{});
  f(std::integral_constant<int, 1>{});
}

inline dim3 grid_for(int64_t images, int64_t groups) {
  const int64_t y = std::min(images, MAX_GRID_Y),
                x = std::min((groups + THREADS - 1) / THREADS,
                             std::max<int64_t>(MAX_GRID_X / y, 1));
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// Where element 4 group of an image lies; the division is only for strided images of several
// channels.
__device__ __forceinline__ void locate(const Layout& at, int64_t group, int64_t* channel,
                                       int64_t* pixel) {
  *channel = at.channels == 1 ? 0 : 4 * group / at.pixels;
  *pixel = 4 * group - *channel * at.pixels;
}

// Elements 4 group .. 4 group + 3 of an image, in logical order; n of them exist, which may be
// none.
template <class T, class Acc>
__device__ __forceinline__ void load4(Acc to[4], const T* image, const Layout& at, int64_t group,
                                      int64_t n) {
  if (at.vector && n > 0) {
    const Four<T> four = reinterpret_cast<const Four<T>*>(image)[group];
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = static_cast<Acc>(four.v[j]);
    return;
  }
  int64_t c, p;
  locate(at, group, &c, &p);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    to[j] = j < n ? static_cast<Acc>(image[c * at.channel_stride + p * at.pixel_stride]) : Acc(0);
    if (++p == at.pixels) p = 0, ++c;
  }
}

template <class T, class Acc>
__device__ __forceinline__ void store4(T* image, const Acc from[4], const Layout& at, int64_t group,
                                       int64_t n) {
  if (at.vector && n > 0) {
    Four<T> four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.v[j] = static_cast<T>(from[j]);
    reinterpret_cast<Four<T>*>(image)[group] = four;
    return;
  }
  int64_t c, p;
  locate(at, group, &c, &p);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < n) image[c * at.channel_stride + p * at.pixel_stride] = static_cast<T>(from[j]);
    if (++p == at.pixels) p = 0, ++c;
  }
}

// A channel is addressed as an image of its own, of one channel.
__device__ __forceinline__ Layout channel(const Layout& at) {
  return {1, at.pixels, 0, at.pixel_stride, at.vector && at.pixel_stride == 1};
}

// Four pixels of C channels. Interleaved, they are neighbours: the block then moves those of all
// its threads together, in memory's order, and hands them over in `tile`, which is shared: for
// itself each thread would ask for every sector twice. All threads of a block come here, with
// consecutive groups; n is 0 for those past the last.
template <int C, class T, class Acc>
__device__ __forceinline__ void load_pixels(Acc to[C][4], const T* image, const Layout& at,
                                            int64_t group, int64_t groups, int64_t n,
                                            Four<float>* tile) {
  if constexpr (C == 1) {
    load4(to[0], image, at, group, n);
  } else if (at.pixel_stride == 1) {
#pragma unroll
    for (int c = 0; c < C; ++c) load4(to[c], image + c * at.channel_stride, channel(at), group, n);
  } else {
    const int64_t first = group - threadIdx.x, left = (groups - first) * C;
    const Four<T>* from = reinterpret_cast<const Four<T>*>(image) + first * C;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const int i = k * THREADS + threadIdx.x;
      if (i >= left) continue;
      const Four<T> four = from[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[i].v[j] = static_cast<float>(four.v[j]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const Four<float> four = n > 0 ? tile[C * threadIdx.x + k] : Four<float>{};
#pragma unroll
      for (int j = 0; j < 4; ++j) to[(4 * k + j) % C][(4 * k + j) / C] = four.v[j];
    }
  }
}

template <int C, class T>
__device__ __forceinline__ void store_pixels(T* image, const T from[C][4], const Layout& at,
                                             int64_t group, int64_t groups, int64_t n,
                                             Four<float>* tile) {
  if constexpr (C == 1) {
    store4(image, from[0], at, group, n);
  } else if (at.pixel_stride == 1) {
#pragma unroll
    for (int c = 0; c < C; ++c)
      store4(image + c * at.channel_stride, from[c], channel(at), group, n);
  } else {
    const int64_t first = group - threadIdx.x, left = (groups - first) * C;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < C; ++k) {
      Four<float> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.v[j] = from[(4 * k + j) % C][(4 * k + j) / C];
      tile[C * threadIdx.x + k] = four;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const int i = k * THREADS + threadIdx.x;
      if (i < left) reinterpret_cast<Four<float>*>(image)[first * C + i] = tile[i];
    }
  }
}

// Elements of an image from group 4 g on, at most 4, of n in all.
__device__ __forceinline__ int64_t count(int64_t n, int64_t g) {
  return n - 4 * g < 4 ? (n > 4 * g ? n - 4 * g : 0) : 4;
}

// With C = 1 an image is one run of all its elements.
template <int C, class T>
__global__ void __launch_bounds__(THREADS, resident(C))
    posterior_kernel(float* __restrict__ y, const float* __restrict__ x, const T* __restrict__ out,
                     const T* __restrict__ uncond, float scale,
                     const float* __restrict__ coefficients, int64_t row,
                     const int64_t* __restrict__ step, int64_t steps,
                     const int64_t* __restrict__ seeds, int64_t images, int64_t image, Layout x_at,
                     Layout y_at, Layout o_at, Layout u_at, uint32_t stream, float limit) {
  __shared__ Four<float> tile[C == 1 ? 1 : C * THREADS];
  if (step) row = *step;  // from memory, so a captured graph can be replayed for every step
  CUDA_KERNEL_ASSERT(row >= 0 && row < steps);
  const float* r = coefficients + 5 * row;
  const Coefficients k{r[0], r[1], r[2], r[3], r[4]};
  const int64_t run = C == 1 ? image : x_at.pixels, groups = (run + 3) / 4;
  for (int64_t b = blockIdx.y; b < images; b += gridDim.y) {
    const uint64_t seed = seeds[b];
    const int64_t base = b * image;
    for (int64_t first = blockIdx.x * static_cast<int64_t>(THREADS); first < groups;
         first += gridDim.x * static_cast<int64_t>(THREADS)) {
      const int64_t g = first + threadIdx.x, n = count(run, g);
      float xs[C][4], os[C][4];
      load_pixels<C>(os, out + base, o_at, g, groups, n, tile);
      if (uncond) {
        load_pixels<C>(xs, uncond + base, u_at, g, groups, n, tile);
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int j = 0; j < 4; ++j) os[c][j] = guide(os[c][j], xs[c][j], scale);
      }
      load_pixels<C>(xs, x + base, x_at, g, groups, n, tile);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float z[4] = {0, 0, 0, 0};
        if (k.s != 0) normal4(seed, c * groups + g, static_cast<uint32_t>(row), stream, z);
#pragma unroll
        for (int j = 0; j < 4; ++j) xs[c][j] = posterior(xs[c][j], os[c][j], z[j], k, limit);
      }
      store_pixels<C>(y + base, xs, y_at, g, groups, n, tile);
    }
  }
}

at::Tensor posterior_step_cuda(const at::Tensor& x_t, const at::Tensor& out,
                               const std::optional<at::Tensor>& out_uncond, double guidance_scale,
                               const at::Tensor& coefficients, c10::SymInt given,
                               const std::optional<at::Tensor>& step, const at::Tensor& seeds,
                               int64_t stream, bool clip) {
  const int64_t row = step ? 0 : given.expect_int();
  check_posterior_step(x_t, out, out_uncond, coefficients, row, step, seeds, stream);
  const c10::cuda::CUDAGuard guard(x_t.device());
  const at::Tensor x = dense(x_t), o = dense(out),
                   u = out_uncond ? dense(*out_uncond) : at::Tensor();
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const int64_t images = x.size(0), image = x.numel() / images;
  const float limit = clip ? 1.0f : std::numeric_limits<float>::infinity();
  const float* x_data = x.const_data_ptr<float>();
  float* y_data = y.mutable_data_ptr<float>();
  const at::Tensor seeds_dense = seeds.contiguous();
  const auto layout = [](const at::Tensor& t) {
    Layout at = layout_of(t);
    at.vector = vectorizable(t, at, at.pixels);
    return at;
  };
  Layout x_at = layout(x), y_at = layout(y), o_at = layout(o),
         u_at = u.defined() ? layout(u) : o_at;
  const bool colours = by_colours(x_at, y_at, o_at, u_at);
  // Without colours a contiguous image is one run, across its channels.
  const auto as_run = [&](const at::Tensor& t, Layout& at) {
    const bool contiguous = at.contiguous();
    if (contiguous) at = Layout{1, image, image, 1};
    at.vector = contiguous && vectorizable(t, at, image);
  };
  if (!colours)
    as_run(x, x_at), as_run(y, y_at), as_run(o, o_at), as_run(u.defined() ? u : o, u_at);
  const int64_t run = colours ? x_at.pixels : image;
  const dim3 grid = grid_for(images, (run + 3) / 4);
  const auto queue = c10::cuda::getCurrentCUDAStream();  // `stream` is of random numbers

  const auto launch = [&](auto type) {
    using T = decltype(type);
    const T* o_data = o.const_data_ptr<T>();
    const T* u_data = u.defined() ? u.const_data_ptr<T>() : nullptr;
    with_channels(colours, [&](auto c) {
      posterior_kernel<decltype(c)::value, T><<<grid, THREADS, 0, queue>>>(
          y_data, x_data, o_data, u_data, static_cast<float>(guidance_scale),
          coefficients.const_data_ptr<float>(), row,
          step ? step->const_data_ptr<int64_t>() : nullptr, coefficients.size(0),
          seeds_dense.const_data_ptr<int64_t>(), images, image, x_at, y_at, o_at, u_at,
          static_cast<uint32_t>(stream), limit);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (o.scalar_type() == at::kFloat) launch(float{});
  if (o.scalar_type() == at::kBFloat16) launch(c10::BFloat16{});
  if (o.scalar_type() == at::kHalf) launch(c10::Half{});
  return y;
}

// A mask of either dtype with one channel or one for each of pred's; data is null where there is
// none.
struct Mask {
  const void* data;
  bool bytes, truth;  // of bytes: whether they count as 0 or 1
  int64_t channels;
  Layout plane;

  template <class Acc>
  __device__ __forceinline__ void load(Acc to[4], int64_t b, int64_t c, int64_t group,
                                       int64_t n) const {
    const int64_t at = (b * channels + (channels > 1 ? c : 0)) * plane.pixels;
    if (bytes) {
      load4(to, static_cast<const uint8_t*>(data) + at, plane, group, n);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = truth && to[j] > 1 ? Acc(1) : to[j];
    } else {
      load4(to, static_cast<const float*>(data) + at, plane, group, n);
    }
  }
};

struct Masks {
  Mask target, cond;

  // Weights of four pixels of channel c; left alone where they are the same as channel 0's, and so
  // in w already.
  template <class Acc>
  __device__ __forceinline__ void weights(Acc w[4], Acc cond_weight, int64_t b, int64_t c,
                                          int64_t group, int64_t n) const {
    if (c > 0 && target.channels <= 1 && cond.channels <= 1) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = j < n ? Acc(1) : Acc(0);
    if (!target.data) return;
    Acc t[4], s[4] = {0, 0, 0, 0};
    target.load(t, b, c, group, n);
    if (cond.data) cond.load(s, b, c, group, n);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] *= mask_weight<Acc>(t[j], s[j], cond_weight);
  }
};

// What the blocks of an earlier kernel have each summed up.
struct Parts {
  double* sums;
  int64_t blocks;

  __device__ void write(double sum) const {
    if (threadIdx.x == 0) sums[blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
  }

  __device__ double sum() const {
    double mine = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += THREADS) mine += sums[i];
    return block_sum(mine);
  }
};

// The sum of all weights, which is known where there are no masks.
struct Total {
  Parts parts;
  double known;

  __device__ double divisor() const {
    const double sum = parts.sums ? parts.sum() : known;
    return sum > 0 ? sum : 1;  // nothing selected: 0, unless NaN
  }
};

// The partial sums of the weights of `channels` channels, each of which counts `repeat` times.
template <class Acc>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    weights_kernel(Parts parts, Masks masks, Acc cond_weight, int64_t images, int64_t channels,
                   int64_t pixels, double repeat) {
  const int64_t groups = (pixels + 3) / 4;
  Acc total = 0;
  for (int64_t b = blockIdx.y; b < images; b += gridDim.y) {
    for (int64_t g = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; g < groups;
         g += gridDim.x * static_cast<int64_t>(THREADS)) {
      Acc w[4];
      for (int64_t c = 0; c < channels; ++c) {
        masks.weights(w, cond_weight, b, c, g, count(pixels, g));
        total += (w[0] + w[1]) + (w[2] + w[3]);
      }
    }
  }
  parts.write(repeat * block_sum(total));
}

// The partial sums of the loss and, unless grad is null, the gradient.
template <int C, class T, class Acc, int64_t KIND>
__global__ void __launch_bounds__(THREADS, resident(C))
    loss_kernel(Parts parts, Acc* __restrict__ grad, const T* __restrict__ pred,
                const Acc* __restrict__ target, Masks masks, Acc cond_weight, Total total,
                int64_t images, Layout g_at, Layout p_at, Layout t_at) {
  __shared__ Four<float> tile[C == 1 ? 1 : C * THREADS];
  const int64_t groups = (p_at.pixels + 3) / 4, image = p_at.channels * p_at.pixels;
  const Acc scale = grad ? static_cast<Acc>(1 / total.divisor()) : Acc(0);
  const auto at_once = [](const Layout& at) { return C == 1 ? channel(at) : at; };
  Acc loss = 0;
  for (int64_t b = blockIdx.y; b < images; b += gridDim.y) {
    for (int64_t first = blockIdx.x * static_cast<int64_t>(THREADS); first < groups;
         first += gridDim.x * static_cast<int64_t>(THREADS)) {
      const int64_t g = first + threadIdx.x, n = count(p_at.pixels, g);
      Acc w[4];
      for (int64_t c = 0; c < p_at.channels; c += C) {
        Acc ps[C][4], ts[C][4];
        load_pixels<C>(ps, pred + b * image + c * p_at.channel_stride, at_once(p_at), g, groups, n,
                       tile);
        load_pixels<C>(ts, target + b * image + c * t_at.channel_stride, at_once(t_at), g, groups,
                       n, tile);
#pragma unroll
        for (int k = 0; k < C; ++k) {
          masks.weights(w, cond_weight, b, c + k, g, n);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Acc diff = ps[k][j] - ts[k][j];
            loss += w[j] * distance<KIND>(diff);
            ps[k][j] = scale * w[j] * distance_grad<KIND>(diff);
          }
        }
        if (grad)
          store_pixels<C>(grad + b * image + c * g_at.channel_stride, ps, at_once(g_at), g, groups,
                          n, tile);
      }
    }
  }
  parts.write(block_sum(loss));
}

// One block adds up what the others left.
template <class Acc>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    finish_kernel(Acc* loss, Parts parts, Total total) {
  const double sum = parts.sum(), divisor = total.divisor();
  if (threadIdx.x == 0) *loss = static_cast<Acc>(sum / divisor);
}

// Calls f(kind) with a kind that the compiler knows.
template <class F>
void with_kind(int64_t kind, const F& f) {
  if (kind == L2) f(std::integral_constant<int64_t, L2>{});
  if (kind == L1) f(std::integral_constant<int64_t, L1>{});
  if (kind == HUBER) f(std::integral_constant<int64_t, HUBER>{});
}

std::tuple<at::Tensor, at::Tensor> masked_loss_cuda(const at::Tensor& pred_,
                                                    const at::Tensor& target_,
                                                    const std::optional<at::Tensor>& target_mask_,
                                                    const std::optional<at::Tensor>& cond_mask_,
                                                    double cond_weight, int64_t kind,
                                                    bool gradient) {
  check_masked_loss(pred_, target_, target_mask_, cond_mask_, kind);
  const c10::cuda::CUDAGuard guard(pred_.device());
  const LossViews views(pred_, target_.to(loss_dtype(pred_)), target_mask_.has_value());
  const at::Tensor &pred = views.pred, &target = views.target;
  const at::Tensor target_mask = readable_mask(target_mask_), cond_mask = readable_mask(cond_mask_);
  const auto options = pred.options().dtype(loss_dtype(pred));
  const at::Tensor grad = gradient ? at::empty_like(pred, options) : at::empty({0}, options);
  if (pred.numel() == 0) return {at::zeros({}, options), grad};
  const at::Tensor loss = at::empty({}, options);

  const int64_t images = views.images, pixels = views.p_at.pixels, groups = (pixels + 3) / 4;
  Layout p_at = views.p_at, t_at = views.t_at, g_at = views.p_at;
  p_at.vector = vectorizable(pred, p_at, pixels);
  t_at.vector = vectorizable(target, t_at, pixels);
  g_at.vector = gradient && vectorizable(grad, g_at, pixels);
  const auto mask = [&](const at::Tensor& m) -> Mask {
    if (!m.defined()) return {nullptr, false, false, 0, {}};
    Layout plane{1, pixels, 0, 1};
    plane.vector = vectorizable(m, plane, pixels);
    return {m.const_data_ptr(), is_bytes(m), m.scalar_type() == at::kBool, m.size(1), plane};
  };
  const Masks masks{mask(target_mask), mask(cond_mask)};
  const int64_t own_weights = std::max<int64_t>({masks.target.channels, masks.cond.channels, 1});

  // Each block of the loss adds up the sums of all blocks of the weights, so these are fewer.
  dim3 weights_grid = grid_for(images, groups);
  weights_grid.x = std::min(weights_grid.x, std::max(256 / weights_grid.y, 1u));
  const dim3 grid = grid_for(images, groups);
  const int64_t of_weights =
      target_mask.defined() ? static_cast<int64_t>(weights_grid.x) * weights_grid.y : 0;
  const int64_t of_loss = static_cast<int64_t>(grid.x) * grid.y;
  const at::Tensor sums = at::empty({of_loss + of_weights}, options.dtype(at::kDouble));
  const Parts losses{sums.mutable_data_ptr<double>(), of_loss};
  const Total total{{of_weights ? losses.sums + of_loss : nullptr, of_weights},
                    static_cast<double>(pred.numel())};
  const auto stream = c10::cuda::getCurrentCUDAStream();

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, pred.scalar_type(), "masked_loss", [&] {
    using T = scalar_t;
    using Acc = Wide<T>;
    if (of_weights) {
      weights_kernel<Acc><<<weights_grid, THREADS, 0, stream>>>(
          total.parts, masks, static_cast<Acc>(cond_weight), images, own_weights, pixels,
          static_cast<double>(p_at.channels / own_weights));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const auto launch = [&](auto c, auto k) {
      loss_kernel<decltype(c)::value, T, Acc, decltype(k)::value><<<grid, THREADS, 0, stream>>>(
          losses, gradient ? grad.mutable_data_ptr<Acc>() : nullptr, pred.const_data_ptr<T>(),
          target.const_data_ptr<Acc>(), masks, static_cast<Acc>(cond_weight), total, images, g_at,
          p_at, t_at);
    };
    with_kind(kind, [&](auto k) {
      if constexpr (std::is_same_v<T, double>)
        return launch(std::integral_constant<int, 1>{}, k);  // registers
      const bool colours = gradient ? by_colours(p_at, t_at, g_at) : by_colours(p_at, t_at);
      with_channels(colours, [&](auto c) { launch(c, k); });
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    finish_kernel<Acc><<<1, THREADS, 0, stream>>>(loss.mutable_data_ptr<Acc>(), losses, total);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, grad};
}

TORCH_LIBRARY_IMPL(fused_ddpm, CUDA, m) {
  m.impl("posterior_step", posterior_step_cuda);
  m.impl("masked_loss", masked_loss_cuda);
}

}  // namespace fused_ddpm
