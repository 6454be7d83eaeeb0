// What the CPU and the CUDA kernels of norm_silu have in common.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "ddpm_math.h"
#include "layout.h"

namespace fused_ddpm {

// Of x, weight, bias, scale, shift; the last two of no elements where there are none.
using NormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline void check_norm_silu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& shift, int64_t groups) {
  const char* op = "norm_silu";
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x has shape ", x.sizes(), ", expected (B, C, H, W)");
  TORCH_CHECK_TYPE(x.is_floating_point(), op, ": x must be floating point, got ", x.scalar_type());
  TORCH_CHECK_VALUE(groups > 0 && x.size(1) % groups == 0, op, ": ", x.size(1),
                    " channels are not ", groups, " groups");
  for (const at::Tensor& t : {weight, bias})
    TORCH_CHECK_VALUE(t.device() == x.device() && t.dim() == 1 && t.size(0) == x.size(1), op,
                      ": weight and bias must have shape (", x.size(1), ",) and be on ",
                      x.device());
  TORCH_CHECK_VALUE(scale.has_value() == shift.has_value(), op, ": scale and shift go together");
  for (const auto& t : {scale, shift})
    TORCH_CHECK_VALUE(!t || (t->device() == x.device() && t->dim() == 2 &&
                             t->size(0) == x.size(0) && t->size(1) == x.size(1)),
                      op, ": scale and shift must have shape (", x.size(0), ", ", x.size(1),
                      ") and be on ", x.device());
}

inline at::TensorOptions wide_options(const at::Tensor& x) {
  return at::TensorOptions(x.device()).dtype(loss_dtype(x));
}

inline void check_stats(const at::Tensor& stats, const at::Tensor& x, int64_t groups) {
  TORCH_CHECK_VALUE(stats.device() == x.device() && stats.is_contiguous() &&
                        stats.numel() == x.size(0) * groups * 2 &&
                        stats.scalar_type() == loss_dtype(x),
                    "norm_silu: stats are of another x");
}

// What the kernels read beside x.
template <class T>
struct NormNumbers {
  const T *weight, *bias, *scale, *shift;  // (C,) and (B, C); the last two null if there are none
  int64_t channels, pixels;
  int groups, group;  // how many, and of how many channels
  double each;        // 1 / (values in a group)

  // What the normalised x is multiplied with, and what is added, for channel c of image b.
  DDPM_HD T weighted(int64_t b, int64_t c) const {
    return weight[c] * (scale ? 1 + scale[b * channels + c] : T(1));
  }
  DDPM_HD T added(int64_t b, int64_t c) const {
    const int64_t i = b * channels + c;
    return bias[c] * (scale ? 1 + scale[i] : T(1)) + (shift ? shift[i] : T(0));
  }
};

// The same with the tensors it lies in: contiguous T.
template <class T>
struct NormInputs : NormNumbers<T> {
  at::Tensor tensors[4];

  NormInputs(
      const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
      const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
      int64_t groups)
      : tensors{read(weight), read(bias), read(scale), read(shift)} {
    const auto data = [](const at::Tensor& t) {
      return t.defined() ? t.const_data_ptr<T>() : nullptr;
    };
    const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3), group = channels / groups;
    static_cast<NormNumbers<T>&>(*this) = {
        data(tensors[0]), data(tensors[1]), data(tensors[2]), data(tensors[3]), channels, pixels,
        static_cast<int>(groups), static_cast<int>(group), 1.0 / (pixels * group)};
  }

  static at::Tensor read(const std::optional<at::Tensor>& t) {
    return t ? t->to(c10::CppTypeToScalarType<T>::value).contiguous() : at::Tensor();
  }
};

// From sums (2, B, C) over the pixels: of du, the gradient of silu's argument, and of du times the
// normalised x.
inline NormGradients norm_gradients(
    const at::Tensor& dx, const at::Tensor& sums, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& scale) {
  const at::Tensor shifted = sums[0], scaled = sums[1], w = weight.to(sums.scalar_type()),
                   b = bias.to(sums.scalar_type());
  const auto none = [&] { return at::empty({0}, sums.options()); };
  if (!scale) return {dx, scaled.sum(0), shifted.sum(0), none(), none()};
  const at::Tensor factor = scale->to(sums.scalar_type()) + 1;
  return {dx, (factor * scaled).sum(0), (factor * shifted).sum(0), w * scaled + b * shifted,
          shifted.clone()};
}

}  // namespace fused_ddpm
