"""`graphed`, as far as a CPU can show it, and the scripts on a GPU of shapes without values."""

import contextlib
import weakref

import cfg_ddpm
import ddpm
import sparse_ddo
import sparse_ddpm
from fused_ddpm import graphed, graphs, linear, ops, points, posterior_step, seeded_normal
from fused_ddpm.fno import FnoUnet
from fused_ddpm.folders import Part
from fused_ddpm.runs import Run
from fused_ddpm.unet import Unet

import pytest
import torch
from helpers import away_from_zero, make_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCRIPTS = [ddpm, cfg_ddpm, sparse_ddpm, sparse_ddo]
by_name = dict(ids=lambda x: getattr(x, "__name__", None))


class Recorder(TorchDispatchMode):
    """What a CUDA graph is: a list of operations on tensors at fixed addresses.

    Reading a value on the host is an error.
    """

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
def captures(monkeypatch):
    """As if there were a GPU to capture on."""
    monkeypatch.setattr(graphs, "_failed_captures", [])  # and a test that fails to, only for itself
    monkeypatch.setattr(graphs, "_captures", lambda device: not graphs._failed_captures)


@pytest.fixture
def recorded(captures, monkeypatch):
    """Capture by a Recorder; returns the list of recordings."""
    recordings = []

    def capture(body, device):
        for _ in range(3):
            body()
        kept = Recorder()
        with kept:
            body()
        recordings.append(kept)
        return kept.replay

    monkeypatch.setattr(graphs, "_capture", capture)
    return recordings


TABLE = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))


def mean_step(x_t, step, seeds):
    return posterior_step(x_t, x_t.tanh(), TABLE, step, seeds)


# -- graphed ---------------------------------------------------------------------------------------


def test_on_a_cpu_it_is_the_function_itself():
    seen = []

    def reverse_step(x_t, step, seeds):
        """Words."""
        seen.append((x_t, step, seeds))
        return x_t + step

    call = graphed(reverse_step)
    x, seeds = torch.zeros(2, 1), torch.arange(2)
    assert (call(x, 3, seeds) == 3).all()
    assert (call.__name__, call.__doc__) == ("reverse_step", "Words.")
    assert seen[0][0] is x and seen[0][1] == 3 and seen[0][2] is seeds


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_replayed_graph_equals_eager_steps(recorded, layout):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 3, padding=1)

    def eager(x_t, step, seeds, cond):
        return posterior_step(x_t, net(x_t) + cond * step, TABLE, step, seeds)

    step_of = graphed(eager)
    with torch.no_grad():
        for batch, n in [(0, 6), (1, 6), (2, 2)]:  # other values, fewer steps: the same graph
            seeds, cond = torch.arange(2) + 10 * batch, torch.full((2, 3, 1, 1), 0.1 * batch)
            x = seeded_normal(seeds, (3, 8, 8)).contiguous(memory_format=layout)
            start, expected = x, x.clone()
            for step in range(n):
                expected = eager(expected, torch.tensor([step]), seeds, cond)
                x = step_of(x, step, seeds, cond)
                torch.testing.assert_close(x, expected)
                assert x.stride() == expected.stride()
            assert torch.equal(start, seeded_normal(seeds, (3, 8, 8)))  # is left as it was
        assert len(recorded) == 1
        one = step_of(x[:1], 0, seeds[:1], cond[:1])
        assert len(recorded) == 2  # another shape, another graph
        torch.testing.assert_close(one, eager(x[:1], 0, seeds[:1], cond[:1]))
        step_of(x, 0, seeds, cond)
        step_of(x[:1], 0, seeds[:1], cond[:1])
        assert len(recorded) == 2  # and both are kept


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :1],
    ],
    ids=["dtype", "strides", "layout", "shape"],
)
def test_every_kind_of_tensor_gets_a_graph_of_its_own(recorded, change):
    step_of = graphed(lambda x_t, step: x_t * 2)
    x = torch.rand(2, 3, 4, 4)
    for given in (x, change(x), x + 1, change(x + 1)):
        out = step_of(given, 0)
        assert torch.equal(out, given * 2) and out.dtype == given.dtype
    assert len(recorded) == 2


def test_the_step_reaches_it_as_a_tensor_on_the_device(recorded):
    seen = []

    def reverse_step(x_t, step):
        seen.append(step)
        return x_t + step

    step_of = graphed(reverse_step)
    values = [step_of(torch.zeros(2), step).tolist() for step in (5, 0, 3)]
    assert values == [[5, 5], [0, 0], [3, 3]]
    assert all(s.shape == (1,) and s.dtype == torch.int64 and s is seen[0] for s in seen)


def test_a_single_step_survives_the_warm_up(recorded):
    table, seeds = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]]), torch.arange(3)

    @graphed
    def step_of(x_t, step, seeds):
        return posterior_step(x_t, torch.full_like(x_t, 0.5), table, step, seeds)

    assert (step_of(torch.zeros(3, 1, 4, 4), 0, seeds) == 0.5).all()


def test_a_graph_keeps_what_it_refers_to(recorded):
    alive = []

    def make():
        table = torch.rand(2, 5)
        alive.append(weakref.ref(table))
        step_of = lambda x_t, step, seeds: posterior_step(x_t, x_t, table, step, seeds)
        return graphs._Graph(step_of, (torch.zeros(3, 1, 4, 4), torch.arange(3)))

    graph = make()
    recorded.clear()  # a CUDA graph holds addresses, not tensors
    graph.replay = lambda: None
    assert alive[0]() is not None
    del graph
    assert alive[0]() is None


def test_inputs_are_copied_only_when_they_changed(recorded, monkeypatch):
    step_of = graphed(lambda x_t, step, cond, mask: x_t + cond * mask)
    x, cond, mask = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    copies, copy = [], torch.Tensor.copy_

    def count(to, given):
        copies.append(given)
        return copy(to, given)

    def copied(*inputs):
        copies.clear()
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "copy_", count)
            out = step_of(x, 0, *inputs)
        assert torch.equal(out, x + inputs[0] * inputs[1])
        return [name for name, t in [("cond", inputs[0]), ("mask", inputs[1])]
                if any(t is c for c in copies)]  # fmt: skip

    assert copied(cond, mask) == ["cond", "mask"]
    assert copied(cond, mask) == []
    cond.mul_(3)  # in place
    assert copied(cond, mask) == ["cond"]
    assert copied(cond, mask) == []
    mask = torch.zeros(2, 3)
    assert copied(cond, mask) == ["mask"]
    assert copied(cond[:], mask) != []  # another tensor, if of the same memory


def test_an_input_that_is_gone_is_not_taken_for_a_new_one(recorded):
    step_of = graphed(lambda x_t, step, cond: x_t + cond)
    x = torch.zeros(4)
    for value in range(20):  # each at an address that the last one may have left
        cond = torch.full((4,), float(value))
        assert (step_of(x, 0, cond) == value).all()
        del cond


def test_tensors_it_returned_stay_as_they_are(recorded):
    step_of, seeds = graphed(mean_step), torch.arange(2)
    x = seeded_normal(seeds, (1, 4, 4))
    steps, copies = [], []
    for step in range(6):
        x = step_of(x, step, seeds)
        steps.append(x)
        copies.append(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(steps, copies, strict=True))
    assert len({x.data_ptr() for x in steps}) == 6
    steps[-1].zero_()  # nor does it matter to the graph what becomes of them
    assert torch.equal(step_of(steps[0], 1, seeds), copies[1])


def test_a_failed_capture_warns_and_goes_on_step_by_step(captures, monkeypatch):
    tries = []

    def fail(body, device):
        tries.append(1)
        with Recorder():
            body()

    monkeypatch.setattr(graphs, "_capture", fail)
    host_read = graphed(lambda x_t, step, seeds: mean_step(x_t, int(step), seeds))
    seeds, x = torch.arange(2), torch.ones(2, 1, 4, 4)
    expected = x
    message = "sampling without a CUDA graph: operation not permitted when stream is capturing$"
    with pytest.warns(UserWarning, match=message) as warned:
        for step in range(3):
            expected, x = mean_step(expected, step, seeds), host_read(x, step, seeds)
            assert torch.equal(x, expected)
    assert len(warned) == len(tries) == 1
    other = graphed(mean_step)  # CUDA's allocator may be left in the middle: none is tried again
    assert torch.equal(other(x, 0, seeds), mean_step(x, 0, seeds)) and len(tries) == 1


# -- the scripts -----------------------------------------------------------------------------------


def network(script, config):
    if script is sparse_ddo:
        net = FnoUnet(10, (3, 16, 16), config)  # make_model's, as below
        net.guess = points.LinearGuess((3, 16, 16), 0.1)
        net.guess.axes.copy_(torch.eye(3).roll(1, 0))
        return net
    if script is cfg_ddpm:
        return Unet(3, 3, config, num_classes=4)
    if script is sparse_ddpm:
        net = Unet(15, 3, config)  # make_model's, but it sets a layout, which fakes cannot
        net.fill = linear.LinearFill((3, 16, 16), 0.2)
        return net
    return Unet(3, 3, config)


def attentive(script, **changes):
    """A configuration that takes the network through all of its code."""
    unet = dict(attn_resolutions=[8], linear_attention=True, dropout=0.1, flip=True)
    if script is sparse_ddo:
        unet = dict(flip=True)
    return make_config(script, **unet | dict(batch_size=4, sample_steps=5) | changes)


def scattered(x, *_):
    """The same ten points of each image."""
    places = torch.linspace(0.05, 0.95, 20, device=x.device).view(1, 10, 2).expand(len(x), -1, -1)
    return points.Points(places, x[:, :, 0, :10], torch.ones_like(places[..., 0]) > 0)


def sampler_and_inputs(script, net, config):
    """(sample, its inputs for seeds 0..3)."""
    device, size = config.device, config.image_size
    sample = script.make_sampler(net, (3, size, size), config)
    seeds, labels = torch.arange(4, device=device), torch.tensor([0, 3, 1, 0], device=device)
    mask = torch.ones(4, 1, size, size, dtype=torch.bool, device=device)
    mask[:, :, ::2] = False
    images = torch.full((4, 3, size, size), 0.25, device=device) * mask
    more = {ddpm: (), cfg_ddpm: (labels,)}.get(script, (images, mask))
    if script is sparse_ddo:
        more = (scattered(images),)
    return sample, (seeds, *more)


@pytest.mark.parametrize("script", SCRIPTS, **by_name)
def test_a_captured_sampler_draws_the_same_images(script, monkeypatch, recorded):
    torch.manual_seed(0)
    config = attentive(script, **{"eta": 0.7} if script is sparse_ddo else {})  # noise in each
    net = away_from_zero(network(script, config)).eval()
    sample, (seeds, *more) = sampler_and_inputs(script, net, config)
    *_, first = sample(seeds, *more)
    by_graph = list(sample(seeds + 7, *more))  # the same graph, filled anew
    assert len(recorded) == 1 and len(by_graph) == 5
    monkeypatch.setattr(graphs, "_captures", lambda device: False)
    for x, expected in zip(by_graph, sample(seeds + 7, *more), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert (first - by_graph[-1]).abs().mean() > 1e-3 and first.std() > 1e-3


class NoGpu:
    """A data set on a GPU of shapes."""

    def __init__(self, device):
        self.shape, self.class_names = (3, 16, 16), list("abcd")
        self.images = torch.zeros(20, 3, 16, 16, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(20, dtype=torch.int64, device=device)
        self.train = Part(self.images, self.labels)
        self.held_out = {"val": (torch.arange(4, device=device), self.train[:4])}


def a_guess(guess, seen):
    h = seen.values[..., :1, None].expand(-1, -1, 16, 16)
    return h, torch.ones_like(h[:, :1])


@contextlib.contextmanager
def a_gpu_of_shapes(monkeypatch):
    """Tensors on "cuda" without values; reading one on the host is an error."""
    monkeypatch.setattr(graphs, "_captures", lambda device: True)
    monkeypatch.setattr(graphs, "_capture", lambda body, device: body)
    monkeypatch.setattr(linear, "LARGEST_SIDE", 0)  # kriging asks how many pixels are seen
    monkeypatch.setattr(linear.LinearFill, "learn", lambda *args: None)
    # Nor is it known how many points there are, and whether they are on the grid.
    monkeypatch.setattr(sparse_ddo, "points_of", scattered)
    monkeypatch.setattr(points.LinearGuess, "learn", lambda *args: None)
    monkeypatch.setattr(points.LinearGuess, "forward", a_guess)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


without_cuda = pytest.mark.filterwarnings("ignore:CUDA is not available")
both_paths = pytest.mark.parametrize(
    "script, reference", [(ddpm, True), *((script, False) for script in SCRIPTS)], **by_name
)


@without_cuda
@both_paths
def test_no_sampler_waits_for_a_gpu(script, reference, monkeypatch):
    """All tensors meet on one device, and no value is read on the host until the images are."""
    if reference:
        monkeypatch.setattr(ops, "BACKENDS", ())
    with a_gpu_of_shapes(monkeypatch):
        config = attentive(script, device="cuda")
        with torch.device("cuda"):
            net = network(script, config)
        sample, inputs = sampler_and_inputs(script, net, config)
        steps = list(sample(*inputs))
        assert len(steps) == 5
        assert all(x.shape == (4, 3, 16, 16) and x.device.type == "cuda" for x in steps)
        with pytest.raises(DataDependentOutputException):
            steps[-1].sum().item()


@without_cuda
@both_paths
def test_training_waits_for_a_gpu_only_to_report(script, reference, monkeypatch, tmp_path):
    if reference:
        monkeypatch.setattr(ops, "BACKENDS", ())
    config = attentive(script, steps=120, save_every=99, sample_every=99)
    run = Run(script.Config, ["--device", "cpu", "--out-dir", str(tmp_path)])
    run.config, run.dir, run.log_every, run.sample_every = config, tmp_path, 3, 99
    run.device = config.device = "cuda"
    updates = []
    monkeypatch.setattr(script, "update_ema", lambda *args: updates.append(args))
    with a_gpu_of_shapes(monkeypatch):
        with torch.device("cuda"):
            net = network(script, config)

        def gradients(loss):  # autograd's threads want a real GPU
            assert loss.shape == () and loss.device.type == "cuda"
            for p in net.parameters():
                p.grad = torch.zeros_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", gradients)
        with pytest.raises(DataDependentOutputException):
            script.train(run, net, net, NoGpu("cuda"), config)
    assert len(updates) == run.log_every
