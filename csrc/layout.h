// Shapes and strides, checked once for both backends.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace fused_ddpm {

// Inside one image, element (channel c, pixel p) lies at c * channel_stride + p * pixel_stride.
// That covers contiguous and channels_last, so a channels_last network output is read where it
// lies, without a copy.
struct Layout {
  int64_t channels, pixels, channel_stride, pixel_stride;
  bool vector = false;  // four neighbours may be read at once, which the CUDA kernels find out

  bool contiguous() const { return pixel_stride == 1 && channel_stride == pixels; }
};

inline bool is_channels_last(const at::Tensor& t) {
  return t.dim() == 4 && !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// Dense in one of the two layouts; anything else (a slice, an expanded tensor) is copied.
inline at::Tensor dense(const at::Tensor& t) { return is_channels_last(t) ? t : t.contiguous(); }

inline Layout layout_of(const at::Tensor& t) {
  if (t.dim() != 4) {
    const int64_t n = t.numel() == 0 || t.dim() == 0 ? t.numel() : t.numel() / t.size(0);
    return {1, n, n, 1};
  }
  const int64_t c = t.size(1), p = t.size(2) * t.size(3);
  return is_channels_last(t) ? Layout{c, p, 1, c} : Layout{c, p, p, 1};
}

inline void check_like(const at::Tensor& t, const at::Tensor& like, const char* op,
                       const char* name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " is on ", t.device(),
                    ", expected ", like.device());
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), op, ": ", name, " has shape ", t.sizes(),
                    ", expected ", like.sizes());
}

inline void check_row(int64_t row, const at::Tensor& coefficients) {
  TORCH_CHECK_INDEX(row >= 0 && row < coefficients.size(0), "posterior_step: step ", row,
                    " is outside 0..", coefficients.size(0) - 1);
}

inline void check_posterior_step(const at::Tensor& x_t, const at::Tensor& out,
                                 const std::optional<at::Tensor>& out_uncond,
                                 const at::Tensor& coefficients, int64_t row,
                                 const std::optional<at::Tensor>& step, const at::Tensor& seeds,
                                 int64_t stream) {
  const char* op = "posterior_step";
  TORCH_CHECK_VALUE(x_t.dim() >= 1, op, ": x_t needs a batch dimension");
  TORCH_CHECK_TYPE(x_t.scalar_type() == at::kFloat, op, ": x_t must be float32, got ",
                   x_t.scalar_type());
  check_like(out, x_t, op, "out");
  TORCH_CHECK_TYPE(out.scalar_type() == at::kFloat || out.scalar_type() == at::kBFloat16 ||
                       out.scalar_type() == at::kHalf,
                   op, ": out must be float32, bfloat16 or float16, got ", out.scalar_type());
  if (out_uncond) {
    check_like(*out_uncond, x_t, op, "out_uncond");
    TORCH_CHECK_TYPE(out_uncond->scalar_type() == out.scalar_type(), op,
                     ": out_uncond must have the dtype of out");
  }
  TORCH_CHECK_VALUE(
      coefficients.dim() == 2 && coefficients.size(1) == 5 && coefficients.size(0) > 0 &&
          coefficients.scalar_type() == at::kFloat && coefficients.is_contiguous(),
      op, ": coefficients must be contiguous float32 of shape (steps, 5)");
  TORCH_CHECK_VALUE(!step || (step->numel() == 1 && step->scalar_type() == at::kLong), op,
                    ": step must be one int64");
  check_row(row, coefficients);
  TORCH_CHECK_VALUE(
      seeds.dim() == 1 && seeds.size(0) == x_t.size(0) && seeds.scalar_type() == at::kLong, op,
      ": seeds must be int64 of shape (", x_t.size(0), ",)");
  TORCH_CHECK_VALUE(coefficients.device() == x_t.device() && seeds.device() == x_t.device() &&
                        (!step || step->device() == x_t.device()),
                    op, ": coefficients, step and seeds must be on ", x_t.device());
  TORCH_CHECK_VALUE(stream >= 0 && stream <= UINT32_MAX, op, ": stream ", stream, " is outside 0..",
                    UINT32_MAX);
}

inline void check_mask(const at::Tensor& mask, const at::Tensor& pred, const char* name) {
  const char* op = "masked_loss";
  TORCH_CHECK_VALUE(mask.device() == pred.device(), op, ": ", name, " is on ", mask.device(),
                    ", expected ", pred.device());
  TORCH_CHECK_VALUE(pred.dim() == 4 && mask.dim() == 4 && mask.size(0) == pred.size(0) &&
                        (mask.size(1) == 1 || mask.size(1) == pred.size(1)) &&
                        mask.size(2) == pred.size(2) && mask.size(3) == pred.size(3),
                    op, ": ", name, " has shape ", mask.sizes(),
                    ", expected (B, 1, H, W) or (B, C, H, W) for pred ", pred.sizes());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || mask.scalar_type() == at::kByte ||
                       mask.scalar_type() == at::kFloat || mask.scalar_type() == at::kDouble,
                   op, ": ", name, " must be bool, uint8 or float, got ", mask.scalar_type());
}

inline void check_masked_loss(
    const at::Tensor& pred, const at::Tensor& target, const std::optional<at::Tensor>& target_mask,
    const std::optional<at::Tensor>& cond_mask, int64_t kind) {
  check_like(target, pred, "masked_loss", "target");
  TORCH_CHECK_TYPE(pred.is_floating_point() && target.is_floating_point(),
                   "masked_loss: pred and target must be floating point");
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 2,
                    "masked_loss: kind must be 0 (l2), 1 (l1) or 2 (huber)");
  TORCH_CHECK_VALUE(target_mask || !cond_mask, "masked_loss: cond_mask needs a target_mask");
  if (target_mask) check_mask(*target_mask, pred, "target_mask");
  if (cond_mask) check_mask(*cond_mask, pred, "cond_mask");
}

inline at::ScalarType loss_dtype(const at::Tensor& pred) {
  return pred.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // what is computed in

// A mask as the kernels read it: bytes, of which bool counts as 0 or 1, or float32.
inline at::Tensor readable_mask(const std::optional<at::Tensor>& mask) {
  if (!mask) return at::Tensor();
  const at::Tensor m = mask->contiguous();
  return m.scalar_type() == at::kDouble ? m.to(at::kFloat) : m;
}

inline bool is_bytes(const at::Tensor& mask) { return mask.scalar_type() != at::kFloat; }

// Pred and target of a loss as images of channels of pixels. Without masks any shape will do, and
// all of it is one image.
struct LossViews {
  at::Tensor pred, target;
  int64_t images;
  Layout p_at, t_at;

  LossViews(const at::Tensor& pred_, const at::Tensor& target_, bool masked)
      : pred(dense(pred_)),
        target(dense(target_)),
        images(1),
        p_at(layout_of(pred)),
        t_at(layout_of(target)) {
    if (masked || !p_at.contiguous() || !t_at.contiguous()) {
      images = pred.size(0);
    } else {
      p_at = t_at = Layout{1, pred.numel(), pred.numel(), 1};
    }
  }
};

}  // namespace fused_ddpm
