// Every per-element formula of the extension, once, for the CPU and the CUDA kernels.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace fused_ddpm {

DDPM_HD uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

DDPM_HD float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// ln u for normal u > 0, to about 1e-7 relative. libm's logf does not inline, so it would keep the
// compiler from vectorising the loop around it; the same holds for sincospi below.
DDPM_HD float log_positive(float u) {
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)), then ln m = 2 atanh((m - 1) / (m + 1)). With |s| <=
  // 0.1716 the first term left out is s^10 / 11 < 3e-9, relative.
  const uint32_t sqrt_half = 0x3f3504f3u, one = 0x3f800000u;
  const uint32_t shifted = float_bits(u) - sqrt_half + one;
  const int32_t e = static_cast<int32_t>(shifted >> 23) - 127;
  const float m = bits_float((shifted & 0x007fffffu) + sqrt_half);
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
  return static_cast<float>(e) * 0.69314718056f + 2.0f * s * series;
}

// sin(pi v) and cos(pi v) for |v| <= 1, to about 1e-7.
DDPM_HD void sincospi(float v, float* sin_out, float* cos_out) {
  // Nearest quarter turn q, then Taylor on |x| <= pi/4, where the terms left out are below 4e-10.
  const float q = rintf(2.0f * v);
  const int32_t quarter = static_cast<int32_t>(q);
  const float x = 3.14159265359f * (v - 0.5f * q), x2 = x * x;
  const float s =
      x *
      (1.0f + x2 * (-1.0f / 6 + x2 * (1.0f / 120 + x2 * (-1.0f / 5040 + x2 * (1.0f / 362880)))));
  const float c =
      1.0f +
      x2 * (-1.0f / 2 +
            x2 * (1.0f / 24 + x2 * (-1.0f / 720 + x2 * (1.0f / 40320 + x2 * (-1.0f / 3628800)))));
  const bool swap = quarter & 1;
  const float a = swap ? c : s, b = swap ? s : c;
  *sin_out = (quarter & 2) ? -a : a;
  *cos_out = ((quarter + 1) & 2) ? -b : b;
}

// e^x to about 1e-7 relative; beyond +-87 that of +-87.
DDPM_HD float exp_limited(float x) {
  x = x < -87.0f ? -87.0f : (x > 87.0f ? 87.0f : x);  // a NaN stays one
  // x = k ln 2 + r with |r| <= 0.347, ln 2 in two parts; then Taylor, whose first term left out is
  // below 2e-8.
  const float k = rintf(1.44269504f * x);
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  const float series =
      1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 +
                                          r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
  return series * bits_float(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
}

DDPM_HD double exp_limited(double x) { return exp(x); }

// u sigmoid(u), and its derivative.
template <class T>
DDPM_HD T silu(T u) {
  u = u < T(-1000) ? T(-1000) : u;  // e^x stops growing before that
  return u / (T(1) + exp_limited(-u));
}

template <class T>
DDPM_HD T silu_grad(T u) {
  u = u < T(-1000) ? T(-1000) : (u > T(1000) ? T(1000) : u);
  const T s = T(1) / (T(1) + exp_limited(-u));
  return s * (T(1) + u * (T(1) - s));
}

// Two standard normals from two random words (Box & Muller 1958), in float32.
DDPM_HD void box_muller(uint32_t w0, uint32_t w1, float* z0, float* z1) {
  // u in (0, 1]: never 0, so the logarithm is finite and |z| stays below 6.8.
  const float u = static_cast<float>(w0) * 0x1p-32f + 0x1p-33f;
  const float v = static_cast<float>(static_cast<int32_t>(w1)) * 0x1p-31f;  // in [-1, 1]
  const float r = sqrtf(-2.0f * log_positive(u));
  float s, c;
  sincospi(v, &s, &c);
  *z0 = r * c;
  *z1 = r * s;
}

// The four normals of elements 4 group .. 4 group + 3.
DDPM_HD void normal4(uint64_t seed, uint64_t group, uint32_t step, uint32_t stream, float z[4]) {
  const Random4 r = philox(seed, group, step, stream);
  box_muller(r.w[0], r.w[1], &z[0], &z[1]);
  box_muller(r.w[2], r.w[3], &z[2], &z[3]);
}

// One row of the coefficient table (see fused_ddpm.py).
struct Coefficients {
  float k_x, k_o, a, b, s;
};

// Classifier-free guidance: uncond + w (cond - uncond).
DDPM_HD float guide(float cond, float uncond, float scale) {
  return uncond + scale * (cond - uncond);
}

// x0_hat = clamp(k_x x_t + k_o out, -limit, limit); x_prev = a x0_hat + b x_t + s z. No clipping:
// limit = inf.
DDPM_HD float posterior(float x, float out, float z, const Coefficients& k, float limit) {
  float x0 = k.k_x * x + k.k_o * out;
  x0 = x0 < -limit ? -limit : (x0 > limit ? limit : x0);  // in this order a NaN stays a NaN
  return k.a * x0 + k.b * x + k.s * z;
}

enum LossKind : int64_t { L2 = 0, L1 = 1, HUBER = 2 };

// Per-pixel weight: min(target + cond_weight cond, 1).
template <class T>
DDPM_HD T mask_weight(T target, T cond, T cond_weight) {
  const T w = target + cond_weight * cond;
  return w > T(1) ? T(1) : w;
}

template <int64_t KIND, class T>
DDPM_HD T distance(T diff) {
  const T size = diff < T(0) ? -diff : diff;
  if (KIND == L2) return diff * diff;
  if (KIND == L1) return size;
  return size < T(1) ? T(0.5) * diff * diff : size - T(0.5);
}

template <int64_t KIND, class T>
DDPM_HD T distance_grad(T diff) {
  const T sign = diff > T(0) ? T(1) : (diff < T(0) ? T(-1) : diff);  // the last keeps 0 and NaN
  if (KIND == L2) return T(2) * diff;
  if (KIND == L1) return sign;
  return (diff < T(1) && diff > T(-1)) ? diff : sign;
}

}  // namespace fused_ddpm
