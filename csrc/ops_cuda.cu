// CUDA kernels: one thread, four elements, one Philox call. Grid: x runs inside an image, y over images, both capped and
// strided, so that no index needs a 64-bit division. c10 headers only: ATen/cuda/CUDAContext.h would need cuSPARSE's.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "ddpm_math.h"
#include "layout.h"

namespace fused_ddpm {

constexpr int THREADS = 256, BLOCKS = 4;  // 4 resident blocks leave 64 registers a thread: nothing spills
constexpr int64_t MAX_GRID_X = 1024, MAX_GRID_Y = 1024;

// Four elements in one load or store.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// Whether every group of four neighbours in runs of n elements can be loaded at once.
inline bool vectorizable(const at::Tensor& t, const Layout& at, int64_t n) {
  return n % 4 == 0 && at.pixel_stride == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (4 * t.element_size()) == 0;
}

inline dim3 grid_for(int64_t images, int64_t groups) {
  return dim3(
      static_cast<unsigned>(std::min((groups + THREADS - 1) / THREADS, MAX_GRID_X)),
      static_cast<unsigned>(std::min(images, MAX_GRID_Y)));
}

// Where element 4 group of an image lies; the division is only for strided images of several channels.
__device__ __forceinline__ void locate(const Layout& at, int64_t group, int64_t* channel, int64_t* pixel) {
  *channel = at.channels == 1 ? 0 : 4 * group / at.pixels;
  *pixel = 4 * group - *channel * at.pixels;
}

// Elements 4 group .. 4 group + 3 of an image, in logical order; n of them exist. The branch is the same for all threads.
template <class T, class Acc>
__device__ __forceinline__ void load4(Acc to[4], const T* image, const Layout& at, int64_t group, int64_t n) {
  if (at.vector) {
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
__device__ __forceinline__ void store4(T* image, const Acc from[4], const Layout& at, int64_t group, int64_t n) {
  if (at.vector) {
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

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) posterior_kernel(
    float* __restrict__ y, const float* __restrict__ x, const T* __restrict__ out, const T* __restrict__ uncond, float scale,
    const float* __restrict__ coefficients, const int64_t* __restrict__ step, int64_t steps,
    const int64_t* __restrict__ seeds, int64_t images, int64_t image, Layout x_at, Layout o_at, Layout u_at,
    uint32_t stream, float limit) {
  // The row is read from memory, so a captured graph can be replayed for every step.
  const int64_t row = *step;
  CUDA_KERNEL_ASSERT(row >= 0 && row < steps);
  const float* c = coefficients + 5 * row;
  const Coefficients k{c[0], c[1], c[2], c[3], c[4]};
  const int64_t groups = (image + 3) / 4;
  for (int64_t b = blockIdx.y; b < images; b += gridDim.y) {
    const uint64_t seed = seeds[b];
    const int64_t base = b * image;
    for (int64_t g = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; g < groups;
         g += gridDim.x * static_cast<int64_t>(THREADS)) {
      const int64_t n = image - 4 * g < 4 ? image - 4 * g : 4;
      float xs[4], os[4], z[4] = {0, 0, 0, 0};
      load4(xs, x + base, x_at, g, n);
      load4(os, out + base, o_at, g, n);
      if (uncond) {
        float us[4];
        load4(us, uncond + base, u_at, g, n);
#pragma unroll
        for (int j = 0; j < 4; ++j) os[j] = guide(os[j], us[j], scale);
      }
      if (k.s != 0) normal4(seed, g, static_cast<uint32_t>(row), stream, z);
#pragma unroll
      for (int j = 0; j < 4; ++j) xs[j] = posterior(xs[j], os[j], z[j], k, limit);
      store4(y + base, xs, x_at, g, n);
    }
  }
}

at::Tensor posterior_step_cuda(
    const at::Tensor& x_t, const at::Tensor& out, const std::optional<at::Tensor>& out_uncond, double guidance_scale,
    const at::Tensor& coefficients, const at::Tensor& step, const at::Tensor& seeds, int64_t stream, bool clip) {
  check_posterior_step(x_t, out, out_uncond, coefficients, step, seeds, stream);
  const c10::cuda::CUDAGuard guard(x_t.device());
  const at::Tensor x = dense(x_t), o = dense(out), u = out_uncond ? dense(*out_uncond) : at::Tensor();
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const int64_t images = x.size(0), image = x.numel() / images;
  Layout x_at = layout_of(x), o_at = layout_of(o), u_at = u.defined() ? layout_of(u) : o_at;
  const float limit = clip ? 1.0f : std::numeric_limits<float>::infinity();
  const float* x_data = x.const_data_ptr<float>();
  float* y_data = y.mutable_data_ptr<float>();
  const at::Tensor seeds_dense = seeds.contiguous();
  // In a contiguous image groups run across channels.
  x_at.vector = x_at.contiguous() && vectorizable(x, x_at, image) && vectorizable(y, x_at, image);
  o_at.vector = o_at.contiguous() && vectorizable(o, o_at, image);
  u_at.vector = u.defined() && u_at.contiguous() && vectorizable(u, u_at, image);

  const auto launch = [&](auto type) {
    using T = decltype(type);
    const T* o_data = o.const_data_ptr<T>();
    const T* u_data = u.defined() ? u.const_data_ptr<T>() : nullptr;
    posterior_kernel<T><<<grid_for(images, (image + 3) / 4), THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
        y_data, x_data, o_data, u_data, static_cast<float>(guidance_scale), coefficients.const_data_ptr<float>(),
        step.const_data_ptr<int64_t>(), coefficients.size(0), seeds_dense.const_data_ptr<int64_t>(), images, image, x_at, o_at,
        u_at, static_cast<uint32_t>(stream), limit);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (o.scalar_type() == at::kFloat) launch(float{});
  if (o.scalar_type() == at::kBFloat16) launch(c10::BFloat16{});
  if (o.scalar_type() == at::kHalf) launch(c10::Half{});
  return y;
}

// A mask of either dtype with one channel or one for each of pred's; data is null where there is none.
struct Mask {
  const void* data;
  bool bytes, truth;  // of bytes: whether they count as 0 or 1
  int64_t channels;
  Layout plane;

  template <class Acc>
  __device__ __forceinline__ void load(Acc to[4], int64_t b, int64_t c, int64_t group, int64_t n) const {
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

  // Weights of four pixels of channel c; left alone where they are the same as channel 0's, and so in w already.
  template <class Acc>
  __device__ __forceinline__ void weights(Acc w[4], Acc cond_weight, int64_t b, int64_t c, int64_t group, int64_t n) const {
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

// Four pixels of one channel of image b. A channel is addressed as an image of its own, of one channel.
__device__ __forceinline__ Layout channel(const Layout& at) { return {1, at.pixels, 0, at.pixel_stride, at.vector}; }

struct Sums {
  double loss, weight;
};

// Sums over the block. A tree of fixed shape and no atomics: the same bits each run.
__device__ Sums block_sums(Sums mine) {
  __shared__ Sums all[THREADS];
  all[threadIdx.x] = mine;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      all[threadIdx.x].loss += all[threadIdx.x + half].loss;
      all[threadIdx.x].weight += all[threadIdx.x + half].weight;
    }
  }
  __syncthreads();
  return all[0];
}

template <class T, class Acc, int64_t KIND>
__global__ void __launch_bounds__(THREADS, BLOCKS) loss_kernel(
    Sums* __restrict__ partials, const T* __restrict__ pred, const Acc* __restrict__ target, Masks masks, Acc cond_weight,
    int64_t images, Layout p_at, Layout t_at) {
  const int64_t groups = (p_at.pixels + 3) / 4, image = p_at.channels * p_at.pixels;
  Acc loss = 0, total = 0;
  for (int64_t b = blockIdx.y; b < images; b += gridDim.y) {
    for (int64_t g = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; g < groups;
         g += gridDim.x * static_cast<int64_t>(THREADS)) {
      const int64_t n = p_at.pixels - 4 * g < 4 ? p_at.pixels - 4 * g : 4;
      Acc w[4];
      for (int64_t c = 0; c < p_at.channels; ++c) {
        masks.weights(w, cond_weight, b, c, g, n);
        Acc ps[4], ts[4];
        load4(ps, pred + b * image + c * p_at.channel_stride, channel(p_at), g, n);
        load4(ts, target + b * image + c * t_at.channel_stride, channel(t_at), g, n);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          loss += w[j] * distance<KIND>(ps[j] - ts[j]);
          total += w[j];
        }
      }
    }
  }
  const Sums sums = block_sums({static_cast<double>(loss), static_cast<double>(total)});
  if (threadIdx.x == 0) partials[blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sums;
}

// One block adds up the partial sums of the other kernel's blocks.
template <class Acc>
__global__ void __launch_bounds__(THREADS, BLOCKS) finish_kernel(Acc* loss, Acc* total, const Sums* __restrict__ partials, int64_t blocks) {
  Sums mine{0, 0};
  for (int64_t i = threadIdx.x; i < blocks; i += THREADS) mine.loss += partials[i].loss, mine.weight += partials[i].weight;
  const Sums sums = block_sums(mine);
  if (threadIdx.x == 0) {
    *loss = static_cast<Acc>(sums.loss / (sums.weight > 0 ? sums.weight : 1));  // nothing selected: 0, unless NaN
    *total = static_cast<Acc>(sums.weight);
  }
}

template <class T, class Acc, int64_t KIND>
__global__ void __launch_bounds__(THREADS, BLOCKS) loss_backward_kernel(
    T* __restrict__ grad_pred, const Acc* __restrict__ grad, const Acc* __restrict__ total, const T* __restrict__ pred,
    const Acc* __restrict__ target, Masks masks, Acc cond_weight, int64_t images, Layout p_at, Layout t_at) {
  const int64_t groups = (p_at.pixels + 3) / 4, image = p_at.channels * p_at.pixels;
  const Acc scale = *grad / (*total > 0 ? *total : Acc(1));
  for (int64_t b = blockIdx.y; b < images; b += gridDim.y) {
    for (int64_t g = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; g < groups;
         g += gridDim.x * static_cast<int64_t>(THREADS)) {
      const int64_t n = p_at.pixels - 4 * g < 4 ? p_at.pixels - 4 * g : 4;
      Acc w[4];
      for (int64_t c = 0; c < p_at.channels; ++c) {
        masks.weights(w, cond_weight, b, c, g, n);
        Acc ps[4], ts[4];
        const int64_t at = b * image + c * p_at.channel_stride;
        load4(ps, pred + at, channel(p_at), g, n);
        load4(ts, target + b * image + c * t_at.channel_stride, channel(t_at), g, n);
#pragma unroll
        for (int j = 0; j < 4; ++j) ps[j] = scale * w[j] * distance_grad<KIND>(ps[j] - ts[j]);
        store4(grad_pred + at, ps, channel(p_at), g, n);
      }
    }
  }
}

// What forward and backward share on the host: dense tensors that outlive the launch, their layouts, the grid.
struct LossArguments : LossViews {
  at::Tensor target_mask, cond_mask;
  dim3 grid;

  LossArguments(
      const at::Tensor& pred_, const at::Tensor& target_, const std::optional<at::Tensor>& target_mask_,
      const std::optional<at::Tensor>& cond_mask_)
      : LossViews(pred_, target_.to(loss_dtype(pred_)), target_mask_.has_value()),
        target_mask(readable_mask(target_mask_)),
        cond_mask(readable_mask(cond_mask_)) {
    p_at.vector = vectorizable(pred, p_at, p_at.pixels);
    t_at.vector = vectorizable(target, t_at, t_at.pixels);
    if (pred.numel() > 0) grid = grid_for(images, (p_at.pixels + 3) / 4);
  }

  Masks masks() const { return {mask(target_mask), mask(cond_mask)}; }

 private:
  Mask mask(const at::Tensor& m) const {
    if (!m.defined()) return {nullptr, false, false, 0, {}};
    Layout plane{1, p_at.pixels, 0, 1};
    plane.vector = vectorizable(m, plane, plane.pixels);
    return {m.const_data_ptr(), is_bytes(m), m.scalar_type() == at::kBool, m.size(1), plane};
  }
};

// Calls f(kind) with a kind that the compiler knows.
template <class F>
void with_kind(int64_t kind, const F& f) {
  if (kind == L2) f(std::integral_constant<int64_t, L2>{});
  if (kind == L1) f(std::integral_constant<int64_t, L1>{});
  if (kind == HUBER) f(std::integral_constant<int64_t, HUBER>{});
}

std::tuple<at::Tensor, at::Tensor> masked_loss_cuda(
    const at::Tensor& pred, const at::Tensor& target, const std::optional<at::Tensor>& target_mask,
    const std::optional<at::Tensor>& cond_mask, double cond_weight, int64_t kind) {
  check_masked_loss(pred, target, target_mask, cond_mask, kind);
  const c10::cuda::CUDAGuard guard(pred.device());
  const auto options = pred.options().dtype(loss_dtype(pred));
  if (pred.numel() == 0) return {at::zeros({}, options), at::zeros({}, options)};
  const LossArguments a(pred, target, target_mask, cond_mask);
  const at::Tensor loss = at::empty({}, options), total = at::empty({}, options);
  const int64_t blocks = static_cast<int64_t>(a.grid.x) * a.grid.y;
  const at::Tensor partials = at::empty({2 * blocks}, pred.options().dtype(at::kDouble));
  Sums* sums = reinterpret_cast<Sums*>(partials.mutable_data_ptr<double>());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, pred.scalar_type(), "masked_loss", [&] {
    using T = scalar_t;
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    with_kind(kind, [&](auto k) {
      loss_kernel<T, Acc, decltype(k)::value><<<a.grid, THREADS, 0, stream>>>(
          sums, a.pred.const_data_ptr<T>(), a.target.const_data_ptr<Acc>(), a.masks(),
          static_cast<Acc>(cond_weight), a.images, a.p_at, a.t_at);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    finish_kernel<Acc><<<1, THREADS, 0, stream>>>(
        loss.mutable_data_ptr<Acc>(), total.mutable_data_ptr<Acc>(), sums, blocks);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, total};
}

at::Tensor masked_loss_backward_cuda(
    const at::Tensor& grad, const at::Tensor& pred, const at::Tensor& target, const std::optional<at::Tensor>& target_mask,
    const std::optional<at::Tensor>& cond_mask, const at::Tensor& total, double cond_weight, int64_t kind) {
  check_masked_loss(pred, target, target_mask, cond_mask, kind);
  check_scalar(grad, pred, "grad");
  check_scalar(total, pred, "total");
  const c10::cuda::CUDAGuard guard(pred.device());
  const LossArguments a(pred, target, target_mask, cond_mask);
  const at::Tensor grad_pred = at::empty_like(a.pred);
  if (pred.numel() == 0) return grad_pred;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, pred.scalar_type(), "masked_loss_backward", [&] {
    using T = scalar_t;
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    with_kind(kind, [&](auto k) {
      loss_backward_kernel<T, Acc, decltype(k)::value><<<a.grid, THREADS, 0, stream>>>(
          grad_pred.mutable_data_ptr<T>(), grad.const_data_ptr<Acc>(), total.const_data_ptr<Acc>(),
          a.pred.const_data_ptr<T>(), a.target.const_data_ptr<Acc>(), a.masks(), static_cast<Acc>(cond_weight), a.images,
          a.p_at, a.t_at);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_pred;
}

TORCH_LIBRARY_IMPL(fused_ddpm, CUDA, m) {
  m.impl("posterior_step", posterior_step_cuda);
  m.impl("masked_loss", masked_loss_cuda);
  m.impl("masked_loss_backward", masked_loss_backward_cuda);
}

}  // namespace fused_ddpm
