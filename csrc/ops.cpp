// Schemas, the gradient of the masked loss, and the Python module whose import registers them.
// Kernels: ops_cpu.cpp, ops_cuda.cu.
#include <ATen/TensorSubclassLikeUtils.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> below_autograd(
    const Tensor& pred, const Tensor& target, const std::optional<Tensor>& target_mask,
    const std::optional<Tensor>& cond_mask, double cond_weight, int64_t kind, bool gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_ddpm::masked_loss", "")
                             .typed<std::tuple<Tensor, Tensor>(
                                 const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                 const std::optional<Tensor>&, double, int64_t, bool)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(pred, target, target_mask, cond_mask, cond_weight, kind, gradient);
}

// In C++, because registered from Python it costs a quarter of a millisecond a call, more than the
// kernels themselves.
struct MaskedLoss : public torch::autograd::Function<MaskedLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& pred, const Tensor& target,
                               const std::optional<Tensor>& target_mask,
                               const std::optional<Tensor>& cond_mask, double cond_weight,
                               int64_t kind, Tensor* gradient_out) {
    const auto [loss, gradient] =
        below_autograd(pred, target, target_mask, cond_mask, cond_weight, kind, true);
    *gradient_out = gradient;  // past autograd, which differentiates once
    ctx->save_for_backward({gradient});
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "masked_loss has no second derivative (create_graph=True)");
    const Tensor &grad = grads[0], gradient = ctx->get_saved_variables()[0];
    // Where it is known to be 1, and nobody will ask again, the gradient is given away as it lies.
    const bool is_one = grad.is_cpu() && !at::isTensorSubclassLike(grad) &&
                        !torch::autograd::get_current_graph_task_keep_graph() &&
                        grad.item<double>() == 1;
    const Tensor grad_pred =
        is_one ? gradient : gradient.mul(grad);  // float32: autograd casts to each input's dtype
    const Tensor grad_target = ctx->needs_input_grad(1) ? grad_pred.neg() : Tensor();
    return {grad_pred, grad_target, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> masked_loss_autograd(
    const Tensor& pred, const Tensor& target, const std::optional<Tensor>& target_mask,
    const std::optional<Tensor>& cond_mask, double cond_weight, int64_t kind, bool gradient) {
  TORCH_CHECK_NOT_IMPLEMENTED(!pred._fw_grad(0).defined() && !target._fw_grad(0).defined(),
                              "masked_loss has no forward-mode derivative");
  if (!at::GradMode::is_enabled() || !(pred.requires_grad() || target.requires_grad()))
    return below_autograd(pred, target, target_mask, cond_mask, cond_weight, kind, gradient);
  Tensor made;
  const variable_list loss =
      MaskedLoss::apply(pred, target, target_mask, cond_mask, cond_weight, kind, &made);
  return {loss[0], made};
}

using Norms = std::tuple<Tensor, Tensor>;  // y, and mean and 1 / std of each image's groups
using NormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

Norms norm_below_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias,
                          const Maybe& scale, const Maybe& shift, int64_t groups, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_ddpm::norm_silu", "")
                             .typed<Norms(const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                                          const Maybe&, int64_t, double)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias, scale, shift, groups, eps);
}

struct NormSilu : public torch::autograd::Function<NormSilu> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, const Maybe& scale, const Maybe& shift,
                               int64_t groups, double eps) {
    const auto [y, stats] = norm_below_autograd(x, weight, bias, scale, shift, groups, eps);
    ctx->save_for_backward(
        {x, weight, bias, scale.value_or(Tensor()), shift.value_or(Tensor()), stats});
    ctx->saved_data["groups"] = groups;
    ctx->mark_non_differentiable({stats});
    return {y, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "norm_silu has no second derivative (create_graph=True)");
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fused_ddpm::norm_silu_backward", "")
            .typed<NormGradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Maybe&, const Maybe&, const Tensor&, int64_t)>();
    const variable_list saved = ctx->get_saved_variables();
    const Maybe scale = saved[3].defined() ? Maybe(saved[3]) : Maybe(),
                shift = saved[4].defined() ? Maybe(saved[4]) : Maybe();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const auto [x, weight, bias, by_scale, by_shift] =
        op.call(grads[0], saved[0], saved[1], saved[2], scale, shift, saved[5], groups);
    return {x,        weight,  bias, scale ? by_scale : Tensor(), scale ? by_shift : Tensor(),
            Tensor(), Tensor()};
  }
};

Norms norm_silu_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias,
                         const Maybe& scale, const Maybe& shift, int64_t groups, double eps) {
  TORCH_CHECK_NOT_IMPLEMENTED(!x._fw_grad(0).defined(), "norm_silu has no forward-mode derivative");
  const variable_list made = NormSilu::apply(x, weight, bias, scale, shift, groups, eps);
  return {made[0], made[1]};
}

}  // namespace

TORCH_LIBRARY(fused_ddpm, m) {
  // Of coefficients the row, or that which step holds: a step on the device can change in a graph.
  m.def(
      "posterior_step(Tensor x_t, Tensor out, Tensor? out_uncond, float guidance_scale, Tensor "
      "coefficients, "
      "SymInt row, Tensor? step, Tensor seeds, int stream, bool clip) -> Tensor");
  // The loss, and d loss / d pred in its dtype: where autograd or the flag asks for it, else of no
  // elements.
  m.def(
      "masked_loss(Tensor pred, Tensor target, Tensor? target_mask, Tensor? cond_mask, float "
      "cond_weight, int kind, "
      "bool gradient) -> (Tensor, Tensor)");
  // Also the mean and 1 / standard deviation of each image's groups, (B, groups, 2), which the
  // gradients need.
  m.def(
      "norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, "
      "float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, "
      "Tensor? shift, Tensor stats, "
      "int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_weights(Tensor covariance, Tensor mask, Tensor off) -> Tensor");  // of a CPU only
}

TORCH_LIBRARY_IMPL(fused_ddpm, Autograd, m) {
  m.impl("masked_loss", masked_loss_autograd);
  m.impl("norm_silu", norm_silu_autograd);
}

PyMODINIT_FUNC PyInit__fused_ddpm() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused_ddpm", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
