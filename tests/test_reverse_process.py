"""The loop around network and step: its CUDA graph as far as a CPU can show it, and scripts on a GPU that is not there."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cfg_ddpm
import ddpm
import fused_ddpm
import sparse_ddo
import sparse_ddpm
from fused_ddpm import posterior_step, reverse_process, seeded_normal

TINY = "--image-size 16 --dim 8 --dim-mults 1 2 --batch-size 4 --sample-steps 5 --num-samples 6".split()


class Recorder(TorchDispatchMode):
    """What a CUDA graph is: a list of operations on tensors at fixed addresses. Reading a value on the host is an error."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.calls:
            new = op(*args, **kwargs)
            for to, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(to, torch.Tensor) and to.data_ptr() != value.data_ptr():
                    to.copy_(value)


@pytest.fixture
def recorded(monkeypatch):
    """Capture by a Recorder; returns the list of recordings."""
    recordings = []

    def capture(body, warm_up, device):
        for _ in range(3):
            warm_up()
        kept = Recorder()
        with kept:
            body()
        recordings.append(kept)
        return kept.replay

    monkeypatch.setattr(fused_ddpm, "_capture", capture)
    return recordings


def mean_step(x_t, step, seeds):
    table = torch.tensor([[1.0, 0.0, 0.5, 0.4, 0.3]]).repeat(4, 1)
    return posterior_step(x_t, x_t.tanh(), table, step, seeds)


def test_steps_in_order():
    seeds = torch.arange(2)
    x = expected = seeded_normal(seeds, (1, 4, 4))
    seen = []
    last = reverse_process(mean_step, x, 4, [seeds], lambda x_t: seen.append(x_t.clone()))
    for step, x_t in enumerate(seen):
        expected = mean_step(expected, step, seeds)
        assert torch.equal(x_t, expected)
    assert len(seen) == 4 and torch.equal(last, seen[-1])
    assert torch.equal(x, seeded_normal(seeds, (1, 4, 4)))  # the start is left as it was


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_replayed_graph_equals_eager_steps(recorded, layout):
    net, graphs = torch.nn.Conv2d(3, 3, 3, padding=1), {}
    table = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))

    def step_of(x_t, step, seeds, cond):
        return posterior_step(x_t, net(x_t) + cond * step, table, step, seeds)

    with torch.no_grad():
        for batch, n in [(0, 6), (1, 6), (2, 2)]:  # other values, and another length, through the same graph
            seeds, cond = torch.arange(2) + 10 * batch, torch.full((2, 3, 1, 1), 0.1 * batch)
            x = expected = seeded_normal(seeds, (3, 8, 8)).contiguous(memory_format=layout)
            for step in range(n):
                expected = step_of(expected, torch.tensor([step]), seeds, cond)
            torch.testing.assert_close(reverse_process(step_of, x, n, [seeds, cond], graphs=graphs), expected)
        assert len(recorded) == 1
        reverse_process(step_of, x[:1], n, [seeds[:1], cond[:1]], graphs=graphs)
    assert len(recorded) == len(graphs) == 2  # another shape, another graph


def test_a_single_step_survives_the_warm_up(recorded):
    table, seeds = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]]), torch.arange(3)
    step_of = lambda x_t, step, seeds: posterior_step(x_t, torch.full_like(x_t, 0.5), table, step, seeds)
    x = reverse_process(step_of, torch.zeros(3, 1, 4, 4), 1, [seeds])
    assert (x == 0.5).all()


def test_graphs_keep_what_they_refer_to(recorded):
    graphs, alive = {}, []

    def sample_once(seeds):
        table = torch.rand(2, 5)
        alive.append(weakref.ref(table))
        recorded_step = lambda x_t, step, seeds: posterior_step(x_t, x_t, table, step, seeds)
        reverse_process(recorded_step, torch.zeros(3, 1, 4, 4), 2, [seeds], graphs=graphs)
        recorded.clear()  # a CUDA graph holds addresses, not tensors
        for key, (*rest, _, body) in graphs.items():
            graphs[key] = (*rest, lambda: None, body)

    sample_once(torch.arange(3))
    assert alive[0]() is not None


def test_a_failed_capture_warns_and_goes_on_step_by_step(monkeypatch):
    def fail(body, warm_up, device):
        with Recorder():
            warm_up()

    host_read = lambda x_t, step, seeds: mean_step(x_t, int(step), seeds)
    seeds = torch.arange(2)
    expected = reverse_process(host_read, torch.ones(2, 1, 4, 4), 3, [seeds])
    monkeypatch.setattr(fused_ddpm, "_capture", fail)
    monkeypatch.setattr(fused_ddpm, "_failed_captures", [])  # so that other tests may still capture
    with pytest.warns(UserWarning, match="sampling without a CUDA graph: operation not permitted when stream is capturing$"):
        slow = reverse_process(host_read, torch.ones(2, 1, 4, 4), 3, [seeds])
    assert torch.equal(slow, expected)


# -- the scripts ------------------------------------------------------------------------------------------------------------


def prepare(script, device, *flags):
    """(args, network, arguments of sample after the network, training data) on a device."""
    flags += ("--modes", "8") if script is sparse_ddo else ("--num-timesteps", "50", "--dropout", "0.1")
    args, _ = script.get_config([*TINY, *flags])
    changes = dict(device=device, use_amp=False, channels=3, class_names=list("abcd"), log_every=3, sample_every=99)
    vars(args).update(changes, train_size=16, grid_size=16, save_every=99, steps=6, epochs=0)
    labels, seeds = torch.zeros(4, dtype=torch.int64, device=device), torch.arange(4, device=device)
    images = torch.zeros(20, 3, 16, 16, dtype=torch.uint8, device=device)
    cond, cond_mask = torch.zeros(4, 3, 16, 16, device=device), torch.ones(4, 1, 16, 16, dtype=torch.bool, device=device)
    inputs, data = {
        ddpm: (((3, 16, 16), seeds), (images,)),
        cfg_ddpm: (((3, 16, 16), labels, seeds), (images, labels.repeat(5))),
        sparse_ddpm: ((cond, cond_mask, seeds), (images,)),
        sparse_ddo: ((cond, cond_mask, seeds), (images,)),
    }[script]
    unet = [3, 3, 16, 8, [1, 2], 1, [8], True, 0.1]
    unet = {cfg_ddpm: [*unet, 4], sparse_ddpm: [9, *unet[1:]], sparse_ddo: [3, 8, [1, 2], 1, 8, "encoder"]}.get(script, unet)
    with torch.device(device):
        return args, script.Unet(*unet), inputs, data


@pytest.mark.parametrize("script", [ddpm, sparse_ddpm, cfg_ddpm, sparse_ddo], ids=lambda module: module.__name__)
def test_a_captured_sampler_draws_the_same_images(script, monkeypatch, recorded):
    torch.manual_seed(0)
    args, net, inputs, _ = prepare(script, "cpu")
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    graphs = {}
    script.sample(net.eval(), *inputs, args, graphs=graphs)
    by_graph = script.sample(net, *inputs[:-1], inputs[-1] + 7, args, graphs=graphs)
    assert len(recorded) == 1
    monkeypatch.setattr(fused_ddpm, "_capture", lambda body, warm_up, device: body)
    torch.testing.assert_close(by_graph, script.sample(net, *inputs[:-1], inputs[-1] + 7, args), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(
    "script, reference", [(ddpm, True), (ddpm, False), (sparse_ddpm, False), (cfg_ddpm, False), (sparse_ddo, False)]
)
def test_nothing_waits_for_a_gpu(script, reference, monkeypatch, tmp_path):
    """On a GPU of shapes without values: all tensors meet on one device, and only the report reads a value on the host."""
    monkeypatch.setattr(fused_ddpm, "_capture", lambda body, warm_up, device: body)
    if reference:
        monkeypatch.setattr(fused_ddpm, "BACKENDS", ())
    updates = []
    monkeypatch.setattr(script, "update_ema", lambda *args: updates.append(args))
    with FakeTensorMode(allow_non_fake_inputs=True):
        args, net, inputs, data = prepare(script, "cuda", "--out-dir", str(tmp_path))
        x = script.sample(net, *inputs, args)
        assert x.shape == (4, 3, 16, 16) and x.device.type == "cuda"
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        state = {"step": 0, "history": {}, "losses": []}
        gradients = lambda loss: [setattr(p, "grad", torch.zeros_like(p)) for p in net.parameters()]
        monkeypatch.setattr(torch.Tensor, "backward", gradients)  # autograd's threads want a real GPU
        with pytest.raises(DataDependentOutputException):
            script.train(args, net, net, optimizer, *data, {}, state, [])
    assert len(updates) == args.log_every
