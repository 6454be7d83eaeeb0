// CPU kernels: vectorised by the compiler over chunks that stay in the first-level cache, threaded
// over chunks.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "ddpm_math.h"
#include "layout.h"
#include "simd.h"

namespace fused_ddpm {

constexpr int64_t CHUNK =
    1024;  // elements a task: 4 kB of float32; a multiple of 128, so whole vectors fit
constexpr int64_t CHUNKS_A_THREAD = 4;  // below this a second thread costs more than it brings

// Loops the compiler must vectorise. Each exists in several versions, so none is a template.

// The random words of `groups` groups, those that make a radius apart from those that make an
// angle.
DDPM_CLONES void random_words(uint32_t* radius, uint32_t* angle, int64_t groups, uint64_t seed,
                              uint64_t first_group, uint32_t step, uint32_t stream) {
  for (int64_t i = 0; i < groups; ++i) {
    const Random4 r = philox(seed, first_group + i, step, stream);
    radius[2 * i] = r.w[0], radius[2 * i + 1] = r.w[2];
    angle[2 * i] = r.w[1], angle[2 * i + 1] = r.w[3];
  }
}

#ifdef DDPM_X86
// The same eight groups in a vector, each word in the low half of a 64-bit lane: vpmuludq then
// yields both halves of a product at once, which compilers do not find by themselves and which
// halves the time of the whole step. Four vectors at once, as a round waits for the one before.
__attribute__((target("avx512f"))) void random_words_avx512(uint32_t* radius, uint32_t* angle,
                                                            int64_t groups, uint64_t seed,
                                                            uint64_t first_group, uint32_t step,
                                                            uint32_t stream) {
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0),
                low = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  constexpr int MANY = 4;
  for (int64_t i = 0; i < groups; i += 8 * MANY) {
    __m512i c0[MANY], c1[MANY], c2[MANY], c3[MANY];
    for (int v = 0; v < MANY; ++v) {
      c0[v] = _mm512_add_epi64(_mm512_set1_epi64(first_group + i + 8 * v), lane);
      c1[v] = _mm512_srli_epi64(c0[v], 32);
      c2[v] = _mm512_set1_epi64(step), c3[v] = _mm512_set1_epi64(stream);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
      for (int v = 0; v < MANY; ++v) {
        const __m512i p0 = _mm512_mul_epu32(c0[v], m0),
                      p1 = _mm512_mul_epu32(c2[v], m1);  // reads the low halves only
        constexpr int XOR = 0x96;                        // of three
        c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[v], key0, XOR);
        c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[v], key1, XOR);
        c1[v] = p1, c3[v] = p0;  // high halves are rubbish from here on, and never read
      }
    }
    for (int v = 0; v < MANY; ++v) {
      const int64_t at = 2 * (i + 8 * v);
      _mm512_storeu_si512(
          radius + at, _mm512_or_si512(_mm512_and_si512(c0[v], low), _mm512_slli_epi64(c2[v], 32)));
      _mm512_storeu_si512(
          angle + at, _mm512_or_si512(_mm512_and_si512(c1[v], low), _mm512_slli_epi64(c3[v], 32)));
    }
  }
}

// And four at a time, for processors without AVX-512.
__attribute__((target("avx2"))) void random_words_avx2(uint32_t* radius, uint32_t* angle,
                                                       int64_t groups, uint64_t seed,
                                                       uint64_t first_group, uint32_t step,
                                                       uint32_t stream) {
  const __m256i lane = _mm256_set_epi64x(3, 2, 1, 0), low = _mm256_set1_epi64x(0xFFFFFFFF);
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  for (int64_t i = 0; i < groups; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(first_group + i), lane),
            c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_set1_epi64x(step), c3 = _mm256_set1_epi64x(stream);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 =
          _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 =
          _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = p1, c3 = p0;
    }
    const __m256i r = _mm256_or_si256(_mm256_and_si256(c0, low), _mm256_slli_epi64(c2, 32));
    const __m256i a = _mm256_or_si256(_mm256_and_si256(c1, low), _mm256_slli_epi64(c3, 32));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(radius + 2 * i), r);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(angle + 2 * i), a);
  }
}
#endif

DDPM_CLONES void box_muller_chunk(float* z, const uint32_t* radius, const uint32_t* angle,
                                  int64_t pairs) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) box_muller(radius[i], angle[i], &z[2 * i], &z[2 * i + 1]);
}

// Up to CHUNK standard normals, for elements 4 first_group onwards.
void fill_normal(float* z, int64_t n, uint64_t seed, uint64_t first_group, uint32_t step,
                 uint32_t stream) {
  alignas(64) uint32_t radius[CHUNK / 2], angle[CHUNK / 2];
  const int64_t groups = (n + 3) / 4;
#ifdef DDPM_X86
  static const auto widest = __builtin_cpu_supports("avx512f") ? random_words_avx512
                             : __builtin_cpu_supports("avx2")  ? random_words_avx2
                                                               : random_words;
  widest(radius, angle, groups, seed, first_group, step, stream);
#else
  random_words(radius, angle, groups, seed, first_group, step, stream);
#endif
  box_muller_chunk(z, radius, angle, 2 * groups);
}

DDPM_CLONES void guide_chunk(float* cond, const float* uncond, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) cond[i] = guide(cond[i], uncond[i], scale);
}

DDPM_CLONES void posterior_chunk(float* y, const float* x, const float* out, const float* z,
                                 Coefficients k, float limit, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = posterior(x[i], out[i], z[i], k, limit);
}

// The sum of weighted distances and, unless grad is null, scale times the derivative of each.
template <int64_t KIND, class T>
DDPM_HD T loss_sum(T* grad, const T* pred, const T* target, const float* w, T scale, int64_t n) {
  T sum = 0;
  if (!grad) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += w[i] * distance<KIND>(pred[i] - target[i]);
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T diff = pred[i] - target[i];
    sum += w[i] * distance<KIND>(diff);
    grad[i] = scale * w[i] * distance_grad<KIND>(diff);
  }
  return sum;
}

#define DDPM_LOSS_CHUNKS(T)                                                                       \
  DDPM_CLONES T loss_chunk(int64_t kind, T* grad, const T* pred, const T* target, const float* w, \
                           T scale, int64_t n) {                                                  \
    if (kind == L2) return loss_sum<L2, T>(grad, pred, target, w, scale, n);                      \
    if (kind == L1) return loss_sum<L1, T>(grad, pred, target, w, scale, n);                      \
    return loss_sum<HUBER, T>(grad, pred, target, w, scale, n);                                   \
  }
DDPM_LOSS_CHUNKS(float)
DDPM_LOSS_CHUNKS(double)

DDPM_CLONES float sum_chunk(const float* w, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += w[i];
  return sum;
}

DDPM_CLONES void read_bytes(float* w, const uint8_t* mask, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) w[i] = mask[i];
}

DDPM_CLONES void read_bools(float* w, const uint8_t* mask, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    w[i] = mask[i] != 0;  // a view of other bytes may hold more than 1
}

DDPM_CLONES void weight_chunk(float* w, const float* cond, float cond_weight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) w[i] = mask_weight<float>(w[i], cond[i], cond_weight);
}

// Numbers `stride` apart. With a constant one, that of contiguous images or of channels_last ones
// of three channels, the loop becomes loads of whole vectors, and permutations.
#define DDPM_GATHER(T, Acc)                                                               \
  DDPM_CLONES void gather(Acc* to, const T* from, int64_t stride, int64_t n) {            \
    if (stride == 1)                                                                      \
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Acc>(from[i]);                  \
    else if (stride == 3)                                                                 \
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Acc>(from[3 * i]);              \
    else                                                                                  \
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Acc>(from[i * stride]);         \
  }
DDPM_GATHER(float, float)
DDPM_GATHER(double, double)
DDPM_GATHER(at::BFloat16, float)
DDPM_GATHER(at::Half, float)

// Elements [begin, begin + n) of an image, in logical order, in `buffer` or where they lie if that
// is the same.
template <class T, class Acc>
const Acc* load(Acc* buffer, const T* image, const Layout& at, int64_t begin, int64_t n) {
  if constexpr (std::is_same_v<T, Acc>) {
    if (at.contiguous()) return image + begin;
  }
  for (int64_t i = 0; i < n;) {
    const int64_t c = (begin + i) / at.pixels, p = (begin + i) % at.pixels;
    const int64_t run = std::min(n - i, at.pixels - p);
    gather(buffer + i, image + c * at.channel_stride + p * at.pixel_stride, at.pixel_stride, run);
    i += run;
  }
  return buffer;
}

// Where to write them: in place if `store` would only copy, else `buffer`, to be stored afterwards.
template <class T, class Acc>
Acc* destination(Acc* buffer, T* image, const Layout& at, int64_t begin) {
  if constexpr (std::is_same_v<T, Acc>) {
    if (at.contiguous()) return image + begin;
  }
  return buffer;
}

template <class T, class Acc>
void store(T* image, const Acc* buffer, const Layout& at, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n;) {
    const int64_t c = (begin + i) / at.pixels, p = (begin + i) % at.pixels;
    const int64_t run = std::min(n - i, at.pixels - p);
    T* to = image + c * at.channel_stride + p * at.pixel_stride;
    for (int64_t j = 0; j < run; ++j) to[j * at.pixel_stride] = static_cast<T>(buffer[i + j]);
    i += run;
  }
}

at::Tensor posterior_step_cpu(const at::Tensor& x_t, const at::Tensor& out,
                              const std::optional<at::Tensor>& out_uncond, double guidance_scale,
                              const at::Tensor& coefficients, c10::SymInt given,
                              const std::optional<at::Tensor>& step, const at::Tensor& seeds,
                              int64_t stream, bool clip) {
  int64_t row = step ? 0 : given.expect_int();
  check_posterior_step(x_t, out, out_uncond, coefficients, row, step, seeds, stream);
  if (step) check_row(row = step->item<int64_t>(), coefficients);
  const at::Tensor x = dense(x_t), o = dense(out),
                   u = out_uncond ? dense(*out_uncond) : at::Tensor();
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;

  const float* c = coefficients.const_data_ptr<float>() + 5 * row;
  const Coefficients k{c[0], c[1], c[2], c[3], c[4]};
  const float limit = clip ? 1.0f : std::numeric_limits<float>::infinity();
  const int64_t image = x.numel() / x.size(0), chunks = (image + CHUNK - 1) / CHUNK;
  const Layout x_at = layout_of(x), o_at = layout_of(o), u_at = u.defined() ? layout_of(u) : o_at;
  const float* x_data = x.const_data_ptr<float>();
  float* y_data = y.mutable_data_ptr<float>();
  const at::Tensor seeds_dense = seeds.contiguous();
  const int64_t* seed = seeds_dense.const_data_ptr<int64_t>();

  const auto run = [&](auto type) {
    using T = decltype(type);
    const T* o_data = o.const_data_ptr<T>();
    const T* u_data = u.defined() ? u.const_data_ptr<T>() : nullptr;
    at::parallel_for(0, x.size(0) * chunks, CHUNKS_A_THREAD, [&](int64_t first, int64_t last) {
      alignas(64) float z[CHUNK] = {}, x_buffer[CHUNK], o_buffer[CHUNK], u_buffer[CHUNK],
                        y_buffer[CHUNK];
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / chunks, begin = task % chunks * CHUNK,
                      n = std::min(CHUNK, image - begin);
        if (k.s != 0) fill_normal(z, n, seed[b], begin / 4, row, stream);
        const float* xs = load(x_buffer, x_data + b * image, x_at, begin, n);
        const float* os = load(o_buffer, o_data + b * image, o_at, begin, n);
        if (u_data) {
          if (os != o_buffer)
            std::copy_n(os, n, o_buffer);  // guided in place, and not in the caller's tensor
          os = o_buffer;
          guide_chunk(o_buffer, load(u_buffer, u_data + b * image, u_at, begin, n), guidance_scale,
                      n);
        }
        float* ys = destination(y_buffer, y_data + b * image, x_at, begin);
        posterior_chunk(ys, xs, os, z, k, limit, n);
        if (ys == y_buffer) store(y_data + b * image, ys, x_at, begin, n);
      }
    });
  };
  if (o.scalar_type() == at::kFloat) run(float{});
  if (o.scalar_type() == at::kBFloat16) run(at::BFloat16{});
  if (o.scalar_type() == at::kHalf) run(at::Half{});
  return y;
}

// The per-pixel weights of a loss, read from masks of either dtype and either channel count. Always
// float32: they are small numbers, and the sums are not.
struct Weights {
  at::Tensor target, cond;
  float cond_weight;

  Weights(const std::optional<at::Tensor>& target_mask, const std::optional<at::Tensor>& cond_mask,
          double weight)
      : target(readable_mask(target_mask)),
        cond(readable_mask(cond_mask)),
        cond_weight(static_cast<float>(weight)) {}

  bool per_channel() const {
    return (target.defined() && target.size(1) > 1) || (cond.defined() && cond.size(1) > 1);
  }

  static void read(float* to, const at::Tensor& mask, int64_t b, int64_t c, int64_t p, int64_t n) {
    const int64_t channels = mask.size(1), pixels = mask.size(2) * mask.size(3);
    const int64_t at = (b * channels + (channels > 1 ? c : 0)) * pixels + p;
    if (is_bytes(mask)) {
      const auto read = mask.scalar_type() == at::kBool ? read_bools : read_bytes;
      return read(to, static_cast<const uint8_t*>(mask.const_data_ptr()) + at, n);
    }
    std::copy_n(mask.const_data_ptr<float>() + at, n, to);
  }

  void fill(float* w, int64_t b, int64_t c, int64_t p, int64_t n) const {
    if (!target.defined()) return std::fill_n(w, n, 1.0f), void();
    alignas(64) float seen[CHUNK];
    read(w, target, b, c, p, n);
    if (!cond.defined()) std::fill_n(seen, n, 0.0f);
    else read(seen, cond, b, c, p, n);
    weight_chunk(w, seen, cond_weight, n);
  }
};

int64_t count_tasks(int64_t images, const Layout& at) {
  return images * ((at.pixels + CHUNK - 1) / CHUNK);
}

// Calls visit(task, b, c, p, n, w) for every run of n pixels of one channel; w is filled once for
// all channels where the masks allow. One task is one pixel chunk of one image with all its
// channels.
template <class Visit>
void for_each_run(int64_t images, const Layout& at, const Weights& weights, const Visit& visit) {
  const int64_t chunks = (at.pixels + CHUNK - 1) / CHUNK;
  at::parallel_for(0, count_tasks(images, at), CHUNKS_A_THREAD, [&](int64_t first, int64_t last) {
    alignas(64) float w[CHUNK];
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / chunks, p = task % chunks * CHUNK,
                    n = std::min(CHUNK, at.pixels - p);
      for (int64_t c = 0; c < at.channels; ++c) {
        if (c == 0 || weights.per_channel()) weights.fill(w, b, c, p, n);
        visit(task, b, c, p, n, w);
      }
    }
  });
}

double sum_in_order(const std::vector<double>& parts) {
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

// The sum of all weights. It comes before the loss, so that the gradient can be written as it is.
double total_weight(int64_t images, Layout at, const Weights& weights) {
  if (!weights.target.defined()) return static_cast<double>(images * at.channels * at.pixels);
  const double channels =
      weights.per_channel() ? 1 : std::exchange(at.channels, 1);  // that one mask stands for
  std::vector<double> parts(count_tasks(images, at), 0.0);
  for_each_run(images, at, weights,
               [&](int64_t task, int64_t, int64_t, int64_t, int64_t n, const float* w) {
                 parts[task] += sum_chunk(w, n);
               });
  return channels * sum_in_order(parts);
}

std::tuple<at::Tensor, at::Tensor> masked_loss_cpu(const at::Tensor& pred_,
                                                   const at::Tensor& target_,
                                                   const std::optional<at::Tensor>& target_mask,
                                                   const std::optional<at::Tensor>& cond_mask,
                                                   double cond_weight, int64_t kind,
                                                   bool gradient) {
  check_masked_loss(pred_, target_, target_mask, cond_mask, kind);
  const LossViews views(pred_, target_.to(loss_dtype(pred_)), target_mask.has_value());
  const auto& [pred, target, images, p_at, t_at] = views;
  const auto options = pred.options().dtype(loss_dtype(pred));
  const at::Tensor grad = gradient ? at::empty_like(pred, options) : at::empty({0}, options);
  if (pred.numel() == 0) return {at::scalar_tensor(0, options), grad};
  const Weights weights(target_mask, cond_mask, cond_weight);
  const double sum = total_weight(images, p_at, weights), total = sum > 0 ? sum : 1;
  const int64_t image = p_at.channels * p_at.pixels;
  // One partial sum a task, added up in order below: the same bits for any number of threads.
  std::vector<double> losses(count_tasks(images, p_at), 0.0);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, pred.scalar_type(), "masked_loss", [&] {
    using acc_t = Wide<scalar_t>;
    const scalar_t* p_data = pred.const_data_ptr<scalar_t>();
    const acc_t* t_data = target.const_data_ptr<acc_t>();
    acc_t* g_data = gradient ? grad.mutable_data_ptr<acc_t>() : nullptr;
    const acc_t scale = static_cast<acc_t>(1 / total);
    for_each_run(images, p_at, weights,
                 [&](int64_t task, int64_t b, int64_t c, int64_t p, int64_t n, const float* w) {
                   alignas(64) acc_t p_buffer[CHUNK], t_buffer[CHUNK], g_buffer[CHUNK];
                   const int64_t begin = c * p_at.pixels + p;
                   const acc_t* ps = load(p_buffer, p_data + b * image, p_at, begin, n);
                   const acc_t* ts = load(t_buffer, t_data + b * image, t_at, begin, n);
                   acc_t* gs =
                       gradient ? destination(g_buffer, g_data + b * image, p_at, begin) : nullptr;
                   losses[task] += loss_chunk(kind, gs, ps, ts, w, scale, n);
                   if (gs == g_buffer) store(g_data + b * image, gs, p_at, begin, n);
                 });
  });
  return {at::scalar_tensor(sum_in_order(losses) / total, options), grad};
}

TORCH_LIBRARY_IMPL(fused_ddpm, CPU, m) {
  m.impl("posterior_step", posterior_step_cpu);
  m.impl("masked_loss", masked_loss_cpu);
}

}  // namespace fused_ddpm
