"""evaluate.py: each figure against a closed form or a second way to compute it, a run, messages."""

import functools
import json
import math

import evaluate as script
from fused_ddpm import features, images
from fused_ddpm.images import load_images

import numpy as np
import pytest
import torch
from helpers import exits_with, read_json
from PIL import Image

D = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def exactly(mean, cov, n=200, seed=0):
    """n points with this very mean and covariance."""
    x = randn(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def random_cov(d, seed):
    a = randn(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=D)


def test_frechet_distance_of_gaussians_with_a_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=D), torch.tensor([4.0, 4.0, 1.0], dtype=D)
    m = torch.tensor([1.0, 2.0, 2.0], dtype=D)
    turn = torch.linalg.qr(randn(3, 3)).Q  # the same for both: still a closed form
    x = exactly(0 * m, turn @ a.diag() @ turn.T)
    y = exactly(m, turn @ b.diag() @ turn.T, n=150, seed=1)
    expected = 9 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert script.frechet_distance(x, y) == pytest.approx(expected, abs=1e-9)
    assert script.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [400, 30])  # 30: fewer than dimensions, a covariance not of full rank
def test_frechet_distance_another_way(n):
    """By the eigenvalues of C_x C_y itself, which is not symmetric; in numpy."""
    x = exactly(randn(40), random_cov(40, 1)) if n > 40 else randn(n, 40)
    y = randn(500, 40, seed=2) @ torch.linalg.cholesky(random_cov(40, 3)).T + 0.3
    cov_x, cov_y = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real.clip(min=0)).sum()
    apart = np.square(x.numpy().mean(0) - y.numpy().mean(0)).sum()
    expected = apart + np.trace(cov_x) + np.trace(cov_y) - 2 * roots
    assert script.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_pair_by_pair():
    x, y = randn(45, 6), randn(60, 6, seed=1) + 0.5
    kernel = lambda a, b: (float(a @ b) / 6 + 1) ** 3
    parts = []
    for i in range(0, 44, 4):  # 45 // 10 images each, eleven times
        a, b = x[i : i + 4], y[i : i + 4]
        aa = [kernel(a[j], a[k]) for j in range(4) for k in range(4) if j != k]
        bb = [kernel(b[j], b[k]) for j in range(4) for k in range(4) if j != k]
        ab = [kernel(a[j], b[k]) for j in range(4) for k in range(4)]
        parts.append(np.mean(aa) + np.mean(bb) - 2 * np.mean(ab))
    mean, error = script.kernel_distance(x, y)
    assert mean == pytest.approx(np.mean(parts), rel=1e-9)
    assert error == pytest.approx(np.std(parts, ddof=1) / math.sqrt(11), rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Of one distribution within its error of 0; of two, of what their moments say."""
    x, y = randn(20_000, 1), randn(20_000, 1, seed=1)
    mean, error = script.kernel_distance(x, y)
    assert abs(mean) < 4 * error
    mean, error = script.kernel_distance(x, y + 1)
    # sum over j of C(3, j) (E x^j - E y^j)^2, with moments 0, 1, 0 and 1, 2, 4
    assert mean == pytest.approx(3 * 1 + 3 * 1 + 1 * 16, abs=4 * error)
    assert error < 1


def test_precision_and_recall_by_counting():
    line = torch.arange(10, dtype=D)[:, None]
    # the third nearest other one is 3 away at the ends, 2 inside (but one place in)
    beside = torch.tensor([[-3.0], [-3.1], [4.5], [12.0], [12.1], [50.0]], dtype=D)
    assert script.share_among(beside, line) == pytest.approx(3 / 6)
    assert script.share_among(line, line) == 1
    far = line + 1000
    assert script.share_among(far, line) == script.share_among(line, far) == 0


def test_a_missing_mode_costs_recall_a_wrong_one_precision():
    mode = lambda where, seed: randn(200, 8, seed=seed) + where
    real = script.shuffled(torch.cat([mode(0, 0), mode(20, 1)]))
    one, wrong = mode(0, 2), torch.cat([mode(0, 2), mode(-20, 3)])
    figures = {k: v[0] for k, v in script.compare(one, real, "FD").items()}
    half = script.share_among(mode(0, 0)[:100], one)
    assert figures["precision"] > 0.8 and 0.3 < figures["recall"] < 0.6 and half > 0.8
    figures = {k: v[0] for k, v in script.compare(wrong, real, "FD").items()}
    assert 0.4 < figures["precision"] < 0.6


def test_nearest_training_images(monkeypatch):
    g = torch.Generator().manual_seed(0)
    training = torch.randint(256, (9000, 1, 4, 4), generator=g, dtype=torch.uint8)  # two parts
    found = torch.tensor([8999, 17])
    asked = training[found].clone()
    asked[1] = (asked[1].int() + 3).clamp(max=255).byte()
    apart, index = script.nearest_images(asked, training, "cpu")
    assert torch.equal(index[:, 0], found) and apart[0, 0] == 0
    every = (asked[:, None].double() - training.double()).flatten(2).square().mean(2).sqrt()
    torch.testing.assert_close(apart.double(), every.sort().values[:, :3])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 600, False: 200})
    monkeypatch.setattr(features, "STEPS", 60)


def evaluate(folder, name, samples, *flags, labels=None):
    path = folder / name / "samples.npy"
    path.parent.mkdir()
    np.save(path, samples.movedim(1, -1).numpy())
    if labels is not None:
        np.save(path.with_name("labels.npy"), labels.numpy())
    data = ["--data", "shapes", "--data-dir", str(folder / "data"), "--device", "cpu"]
    script.main([str(path), *data, *flags])
    return read_json(path.with_name("samples_evaluation") / "metrics.json")


def test_a_run_ranks_sets_of_images(tmp_path, quick, capsys):
    """Real images are near the floor; shifted, noised, and copied sets show as what they are."""
    real, labels = load_images("shapes", image_size=16, train=False)
    training, _ = load_images("shapes", image_size=16, train=True)
    g = torch.Generator().manual_seed(0)
    noise = 60 * torch.randn(real.shape, generator=g)
    noised = (real.float() + noise).clamp(0, 255).byte()
    found = {
        "real": evaluate(tmp_path, "real", real, labels=labels),
        "noised": evaluate(tmp_path, "noised", noised),
        "shifted": evaluate(tmp_path, "shifted", real.roll((5, 5), (2, 3))),
        "copied": evaluate(tmp_path, "copied", training[:200]),
    }
    said = capsys.readouterr().out
    assert "FD-classifier" in said and "200 test images" in said
    kept = list((tmp_path / "data").iterdir())
    assert len(kept) == 1  # one classifier, trained once
    value = lambda name, figure: found[name]["samples"][figure]["value"]
    floor = found["real"]["floor"]
    for figure, of_floor in floor.items():  # the very images of the floor
        error = 4 * (of_floor["standard_error"] or 0)  # other parts, for the order is another
        assert value("real", figure) == pytest.approx(of_floor["value"], rel=1e-3, abs=1e-3 + error)
    for worse in ("noised", "shifted"):
        for figure in ("FD-classifier", "kernel distance"):
            assert value(worse, figure) > 2 * floor[figure]["value"]
        assert value(worse, "precision") < floor["precision"]["value"]
    assert value("copied", "nearest in training") == 0 and value("copied", "nearer than 99%") == 1
    assert "class accuracy" not in found["noised"]["samples"]
    assert found["real"]["num_samples"] == found["real"]["num_floor"] == 200
    assert floor["precision"]["num_training"] == 200
    assert floor["nearest in training"]["num_training"] == 600
    shares = [value("noised", f"class {name}") for name in images.CLASSES["shapes"]]
    assert sum(shares) == pytest.approx(1)
    assert (tmp_path / "real/samples_evaluation/neighbours.png").exists()


def test_folders_of_images(tmp_path, quick):
    """PNGs give the same as the .npy; the data are those of the run's config.json."""
    real, _ = load_images("shapes", image_size=16, train=False)
    from_file = evaluate(tmp_path, "file", real[:60])
    folder = tmp_path / "run" / "pngs"
    folder.mkdir(parents=True)
    for i, image in enumerate(real[:60]):
        Image.fromarray(image.movedim(0, -1).numpy()).save(folder / f"{i:03d}.png")
    (tmp_path / "run/config.json").write_text(json.dumps({"data": "shapes"}))
    script.main([str(folder), "--data-dir", str(tmp_path / "data"), "--device", "cpu"])
    from_folder = read_json(tmp_path / "run/pngs_evaluation/metrics.json")
    assert from_folder["floor"] == from_file["floor"]
    assert from_folder["samples"] == from_file["samples"]


def test_bad_input(tmp_path, quick, capsys):
    def message(*flags, code=1):
        return exits_with(code, capsys, lambda: script.main([*map(str, flags), "--device", "cpu"]))

    good, few, floats = (tmp_path / f"{n}.npy" for n in ("good", "few", "floats"))
    pixels = np.zeros((30, 16, 16, 3), np.uint8)
    np.save(good, pixels)
    np.save(few, pixels[:5])
    np.save(floats, pixels / 1.0)
    for about in (None, "[]", "{}", '{"data": 5'):
        if about:
            (tmp_path / "config.json").write_text(about)
        assert "no config.json tells" in message(good)
    data = "--data", "shapes", "--data-dir", tmp_path
    assert "floats.npy: neither an .npy, uint8" in message(floats, *data)
    zipped = tmp_path / "zipped.npy"
    zipped.write_bytes(b"PK\3\4, cut off")
    for path in (tmp_path / "none.npy", zipped):
        assert f"{path.name}: neither an .npy, uint8" in message(path, *data)
    assert "zipped.npy: not the classes" in message(good, *data, "--labels", zipped)
    assert "few.npy: only 5; at least 20 are needed" in message(few, *data)
    np.save(few, pixels[..., :1])
    assert "images of 1x16x16, those of --data shapes are 3x16x16" in message(few, *data)
    np.save(tmp_path / "wrong.npy", np.full(30, 10))
    flags = "--labels", tmp_path / "wrong.npy"
    assert "wrong.npy: not the classes of these samples" in message(good, *data, *flags)
    assert "--num-real 3: must be at least 20" in message(good, "--num-real", 3, code=2)
    for device in ("cuda:99", "meta"):
        flags = [str(good), "--device", device]
        said = exits_with(2, capsys, functools.partial(script.main, flags))
        assert f"--device {device}: " in said
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(200):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(photos / f"{i}.png")
    plain = message(good, "--data", photos)
    assert "no classes to train the classifier on; use --features efficientnet_lite0" in plain
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i in range(3):
        Image.new("RGB", (16 + i, 16)).save(mixed / f"{i}.png")
    assert "mixed: its images are of 3 sizes" in message(mixed, *data)
