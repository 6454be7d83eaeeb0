"""cfg_ddpm.py: guidance, the null class, classes by name, what a run writes, messages."""

from types import SimpleNamespace

import cfg_ddpm as script
import fused_ddpm.ops
from fused_ddpm import posterior_step, seeded_normal
from fused_ddpm.files import UserError
from fused_ddpm.images import Data, load_images, to_float
from fused_ddpm.ops import posterior_step_reference
from fused_ddpm.runs import Run
from fused_ddpm.shapes import NAMES as SHAPES
from fused_ddpm.unet import Unet

import numpy as np
import pytest
import torch
from helpers import away_from_zero, exits_with, load, make_config, read_json
from PIL import Image

NAMES = ["red", "green", "blue", "T-shirt"]
NULL = len(NAMES)
SHAPE = (3, 16, 16)
TINY = """--data shapes --device cpu --image-size 16 --dim 8 --dim-mults 1 2 --steps 6
--batch-size 16 --num-timesteps 50 --sample-steps 4 --num-samples 12 --guidance-sweep 0 2
--lr 1e-3""".split()
LABELS, SEEDS = torch.tensor([0, 3, 1]), torch.tensor([5, 6, 7])


def run(out_dir, *flags):
    torch.set_num_threads(1)  # two would wait for each other where a core is all there is
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def small_unet():
    torch.manual_seed(0)
    return away_from_zero(Unet(3, 3, make_config(script), num_classes=NULL)).eval()


class Recorder(torch.nn.Module):
    """A network that counts what it is asked."""

    null_class = NULL

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, x, t, labels):
        self.asked.append((x.clone(), t.tolist(), labels.tolist()))
        return self.net(x, t, labels)


def sample(net, labels=LABELS, seeds=SEEDS, **changes):
    """The last x_t of a sampler of this network."""
    *_, x = script.make_sampler(net, SHAPE, make_config(script, **changes))(seeds, labels)
    return x


# -- guidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("w, asked", [(0.0, torch.full_like(LABELS, NULL)), (1.0, LABELS)])
def test_w_0_and_1_are_plain_sampling(sampler, w, asked):
    """Exactly the samples of a loop that knows of no guidance, with no doubled batch."""
    net = Recorder(small_unet())
    x = sample(net, guidance_scale=w, sampler=sampler)
    assert len(net.asked) == 10
    assert all(len(x_t) == 3 and given == asked.tolist() for x_t, _, given in net.asked)
    timesteps, table = script.sampling_table(make_config(script, sampler=sampler))
    x_t = seeded_normal(SEEDS, SHAPE)
    for step, t in enumerate(timesteps):
        with torch.no_grad():
            out = net.net(x_t, t.expand(3), asked)
        x_t = posterior_step(x_t, out, table, step, SEEDS)
    assert torch.equal(x, x_t)


@pytest.mark.parametrize("w", [0.5, 3.0, 7.0])
def test_guidance_is_the_formula(w, monkeypatch):
    net = Recorder(small_unet())
    x = sample(net, guidance_scale=w, sampler="ddpm")
    assert len(net.asked) == 10
    seen, t, labels = net.asked[0]
    assert torch.equal(seen[:3], seen[3:]) and t == [49] * 6
    assert labels == [*LABELS.tolist(), NULL, NULL, NULL]
    timesteps, table = script.sampling_table(make_config(script, sampler="ddpm"))
    x_t, null = seeded_normal(SEEDS, SHAPE), torch.full_like(LABELS, NULL)
    for step, t in enumerate(timesteps):  # with two passes and the reference step
        with torch.no_grad():
            cond, uncond = net.net(x_t, t.expand(3), LABELS), net.net(x_t, t.expand(3), null)
        guided = uncond + w * (cond - uncond)
        x_t = posterior_step_reference(x_t, guided, table, step, SEEDS)
    torch.testing.assert_close(x, x_t, rtol=0, atol=2e-4)
    monkeypatch.setattr(fused_ddpm.ops, "BACKENDS", ())
    reference = sample(net, guidance_scale=w, sampler="ddpm")
    torch.testing.assert_close(reference, x, rtol=0, atol=2e-4)


def test_guidance_close_to_1_is_close_to_plain():
    net, seeds = small_unet(), torch.arange(3)
    plain, near = (sample(net, seeds=seeds, guidance_scale=w) for w in (1.0, 1.00001))
    torch.testing.assert_close(plain, near, rtol=0, atol=1e-3)
    assert (sample(net, seeds=seeds, guidance_scale=2.0) - plain).abs().max() > 1e-2


# -- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classes, expected",
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3,0", [3, 0]),
        ("Green, t-shirt,0", [1, 3, 0]),
        ("blue,blue,red", [2, 2, 0]),
    ],
)
def test_classes_by_name_or_number_are_generated_in_turn(classes, expected, tmp_path):
    flags = [*TINY, "--batch-size", "4", "--out-dir", str(tmp_path)]
    asked = Run(script.Config, flags + (["--classes", classes] if classes else []))
    facts = {"shape": list(SHAPE), "class_names": NAMES}
    data = Data(asked.config, facts, labelled=True)
    assert data.classes.tolist() == expected
    net = Recorder(small_unet())
    images, labels = script.generate(asked, net, 7, data, asked.config)
    assert labels.tolist() == [expected[i % len(expected)] for i in range(7)]
    assert images.shape == (7, *SHAPE) and images.dtype == torch.uint8
    told = [given[: len(given) // 2] for _, _, given in net.asked[:: asked.config.sample_steps]]
    assert [label for batch in told for label in batch] == labels.tolist()


@pytest.mark.parametrize(
    "classes, wrong", [("4", "4"), ("-1", "-1"), ("red,purple", "purple"), ("", ""), ("red,", "")]
)
def test_classes_that_do_not_exist(classes, wrong):
    config = make_config(script, classes=classes)
    message = rf"--classes {classes}: '{wrong}' is none of the classes: 0 red, 1 green"
    with pytest.raises(UserError, match=message):
        Data(config, {"shape": list(SHAPE), "class_names": NAMES}, labelled=True)


def test_same_seed_and_label_same_image(tmp_path):
    """Whatever the batch: to one of 255 levels."""
    asked = Run(script.Config, [*TINY, "--out-dir", str(tmp_path)])
    config, net = asked.config, small_unet()
    data = SimpleNamespace(shape=SHAPE, classes=torch.arange(4))
    whole = script.generate(asked, net, 12, data, config)[0].int()
    config.batch_size = 5
    assert (script.generate(asked, net, 12, data, config)[0] - whole).abs().max() <= 1
    data.classes = torch.tensor([0, 2, 2, 3])  # another class changes its own images alone
    other = script.generate(asked, net, 12, data, config)[0].int()
    change = (other - whole).abs().flatten(1).max(1).values.view(3, 4)
    assert (change[:, [0, 2, 3]] <= 1).all() and (change[:, 1] > 5).all()


def test_labels_are_dropped_as_often_as_asked(tmp_path, monkeypatch):
    seen = {}

    def record(model, x_start, t, noise, labels, *rest):  # the loss: steps cost nothing
        if model.training:
            seen.setdefault(rate, []).append((x_start, labels))
        return 1 + 0 * sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(script, "training_loss", record)
    for rate, w in [("0", "1"), ("0.5", "1"), ("0.1", "3"), ("1", "0")]:
        flags = ["--cond-drop-prob", rate, "--guidance-scale", w, "--guidance-sweep"]
        flags += "--steps 40 --batch-size 96 --num-samples 1 --sample-steps 1".split()
        run(tmp_path / rate, *flags, "--sample-every", "99")
    images = torch.cat([x for x, _ in seen["0"]])
    seen = {rate: torch.cat([labels for _, labels in steps]) for rate, steps in seen.items()}
    dropped = {rate: labels == len(SHAPES) for rate, labels in seen.items()}
    n = 40 * 96
    assert dropped["0"].sum() == 0 and dropped["1"].all() and len(images) == n
    for p in (0.5, 0.1):
        rate = dropped[str(p)].float()
        assert abs(rate.mean() - p) < 4.5 * (p * (1 - p) / n) ** 0.5
        of_steps = rate.view(40, 96).sum(1)  # each image by itself, not a batch at once
        assert of_steps.var().item() == pytest.approx(96 * p * (1 - p), rel=4.5 * (2 / 39) ** 0.5)
        kept = ~dropped[str(p)]  # and those that are kept are the images' own
        assert torch.equal(seen[str(p)][kept], seen["0"][kept])
    pairs = zip(*load_images("shapes", image_size=16), strict=True)
    own = {to_float(x).numpy().tobytes(): label.item() for x, label in pairs}
    assert [own[x.numpy().tobytes()] for x in images] == seen["0"].tolist()


# -- whole runs ------------------------------------------------------------------------------------


def cells(path, columns, height=54):
    """The pictures of a sheet without its labels, (rows, columns, 16, 16, 3)."""
    page = np.asarray(Image.open(path))
    page = page[page.shape[0] % height :, page.shape[1] - columns * height :]
    page = page.reshape(-1, height, columns, height, 3).swapaxes(1, 2)
    return page[:, :, 4:-3:3, 4:-3:3]  # a pixel is three wide, a line of one around


def test_a_run_learns_and_writes_everything(tmp_path):
    flags = "--steps 120 --sample-every 60 --lr 5e-3 --dim 16 --num-samples 23"
    run(tmp_path / "run", *flags.split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    pictures = {"loss.png", "samples.png", "sweep.png", "step_000060.png"}
    arrays = {"samples.npy", "labels.npy"}
    assert files == pictures | arrays | {"last.pt", "config.json", "history.json"}
    history = read_json(tmp_path / "run/history.json")
    assert history.pop("final")["images"].keys() >= {"val", "test"}
    assert len({len(v) for v in history.values()}) == 1 and history["steps"][-1] == 120
    for part in ("train", "val", "val_uncond", "test"):
        assert history[f"{part}_loss"][-1] < 0.8 * history[f"{part}_loss"][0]
    samples = np.load(tmp_path / "run/samples.npy")
    labels = np.load(tmp_path / "run/labels.npy")
    assert samples.shape == (23, 16, 16, 3) and labels.tolist() == [i % 10 for i in range(23)]
    assert load(tmp_path / "run/last.pt")["facts"]["class_names"] == SHAPES
    shown = cells(tmp_path / "run/samples.png", 3)  # a row for each class
    assert len(shown) == 10
    for label in range(10):
        of_class = samples[labels == label]
        assert np.array_equal(shown[label, : len(of_class)], of_class)
        assert (shown[label, len(of_class) :] == 255).all()

    again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    again += "--classes star,bar --guidance-scale 0 --guidance-sweep --num-samples 5".split()
    script.main(again)
    assert np.load(tmp_path / "again/labels.npy").tolist() == [5, 8, 5, 8, 5]
    assert not (tmp_path / "again/sweep.png").exists()


def test_sweep_has_the_same_seeds_in_every_column(tmp_path):
    run(tmp_path / "run", "--lr", "1e-2")
    flags = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "sweep")]
    flags += ["--classes", "star, bar", "--num-samples", "2"]
    script.main([*flags, *"--guidance-sweep 40 0 4".split()])
    shown = cells(tmp_path / "sweep/sweep.png", 3)
    assert len(shown) == 2
    for column, w in enumerate(["40", "0", "4"]):  # a column is what --guidance-scale makes
        script.main([*flags, "--guidance-scale", w, "--guidance-sweep"])
        samples = np.load(tmp_path / "sweep/samples.npy")
        assert np.array_equal(shown[:, column], samples)
        assert all((shown[:, other] != samples).any() for other in {0, 1, 2} - {column})


def test_folders_of_classes(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            pixels = torch.randint(256, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    run(tmp_path / "run", "--data", str(tmp_path / "pets"), "--classes", "dogs")
    assert load(tmp_path / "run/last.pt")["facts"]["class_names"] == ["cats", "dogs"]
    assert np.load(tmp_path / "run/labels.npy").tolist() == [1] * 12
    message = r"--data .*cats: has no classes; sort its images into one sub-folder for each"
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "none", "--data", str(tmp_path / "pets" / "cats"))


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--classes 10", 1, "--classes 10: '10' is none of the classes: 0 circle, 1 ring"),
        ("--classes circle,hat", 1, "--classes circle,hat: 'hat' is none of the classes"),
        ("--cond-drop-prob -0.1", 2, "argument --cond-drop-prob: must lie in [0, 1], got -0.1"),
        (
            "--cond-drop-prob 0",
            2,
            "--cond-drop-prob 0: needs --guidance-scale and --guidance-sweep 1",
        ),
        (
            "--cond-drop-prob 1 --guidance-scale 0",
            2,
            "--cond-drop-prob 1: needs --guidance-scale and --guidance-sweep 0",
        ),
        ("--guidance-scale -1", 2, "argument --guidance-scale: must lie in [0, inf), got -1"),
        ("--guidance-scale strong", 2, "argument --guidance-scale: invalid float value: 'strong'"),
        ("--guidance-sweep 0 1 lots", 2, "argument --guidance-sweep: invalid float value: 'lots'"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, code, message):
    call = lambda: run(tmp_path / "run", *flags.split())
    assert message in exits_with(code, capsys, call)
    assert not (tmp_path / "run").exists()
