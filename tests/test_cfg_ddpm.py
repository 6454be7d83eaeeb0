"""cfg_ddpm.py: classes, the null class, guidance, pictures and messages."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

import cfg_ddpm as script
import fused_ddpm
from images import SHAPES

TINY = """--data shapes --image-size 16 --dim 8 --dim-mults 1 2 --steps 6 --batch-size 16 --num-timesteps 50 --sample-steps 4
--num-samples 12 --guidance-sweep 0 2 --lr 1e-3""".split()
NAMES = ["red", "green", "blue", "T-shirt"]


def run(out_dir, *flags):
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def make_args(**changes):
    options = dict(num_timesteps=50, schedule="cosine", objective="v", loss="l2", sampler="ddpm", sample_steps=10, eta=0.0)
    options |= dict(variance="small", seed=0, batch_size=16, use_amp=False, device="cpu", classes=None, guidance_scale=3.0)
    return argparse.Namespace(**options | {"class_names": NAMES} | changes)


def small_unet(channels=3, size=16):
    torch.manual_seed(0)
    net = script.Unet(channels, channels, size, 8, [1, 2], 1, [], False, 0.0, len(NAMES))
    for p in net.parameters():  # away from the zero initialisation, which would hide everything
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def test_network_tells_classes_apart():
    net, x, t = small_unet(), torch.randn(5, 3, 16, 16), torch.tensor([3, 40, 7, 20, 0])
    whole = net(x, t, torch.tensor([0, 1, 2, 3, 4]))
    for label in range(5):  # 4 is the null class
        other = net(x, t, torch.full((5,), label))
        torch.testing.assert_close(other[label], whole[label], rtol=0, atol=1e-5)
        assert all((other[i] - whole[i]).abs().max() > 1e-3 for i in range(5) if i != label)


def test_every_class_gets_a_gradient():
    net = small_unet()
    net(torch.randn(5, 3, 16, 16), torch.arange(5), torch.arange(5)).square().mean().backward()
    assert (net.classes[0].weight.grad.abs().sum(1) > 0).all()


class Recorder:
    """A network that counts what it is asked."""

    def __init__(self, net):
        self.net, self.asked = net, []

    def __call__(self, x, t, labels):
        self.asked.append((x.clone(), t.tolist(), labels.tolist()))
        return self.net(x, t, labels)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_w_0_and_1_are_plain_sampling(sampler):
    """Exactly the samples of a loop that knows of no guidance, with no doubled batch."""
    labels, seeds = torch.tensor([0, 3, 1]), torch.tensor([5, 6, 7])
    for w, asked in [(0.0, torch.full_like(labels, 4)), (1.0, labels)]:
        net, args = Recorder(small_unet()), make_args(guidance_scale=w, sampler=sampler)
        x = script.sample(net, (3, 16, 16), labels, seeds, args)
        assert all(len(x_t) == 3 and given == asked.tolist() for x_t, _, given in net.asked)
        _, alphas_cumprod = script.make_schedule("cosine", 50)
        timesteps, table = script.sampling_table(alphas_cumprod, "v", sampler, 10)
        x_t = fused_ddpm.seeded_normal(seeds, (3, 16, 16))
        for step, t in enumerate(timesteps):
            with torch.no_grad():
                out = net.net(x_t, t.expand(3), asked)
            x_t = fused_ddpm.posterior_step(x_t, out, table, step, seeds)
        assert torch.equal(x, x_t)


@pytest.mark.parametrize("w", [0.5, 3.0, 7.0])
def test_guidance_is_the_formula(w, monkeypatch):
    labels, seeds = torch.tensor([0, 3, 1]), torch.tensor([5, 6, 7])
    net, args = Recorder(small_unet()), make_args(guidance_scale=w)
    x = script.sample(net, (3, 16, 16), labels, seeds, args)
    first = net.asked[0]
    assert torch.equal(first[0][:3], first[0][3:]) and first[1] == [49] * 6 and first[2] == [0, 3, 1, 4, 4, 4]
    _, alphas_cumprod = script.make_schedule("cosine", 50)
    timesteps, table = script.sampling_table(alphas_cumprod, "v", "ddpm", 10)
    x_t = fused_ddpm.seeded_normal(seeds, (3, 16, 16))
    for step, t in enumerate(timesteps):  # with two passes and the reference step
        with torch.no_grad():
            cond, uncond = net.net(x_t, t.expand(3), labels), net.net(x_t, t.expand(3), torch.full_like(labels, 4))
        x_t = fused_ddpm.posterior_step_reference(x_t, uncond + w * (cond - uncond), table, step, seeds)
    torch.testing.assert_close(x, x_t, rtol=0, atol=2e-4)
    monkeypatch.setattr(fused_ddpm, "BACKENDS", ())
    torch.testing.assert_close(script.sample(net, (3, 16, 16), labels, seeds, args), x, rtol=0, atol=2e-4)


def test_guidance_close_to_1_is_close_to_plain():
    net, labels, seeds = small_unet(), torch.tensor([0, 3, 1]), torch.arange(3)
    plain, near = (script.sample(net, (3, 16, 16), labels, seeds, make_args(guidance_scale=w)) for w in (1.0, 1.00001))
    torch.testing.assert_close(plain, near, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "classes, expected",
    [(None, [0, 1, 2, 3]), ("2", [2]), ("3,0", [3, 0]), ("Green, t-shirt,0", [1, 3, 0]), ("blue,blue,red", [2, 2, 0])],
)
def test_classes_by_name_or_number(classes, expected):
    assert script.chosen_classes(make_args(classes=classes)) == expected
    labels = script.labels_in_turn(7, make_args(classes=classes))
    assert labels.tolist() == [expected[i % len(expected)] for i in range(7)]
    assert script.generate(small_unet(), (3, 16, 16), labels, make_args(batch_size=4)).shape == (7, 3, 16, 16)


@pytest.mark.parametrize("classes, wrong", [("4", "4"), ("-1", "-1"), ("red,purple", "purple"), ("", ""), ("red,", "")])
def test_classes_that_do_not_exist(classes, wrong):
    with pytest.raises(script.UserError, match=rf"--classes {classes}: '{wrong}' is none of the classes: 0 red, 1 green"):
        script.chosen_classes(make_args(classes=classes))


def test_dropped_labels_are_the_null_class(tmp_path, monkeypatch):
    loss, seen = script.training_loss, {}

    def record(model, x_start, t, noise, labels, *rest):
        seen.setdefault(rate, []).append(labels)
        return loss(model, x_start, t, noise, labels, *rest)

    monkeypatch.setattr(script, "training_loss", record)
    monkeypatch.setattr(script, "held_out_loss", lambda *args: 0.5)
    for rate, w in [("0", "1"), ("0.5", "1"), ("1", "0")]:
        flags = ["--cond-drop-prob", rate, "--guidance-scale", w, "--guidance-sweep", w]
        run(tmp_path / rate, *flags, "--batch-size", "96")
    dropped = {rate: (torch.cat(labels) == 10).float().mean().item() for rate, labels in seen.items()}
    assert dropped["0"] == 0 and dropped["1"] == 1 and dropped["0.5"] == pytest.approx(0.5, abs=0.1)
    kept = torch.cat(seen["0.5"]) != 10  # and those that are kept are the images' own
    assert torch.equal(torch.cat(seen["0.5"])[kept], torch.cat(seen["0"])[kept])


def test_a_run_learns_and_writes_everything(tmp_path):
    run(tmp_path / "run", *"--steps 120 --sample-every 60 --lr 5e-3 --dim 16 --num-samples 23".split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"last.pt", "config.json", "history.json", "loss.png", "samples.png", "samples.npy", "labels.npy",
                     "sweep.png", "step_000060.png"}  # fmt: skip
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert len({len(v) for v in history.values()}) == 1
    for part in ("train", "val", "val_uncond", "test"):
        assert history[f"{part}_loss"][-1] < 0.8 * history[f"{part}_loss"][0]
    samples, labels = np.load(tmp_path / "run/samples.npy"), np.load(tmp_path / "run/labels.npy")
    assert samples.shape == (23, 16, 16, 3) and labels.tolist() == [i % 10 for i in range(23)]
    assert json.loads((tmp_path / "run/config.json").read_text())["class_names"] == SHAPES
    again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    script.main([*again, "--classes", "star,bar", "--guidance-scale", "0", "--guidance-sweep", "--num-samples", "5"])
    assert np.load(tmp_path / "again/labels.npy").tolist() == [5, 8, 5, 8, 5] and not (tmp_path / "again/sweep.png").exists()


def test_sweep_has_the_same_seeds_in_every_column(tmp_path):
    args = make_args(guidance_sweep=[2.0, 0.0, 2.0], classes="red, blue")
    script.draw_sweep(tmp_path / "sweep.png", small_unet(), (3, 16, 16), args)
    page = np.asarray(Image.open(tmp_path / "sweep.png"))[30:]
    sheet = page[:, page.shape[1] - 3 * 54 :]
    assert np.array_equal(sheet[:, :54], sheet[:, 108:]) and not np.array_equal(sheet[:, :54], sheet[:, 54:108])
    expected = script.generate(small_unet(), (3, 16, 16), torch.tensor([0, 2]), make_args(guidance_scale=0.0))
    for row in range(2):
        shown = sheet[54 * row + 4 : 54 * row + 52 : 3, 54 + 4 : 54 + 52 : 3].astype(int)
        assert np.abs(shown - expected[row].permute(1, 2, 0).numpy()).max() <= 1


def test_folders_of_classes(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            pixels = torch.randint(256, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    run(tmp_path / "run", "--data", str(tmp_path / "pets"), "--classes", "dogs")
    assert script.load_checkpoint(tmp_path / "run/last.pt")["config"]["class_names"] == ["cats", "dogs"]
    assert np.load(tmp_path / "run/labels.npy").tolist() == [1] * 12
    with pytest.raises(SystemExit, match=r"--data .*cats: has no classes; sort its images into one sub-folder for each"):
        run(tmp_path / "none", "--data", str(tmp_path / "pets" / "cats"))


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--classes 10", 1, "--classes 10: '10' is none of the classes: 0 circle, 1 ring"),
        ("--classes circle,hat", 1, "--classes circle,hat: 'hat' is none of the classes"),
        ("--cond-drop-prob -0.1", 2, "argument --cond-drop-prob: must lie in [0, 1], got -0.1"),
        ("--guidance-scale -1", 2, "argument --guidance-scale: must lie in [0, inf), got -1"),
        ("--guidance-scale strong", 2, "argument --guidance-scale: invalid float value: 'strong'"),
        ("--guidance-sweep 0 1 lots", 2, "argument --guidance-sweep: invalid float value: 'lots'"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, code, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "run", *flags.split())
    shown = capsys.readouterr().err + str(error.value.code)
    assert message in shown and (error.value.code == 2) == (code == 2) and not (tmp_path / "run").exists()
