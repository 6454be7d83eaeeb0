"""What a device can do."""

import warnings

from fused_ddpm.files import UserError

import torch
import torch.nn as nn


def check_device(device):
    """UserError unless a tensor on it can be made and read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torch gives up
            torch.ones(1, device=device).item()
    except Exception as error:  # no driver, a module that is not installed, a name of nothing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {device}: {reason}") from error


def open_device(device, amp="auto", tf32=True):
    """Whether networks are to compute in bfloat16 there, as amp says. Raises UserError.

    tf32: whether a GPU may round matrix products.
    """
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.benchmark = True
    return amp == "on" or (amp == "auto" and multiplies_bfloat16(device))


def multiplies_bfloat16(device):
    """A GPU since Ampere, a CPU with instructions for it; else it is emulated, slowly."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()
    has = any(features.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return device == "cpu" and has


def round_weights(model):
    """Round to bfloat16, for good, the weights that autocast would round in each call.

    For sampling only, and from then on only under autocast.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.bfloat16()
