// GroupNorm, scale and shift, SiLU: one pass over memory, on a CPU. An image at a time, which stays
// in the second-level cache: pixel after pixel, so a channel's numbers are repeated over a row of
// pixels ("lanes") for the compiler to vectorise.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ddpm_math.h"
#include "norm.h"
#include "simd.h"

namespace fused_ddpm {

constexpr int64_t LANES = 256;  // about as many a row

// Loops the compiler must vectorise, over the n values of an image in rows of `lanes`.
#define DDPM_ROWS                                                              \
  for (int64_t i = 0, m = std::min(n, lanes); i < n; i += lanes, m = std::min(n - i, lanes)) \
    _Pragma("omp simd") for (int64_t j = 0; j < m; ++j)

#define DDPM_NORM_LOOPS(T)                                                                         \
  DDPM_CLONES void lane_sums(T* sum, const T* x, int64_t n, int64_t lanes) {                       \
    DDPM_ROWS sum[j] += x[i + j];                                                                  \
  }                                                                                                \
  DDPM_CLONES void lane_squares(T* sum, T* squares, const T* x, const T* mean, int64_t n,          \
                                int64_t lanes) {                                                   \
    DDPM_ROWS {                                                                                    \
      const T off = x[i + j] - mean[j];                                                            \
      sum[j] += off, squares[j] += off * off;                                                      \
    }                                                                                              \
  }                                                                                                \
  DDPM_CLONES void silu_rows(T* y, const T* x, const T* a, const T* b, int64_t n, int64_t lanes) { \
    DDPM_ROWS y[i + j] = silu<T>(a[j] * x[i + j] + b[j]);                                          \
  }                                                                                                \
  /* du = grad silu'(u), and the lanes' sums of it and of it times the normalised x. */            \
  DDPM_CLONES void silu_grad_rows(T* du, T* sum, T* sum_x, const T* grad, const T* x, const T* a,  \
                                  const T* b, const T* mean, const T* rstd, int64_t n,             \
                                  int64_t lanes) {                                                 \
    DDPM_ROWS {                                                                                    \
      const T d = grad[i + j] * silu_grad<T>(a[j] * x[i + j] + b[j]);                              \
      du[i + j] = d, sum[j] += d, sum_x[j] += d * (x[i + j] - mean[j]) * rstd[j];                  \
    }                                                                                              \
  }                                                                                                \
  DDPM_CLONES void input_grad_rows(T* dx, const T* du, const T* x, const T* of_du, const T* of_x,  \
                                   const T* rest, int64_t n, int64_t lanes) {                      \
    DDPM_ROWS dx[i + j] = of_du[j] * du[i + j] + of_x[j] * x[i + j] + rest[j];                     \
  }
DDPM_NORM_LOOPS(float)
DDPM_NORM_LOOPS(double)

DDPM_CLONES void widen(float* to, const uint16_t* from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = bits_float(static_cast<uint32_t>(from[i]) << 16);
}

DDPM_CLONES void narrow(uint16_t* to, const float* from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = float_bits(from[i]),
                   rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to even
    to[i] = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

// n values as T, in `buffer` or where they lie.
template <class S, class T>
const T* widened(T* buffer, const S* from, int64_t n) {
  if constexpr (std::is_same_v<S, T>) return from;
  else if constexpr (std::is_same_v<S, at::BFloat16>)
    widen(buffer, reinterpret_cast<const uint16_t*>(from), n);
  else for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(from[i]);
  return buffer;
}

// Where to write n values of T that are to lie at `to`: there or in `buffer`, from which `narrowed`
// takes them.
template <class S, class T>
T* destination(T* buffer, S* to) {
  if constexpr (std::is_same_v<S, T>) return to;
  return buffer;
}

template <class S, class T>
void narrowed(S* to, const T* from, int64_t n) {
  if constexpr (std::is_same_v<S, T>) return;
  else if constexpr (std::is_same_v<S, at::BFloat16>)
    narrow(reinterpret_cast<uint16_t*>(to), from, n);
  else for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);
}

template <class T>
struct Norm : NormInputs<T> {
  using NormInputs<T>::channels, NormInputs<T>::group;
  int64_t image, lanes;  // values of one; how long a row is

  template <class... Args>
  explicit Norm(const Args&... args)
      : NormInputs<T>(args...),
        image(channels * this->pixels),
        lanes(channels * std::max<int64_t>(1, LANES / channels)) {}

  // silu's argument is a x + b.
  void coefficients(T* a, T* b, const T* mean, const T* rstd, int64_t image) const {
    for (int64_t c = 0; c < channels; ++c) {
      a[c] = rstd[c] * this->weighted(image, c);
      b[c] = this->added(image, c) - a[c] * mean[c];
    }
    repeat(a), repeat(b);
  }
  // A channel's number from the first lane that has it to all others, and the sum of them all back.
  void repeat(T* lane) const {
    for (int64_t j = channels; j < lanes; ++j) lane[j] = lane[j - channels];
  }
  void fold(T* lane) const {
    for (int64_t j = channels, c = 0; j < lanes; ++j, c = c + 1 == channels ? 0 : c + 1)
      lane[c] += lane[j];
  }
  // Over the channels of each group the mean of what `fold` leaves, in all of the group's channels.
  void over_groups(T* sum) const {
    for (int64_t first = 0; first < channels; first += group) {
      double total = 0;
      for (int64_t c = first; c < first + group; ++c) total += sum[c];
      std::fill_n(sum + first, group, static_cast<T>(total * this->each));
    }
  }
};

std::tuple<at::Tensor, at::Tensor> norm_silu_cpu(const at::Tensor& x_, const at::Tensor& weight,
                                                 const at::Tensor& bias,
                                                 const std::optional<at::Tensor>& scale,
                                                 const std::optional<at::Tensor>& shift,
                                                 int64_t groups, double eps) {
  check_norm_silu(x_, weight, bias, scale, shift, groups);
  const at::Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), y = at::empty_like(x);
  const at::Tensor stats = at::empty({x.size(0), groups, 2}, wide_options(x));
  if (x.numel() == 0) return {y, stats.zero_()};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_silu", [&] {
    using T = Wide<scalar_t>;
    const Norm<T> norm(x, weight, bias, scale, shift, groups);
    const int64_t n = norm.image, lanes = norm.lanes;
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    T* kept = stats.mutable_data_ptr<T>();
    at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(std::is_same_v<scalar_t, T> ? 0 : n), numbers(4 * lanes);
      T *mean = numbers.data(), *rstd = mean + lanes, *a = rstd + lanes, *b = a + lanes;
      for (int64_t image = begin; image < end; ++image) {
        const T* source = widened(buffer.data(), from + image * n, n);
        std::fill(mean, b, T(0));
        lane_sums(mean, source, n, lanes);
        norm.fold(mean), norm.over_groups(mean), norm.repeat(mean);
        // What rounding has left of the mean, in a, corrects both (Chan, Golub & LeVeque 1983).
        lane_squares(a, rstd, source, mean, n, lanes);
        norm.fold(rstd), norm.over_groups(rstd), norm.fold(a), norm.over_groups(a);
        for (int64_t c = 0; c < norm.channels; ++c) {
          mean[c] += a[c];
          rstd[c] = static_cast<T>(1 / std::sqrt(std::max(rstd[c] - a[c] * a[c], T(0)) + eps));
        }
        for (int64_t g = 0; g < groups; ++g) {
          kept[(image * groups + g) * 2] = mean[g * norm.group];
          kept[(image * groups + g) * 2 + 1] = rstd[g * norm.group];
        }
        norm.coefficients(a, b, mean, rstd, image);
        T* made = destination(buffer.data(), to + image * n);
        silu_rows(made, source, a, b, n, lanes);
        narrowed(to + image * n, made, n);
      }
    });
  });
  return {y, stats};
}

NormGradients norm_silu_backward_cpu(const at::Tensor& grad_, const at::Tensor& x_,
                                     const at::Tensor& weight, const at::Tensor& bias,
                                     const std::optional<at::Tensor>& scale,
                                     const std::optional<at::Tensor>& shift,
                                     const at::Tensor& stats, int64_t groups) {
  check_norm_silu(x_, weight, bias, scale, shift, groups);
  check_like(grad_, x_, "norm_silu", "grad");
  const at::Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor grad = grad_.to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast),
                   dx = at::empty_like(x);
  const int64_t images = x.size(0), channels = x.size(1);
  check_stats(stats, x, groups);
  // Of each image and channel: the sums of du, and of du times the normalised x.
  const at::Tensor sums = at::empty({2, images, channels}, stats.options());
  if (x.numel() == 0) {
    sums.zero_();
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kBFloat16, at::kHalf, x.scalar_type(), "norm_silu_backward", [&] {
          using T = Wide<scalar_t>;
          const Norm<T> norm(x, weight, bias, scale, shift, groups);
          const int64_t n = norm.image, lanes = norm.lanes;
          const T* kept = stats.const_data_ptr<T>();
          T *sum = sums.mutable_data_ptr<T>(), *sum_x = sum + images * channels;
          at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
            std::vector<T> x_buffer(std::is_same_v<scalar_t, T> ? 0 : n), g_buffer(x_buffer),
                numbers(8 * lanes);
            T *mean = numbers.data(), *rstd = mean + lanes, *a = rstd + lanes, *b = a + lanes,
              *s = b + lanes;
            T *s_x = s + lanes, *of_x = s_x + lanes, *rest = of_x + lanes;
            for (int64_t image = begin; image < end; ++image) {
              const T* xs = widened(x_buffer.data(), x.const_data_ptr<scalar_t>() + image * n, n);
              const T* gs =
                  widened(g_buffer.data(), grad.const_data_ptr<scalar_t>() + image * n, n);
              for (int64_t g = 0, c = 0; g < groups; ++g) {
                const T* of_group = kept + 2 * (image * groups + g);
                for (const int64_t end = c + norm.group; c < end; ++c)
                  mean[c] = of_group[0], rstd[c] = of_group[1];
              }
              norm.coefficients(a, b, mean, rstd, image);
              norm.repeat(mean), norm.repeat(rstd);
              std::fill(s, of_x, T(0));
              scalar_t* to = dx.mutable_data_ptr<scalar_t>() + image * n;
              T* du = destination(g_buffer.data(), to);
              silu_grad_rows(du, s, s_x, gs, xs, a, b, mean, rstd, n, lanes);
              norm.fold(s), norm.fold(s_x);
              std::copy_n(s, channels, sum + image * channels),
                  std::copy_n(s_x, channels, sum_x + image * channels);
              // With w what the normalised x is multiplied with, v = w du its gradient, means over
              // the group: dx = rstd (v - mean(v) - normalised x mean(v normalised x)).
              for (int64_t c = 0; c < channels; ++c) {
                const T w = norm.weighted(image, c);
                s[c] *= w, s_x[c] *= w;
              }
              norm.over_groups(s), norm.over_groups(s_x);
              for (int64_t c = 0; c < channels; ++c) {
                of_x[c] = -rstd[c] * rstd[c] * s_x[c];
                rest[c] = -rstd[c] * s[c] - of_x[c] * mean[c];
              }
              norm.repeat(of_x), norm.repeat(rest);
              input_grad_rows(du, du, xs, a, of_x, rest, n, lanes);
              narrowed(to, du, n);
            }
          });
        });
  }
  return norm_gradients(dx, sums, weight, bias, scale);
}

TORCH_LIBRARY_IMPL(fused_ddpm, CPU, m) {
  m.impl("norm_silu", norm_silu_cpu);
  m.impl("norm_silu_backward", norm_silu_backward_cpu);
}

}  // namespace fused_ddpm
