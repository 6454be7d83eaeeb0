"""What the scripts share; nothing here calls anything of theirs. The fused operations by name:

    from fused_ddpm import posterior_step, masked_loss, norm_silu, seeded_normal, graphed

The rest is in modules, one idea each:

    ops, noise, graphs                the fused ops, in PyTorch too; Philox; steps as one CUDA graph
    unet, fno, optimizer              the networks; Muon, and Adam
    grids, points                     functions on grids; points of them, set convolution, kriging
    features                          networks that evaluate.py compares images in
    masks, linear, fill               who sees what; the first guess; filling in without a network
    metrics, results                  PSNR, SSIM, calibration, intervals; what sparse scripts leave
    config, runs, devices, processes  a dataclass as a command line; a run; torchrun
    interrupt                         Ctrl-C while torch is still being imported
    tracking                          --log tensorboard, wandb or trackio
    files, checkpoints, samples       whole or not at all; checked before use; filled as it goes
    images, shapes                    data sets; one that is drawn here
    pixels, folders                   a file with pixels missing, in and out; folders of them
    tiles, filled                     images of any size in tiles; what fill_images.py leaves
    pictures                          grids, sheets, curves

`fused_ddpm.status()` says which backend runs, and why.
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
