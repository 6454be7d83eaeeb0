// Schemas, and the Python module whose import registers them. Kernels: ops_cpu.cpp, ops_cuda.cu.
#include <Python.h>
#include <torch/library.h>

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

PyMODINIT_FUNC PyInit__fused_ddpm() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fused_ddpm", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
