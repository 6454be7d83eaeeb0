"""What the scripts share. The fused operations and their noise are here by name:

    from fused_ddpm import posterior_step, masked_loss, norm_silu, seeded_normal, graphed

The rest is in modules, one idea each: unet, fno, masks, fill, config, runs, checkpoints, images,
samples, pictures, metrics. `fused_ddpm.status()` says which backend runs, and why.
"""

from fused_ddpm.interrupt import imported  # isort: skip, before torch
from fused_ddpm.graphs import graphed
from fused_ddpm.noise import seeded_integers, seeded_uniform
from fused_ddpm.ops import masked_loss, norm_silu, posterior_step, seeded_normal, status

imported()

__all__ = [
    "graphed",
    "masked_loss",
    "norm_silu",
    "posterior_step",
    "seeded_integers",
    "seeded_normal",
    "seeded_uniform",
    "status",
]
