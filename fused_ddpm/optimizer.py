"""Adam with decoupled weight decay, and Muon, which learns the same in fewer steps."""

from fused_ddpm.fno import SpectralConv

import torch
import torch.nn as nn

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of Jordan et al.: five times takes (0.01, 1] to about 1


def make_optimizer(model, config):
    """The one named by config.optimizer, with its lr and weight_decay."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adam":
        return torch.optim.AdamW(model.parameters(), **options)
    kernels, kinds = [], (nn.Conv2d, SpectralConv)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not name.startswith(("stem", "lift", "out")):
            kernels.append(module.weight)
    others = [p for p in model.parameters() if all(p is not kernel for kernel in kernels)]
    return Muon([{"params": others}, {"params": kernels, "momentum": 0.95}], **options)


class Muon(torch.optim.AdamW):
    """AdamW; but of a group with a momentum each parameter, as a matrix (C_out, everything else),
    takes steps along the momentum with all its singular values made equal. So a rare direction is
    learnt as fast as a common one.

    Jordan et al. 2024, "Muon"; steps are of the size of Adam's (Liu et al. 2025), so that lr and
    weight decay mean the same for both.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "momentum" in group:
                self._orthogonal_step(group)
        super().step()  # of all that still has a gradient

    def _orthogonal_step(self, group):
        params = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in params]
        for p in params:
            if not self.state[p]:  # step: AdamW looks for it when it is loaded
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
        kept = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(kept, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, kept, group["momentum"])  # Nesterov's
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, x in zip(params, orthogonalized([x.flatten(1) for x in ahead]), strict=True):
            p.add_(x.view(p.shape), alpha=-0.2 * max(x.shape) ** 0.5 * group["lr"])
            p.grad = None


def orthogonalized(matrices):
    """Each U S V^T with S near 1 (0.7 to 1.2), but where it was under a hundredth of its norm.

    Newton-Schulz's iteration x <- (a + b x x^T + c (x x^T)^2) x. What stands before x is a
    polynomial of the small matrix x x^T, and is computed from that alone, for all of a size at
    once. In float64 on a GPU, where products of float32 may be rounded too coarsely for that.
    """
    wide = [x if x.shape[0] <= x.shape[1] else x.T for x in matrices]
    a, b, c = NEWTON_SCHULZ
    found = [None] * len(wide)
    for n in {len(x) for x in wide}:
        which = [i for i, x in enumerate(wide) if len(x) == n]
        dtype = torch.float64 if wide[which[0]].is_cuda else torch.float32
        gram = torch.stack([wide[i].to(dtype) @ wide[i].T.to(dtype) for i in which])
        square = gram.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1).clamp(min=1e-30)
        gram, unit = gram / square, torch.eye(n, dtype=dtype, device=gram.device)
        before = square.rsqrt() * unit
        for _ in range(5):
            factor = a * unit + b * gram + c * (gram @ gram)
            before, gram = factor @ before, factor @ gram @ factor
        for i, matrix in zip(which, before, strict=True):
            x = matrix.to(wide[i].dtype) @ wide[i]
            found[i] = x if wide[i] is matrices[i] else x.T
    return found
