"""What several test files use: configurations without a command line, and runs of a second."""

import json

from fused_ddpm.config import preset_values

import pytest
import torch
import torch.nn.functional as F

# Of a configuration, where a script has such a flag.
SMALL = dict(device="cpu", data="shapes", image_size=16, dim=8, dim_mults=[1, 2], num_timesteps=50)
SMALL |= dict(schedule="cosine", modes=8, batch_size=16, sample_steps=10, num_samples=4)

# On a command line: a run of six steps.
TINY = """--data shapes --image-size 16 --dim 8 --dim-mults 1 2 --batch-size 16 --sample-steps 4
--num-samples 4 --lr 1e-3 --save-every 2""".split()
OF_ITS_OWN = {
    "ddpm": "--num-timesteps 50",
    "sparse_ddpm": "--num-timesteps 50 --num-draws 2",
    "cfg_ddpm": "--num-timesteps 50 --guidance-sweep 2",
    "sparse_ddo": "--modes 8 --num-draws 2",
}


def with_modes(u, n):
    """Coefficients (..., m, m) as (..., n, n): zeros beside them."""
    more = n - u.shape[-1]
    return F.pad(u, (0, more, 0, more))


def make_config(script, **changes):
    """A script's Config: its preset small, made smaller still, on the CPU, with changes."""
    values = preset_values(script.Config, "small") | {"preset": "small", "out_dir": "out"}
    values |= {name: value for name, value in SMALL.items() if name in values}
    return script.Config(**values | changes)


def tiny_flags(script):
    return [*TINY, *OF_ITS_OWN[script.__name__].split()]


def run_tiny(script, out_dir, *flags):
    """A whole run, of six steps where flags say nothing else."""
    length = [] if "--epochs" in flags or "--steps" in flags else ["--steps", "6"]
    script.main([*tiny_flags(script), *length, "--out-dir", str(out_dir), *flags])


def read_json(path):
    return json.loads(path.read_text())


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Nested dicts and lists of tensors and plain values: to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def away_from_zero(net):
    """The network moved off its zero initialisation, which would hide everything."""
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return net


def exits_with(status, capsys, call):
    """What call() says when it ends with this status: its last line, for 1 without a traceback."""
    with pytest.raises(SystemExit) as error:
        call()
    shown = capsys.readouterr().err
    if status == 1:  # a message as the code: Python prints it and exits with 1
        assert isinstance(error.value.code, str) and "\n" not in error.value.code
        return error.value.code
    assert error.value.code == status
    return shown.strip().splitlines()[-1]
