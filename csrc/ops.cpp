// Schemas, the gradient of the masked loss, and the Python module whose import registers them. Kernels: ops_cpu.cpp, ops_cuda.cu.
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In C++, because registered from Python it costs a quarter of a millisecond a call, more than the kernels themselves.
struct MaskedLoss : public torch::autograd::Function<MaskedLoss> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& pred, const Tensor& target, const std::optional<Tensor>& target_mask,
      const std::optional<Tensor>& cond_mask, double cond_weight, int64_t kind, Tensor* total_out) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_ddpm::masked_loss", "")
                               .typed<std::tuple<Tensor, Tensor>(
                                   const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                   const std::optional<Tensor>&, double, int64_t)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [loss, total] = op.call(pred, target, target_mask, cond_mask, cond_weight, kind);
    *total_out = total;  // past autograd: it is no function of pred
    ctx->save_for_backward({pred, target, target_mask.value_or(Tensor()), cond_mask.value_or(Tensor()), total});
    ctx->saved_data["cond_weight"] = cond_weight;
    ctx->saved_data["kind"] = kind;
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_ddpm::masked_loss_backward", "")
                               .typed<Tensor(
                                   const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                   const std::optional<Tensor>&, const Tensor&, double, int64_t)>();
    TORCH_CHECK(!at::GradMode::is_enabled(), "masked_loss has no second derivative (create_graph=True)");
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
    const Tensor grad_pred = op.call(
        grads[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]), saved[4],
        ctx->saved_data["cond_weight"].toDouble(), ctx->saved_data["kind"].toInt());
    const Tensor grad_target = ctx->needs_input_grad(1) ? -grad_pred.to(saved[1].scalar_type()) : Tensor();
    return {grad_pred, grad_target, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> masked_loss_autograd(
    const Tensor& pred, const Tensor& target, const std::optional<Tensor>& target_mask,
    const std::optional<Tensor>& cond_mask, double cond_weight, int64_t kind) {
  Tensor total;
  const variable_list loss = MaskedLoss::apply(pred, target, target_mask, cond_mask, cond_weight, kind, &total);
  return {loss[0], total};
}

}  // namespace

TORCH_LIBRARY(fused_ddpm, m) {
  m.def(
      "posterior_step(Tensor x_t, Tensor out, Tensor? out_uncond, float guidance_scale, Tensor coefficients, "
      "Tensor step, Tensor seeds, int stream, bool clip) -> Tensor");
  m.def(
      "masked_loss(Tensor pred, Tensor target, Tensor? target_mask, Tensor? cond_mask, float cond_weight, int kind) "
      "-> (Tensor, Tensor)");
  m.def(
      "masked_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor? target_mask, Tensor? cond_mask, "
      "Tensor total, float cond_weight, int kind) -> Tensor");
}

TORCH_LIBRARY_IMPL(fused_ddpm, Autograd, m) { m.impl("masked_loss", masked_loss_autograd); }

PyMODINIT_FUNC PyInit__fused_ddpm() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused_ddpm", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
