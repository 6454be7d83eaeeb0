"""What a device can do."""

import torch

from fused_ddpm.files import UserError


def check_device(device):
    """UserError unless a tensor on it can be made and read."""
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # no driver, a module that is not installed, a name of nothing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {device}: {reason}") from error


def multiplies_bfloat16(device):
    """A GPU since Ampere, a CPU with instructions for it; else it is emulated, slowly."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)()
    has = any(features.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return device == "cpu" and has
