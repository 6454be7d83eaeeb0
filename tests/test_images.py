"""Data sets: the ones that need no network, folders good and bad, and what is said when something is missing."""

import numpy as np
import pytest
import torch
from PIL import Image

import images
from images import DataError, choose_data, load_images


def save_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def test_shapes_are_the_same_for_a_seed_and_differ_between_parts():
    a, labels = load_images("shapes", train=True)
    assert a.shape == (240, 3, 32, 32) and a.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(a, load_images("shapes", train=True)[0])
    assert not torch.equal(a[:40], load_images("shapes", train=False)[0])
    assert labels.unique().tolist() == list(range(10))
    assert load_images("shapes", image_size=20)[0].shape == (240, 3, 20, 20)
    assert (a.flatten(1).float().std(1) > 5).all()  # every image shows something


def test_shape_distances_have_the_right_sign_and_slope():
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    areas = {}
    for name in images.SHAPES:
        d = images.shape_distance(name, x, y)
        areas[name] = (d < 0).double().mean().item() * 9
        slope = torch.hypot(*torch.gradient(d, spacing=0.01))
        assert slope.quantile(0.99) < 1.05, name  # never steeper than a distance, so that edges are soft, not jagged
    assert areas["circle"] == pytest.approx(np.pi * 0.81, rel=0.02)
    assert areas["square"] == pytest.approx(2, rel=0.02)
    assert areas["triangle"] == pytest.approx(1.299, rel=0.02)
    assert areas["hexagon"] == pytest.approx(2.598, rel=0.02)
    assert areas["half disc"] == pytest.approx(np.pi * 0.405, rel=0.02)
    assert areas["star"] == pytest.approx(10 * 0.5 * 0.45 * np.sin(np.pi / 5), rel=0.02)


def test_folder_of_classes(tmp_path):
    for label, name in enumerate(["ant", "bee"]):
        for i in range(20):
            save_image(tmp_path / name / f"{i:02d}.png", np.full((40, 60, 3), 100 * label + i))
    train, train_labels = load_images(str(tmp_path), image_size=16, train=True)
    test, test_labels = load_images(str(tmp_path), image_size=16, train=False)
    assert train.shape == (36, 3, 16, 16) and test.shape == (4, 3, 16, 16)
    assert train_labels.bincount().tolist() == [18, 18] and test_labels.tolist() == [0, 0, 1, 1]
    assert train[:, 0, 0, 0].tolist() == [*range(18), *range(100, 118)]
    assert test[:, 0, 0, 0].tolist() == [18, 19, 118, 119]


def test_flat_folder_grey_and_mixed(tmp_path):
    for i in range(12):
        save_image(tmp_path / "grey" / f"{i}.png", np.full((8, 8), 10 * i))
        save_image(tmp_path / "mixed" / f"{i}.png", np.full((8, 8, 3) if i else (8, 8), 10 * i))
    grey, labels = load_images(str(tmp_path / "grey"), image_size=8)
    assert grey.shape == (11, 1, 8, 8) and (labels == -1).all()
    assert load_images(str(tmp_path / "mixed"), image_size=8)[0].shape == (11, 3, 8, 8)


def test_sixteen_bits_and_one_colour_image(tmp_path):
    for i in range(20):
        save_image(tmp_path / "deep" / f"{i:02d}.png", np.zeros((8, 8)))
        save_image(tmp_path / "late" / f"{i:02d}.png", np.zeros((8, 8, 3) if i == 19 else (8, 8)))
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep" / "00.png")
    deep, _ = load_images(str(tmp_path / "deep"), image_size=8)
    assert deep.shape == (18, 1, 8, 8) and deep[0].unique().tolist() == [40_000 // 256]
    # The number of channels is the folder's, not the part's.
    assert load_images(str(tmp_path / "late"), image_size=8, train=True)[0].shape == (18, 3, 8, 8)


def test_centre_crop(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 200
    for name in "abc":
        save_image(tmp_path / f"{name}.png", wide)
    assert (load_images(str(tmp_path), image_size=8)[0] == 200).all()


def test_28_is_padded_to_32():
    picture = torch.full((2, 1, 28, 28), 9, dtype=torch.uint8)
    padded = images.resize(picture, 32)
    assert torch.equal(padded[:, :, 2:30, 2:30], picture) and padded.sum() == picture.sum()
    assert images.resize(picture, 28) is picture
    assert images.resize(picture, 64).shape == (2, 1, 64, 64)


def empty(folder):
    pass


def only_text(folder):
    (folder / "notes.txt").write_text("hello")


def one_image(folder):
    save_image(folder / "one.png", np.zeros((8, 8)))


def broken_image(folder):
    for i in range(3):
        save_image(folder / f"{i}.png", np.zeros((8, 8)))
    (folder / "2.png").write_bytes(b"\x89PNG broken")


def images_at_two_levels(folder):
    save_image(folder / "a.png", np.zeros((8, 8)))
    save_image(folder / "class" / "b.png", np.zeros((8, 8)))


@pytest.mark.parametrize(
    "prepare, message",
    [
        (empty, "no images in it"),
        (only_text, "no images in it"),
        (one_image, "1 images in it"),
        (broken_image, "2.png: cannot be read as an image"),
        (images_at_two_levels, "both directly and in sub-folders"),
    ],
)
def test_bad_folders(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path), image_size=8, train=True), load_images(str(tmp_path), image_size=8, train=False)


def test_unknown_name():
    with pytest.raises(DataError, match=r"--data cifar: neither a data set .* nor a folder"):
        load_images("cifar")


def test_offline_auto_falls_back_and_a_named_set_fails(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(images, "download", offline)
    assert choose_data("auto", full=False, data_dir=tmp_path) == "shapes"
    assert capsys.readouterr().out.count("\n") == 1
    assert choose_data("mnist", full=False, data_dir=tmp_path) == "mnist"
    with pytest.raises(DataError, match=r"mnist is not in .* and cannot be downloaded .*no network.*; put it there"):
        load_images("mnist", tmp_path)


@pytest.mark.skipif(not images.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debian_fashion_mnist():
    train, labels = load_images("fashion_mnist", train=True)
    assert train.shape == (60000, 1, 32, 32) and labels.bincount().tolist() == [6000] * 10
    test, labels = load_images("fashion_mnist", train=False)
    assert test.shape == (10000, 1, 32, 32) and labels.bincount().tolist() == [1000] * 10
    assert test[:, :, :2].sum() == 0 and 60 < test[:, :, 2:30, 2:30].float().mean() < 85


def test_class_names(tmp_path):
    assert images.class_names("shapes") == images.SHAPES
    assert images.class_names("fashion_mnist")[9] == "ankle boot" and len(images.class_names("cifar10")) == 10
    for name, count in [("b dogs", 3), ("a cats", 2), ("empty", 0)]:
        (tmp_path / name).mkdir()
        for i in range(count):
            save_image(tmp_path / name / f"{i}.png", np.zeros((8, 8, 3)))
    assert images.class_names(str(tmp_path)) == ["a cats", "b dogs"]
    _, labels = load_images(str(tmp_path), train=True)
    assert labels.tolist() == [0, 0, 1, 1]  # one of the five is the test part
    assert images.class_names(str(tmp_path / "b dogs")) == []


# -- samples on their way to disk ---------------------------------------------------------------------------------------


def open_samples(tmp_path, n=10, dtype=np.uint8, settings=None, tensors=()):
    return images.SampleFile(tmp_path / "new" / "samples.npy", (n, 3, 4, 5), dtype, settings or {"seed": 0}, tensors)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_sample_file_is_what_numpy_saves(tmp_path, dtype):
    x = torch.rand(10, 3, 4, 5) * 255
    x = x.byte() if dtype == np.uint8 else x
    file = open_samples(tmp_path, dtype=dtype)
    for index in torch.randperm(10, generator=torch.Generator().manual_seed(0)).split(4):
        file[index] = x[index]
    assert not (tmp_path / "new/samples.npy").exists()
    mapped = file.finish()
    np.save(tmp_path / "expected.npy", x.permute(0, 2, 3, 1).numpy())
    assert (tmp_path / "new/samples.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, x.permute(0, 2, 3, 1).numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.npy"]


def test_sample_file_goes_on_only_with_the_same(tmp_path, capsys):
    weights, batches = [torch.randn(3), torch.tensor(True), torch.tensor(2.0)], torch.arange(10).split(4)
    file = open_samples(tmp_path, tensors=weights)
    file[batches[1]] = torch.full((4, 3, 4, 5), 7, dtype=torch.uint8)
    again = open_samples(tmp_path, settings={"seed": 0, "out_dir": "elsewhere", "batch_size": 3}, tensors=weights)
    assert [index[0].item() for index in again.missing(batches)] == [0, 8]
    assert "samples.npy: 4 of 10 are there from an earlier run" in capsys.readouterr().out
    assert [index[0].item() for index in again.missing(torch.arange(10).split(3))] == [0, 3, 6, 9]  # 3 lacks a part
    with pytest.raises(images.DataError, match="some are missing"):
        again.finish()
    for change in (dict(settings={"seed": 1}), dict(tensors=[weights[0] + 1, *weights[1:]]), dict(n=9), dict(dtype=np.float32)):
        other = open_samples(tmp_path, **dict(tensors=weights) | change)
        assert not other.done.any() and len(other.done) == change.get("n", 10)
        file = open_samples(tmp_path, tensors=weights)
        assert not file.done.any()  # nothing of another remains
        file[batches[0]] = torch.zeros(4, 3, 4, 5, dtype=torch.uint8)


def test_sample_file_on_a_full_disk(tmp_path):
    file = open_samples(tmp_path)
    file.file.close()
    file.file = open("/dev/full", "r+b", buffering=0)
    with pytest.raises(images.DataError, match=r"part: cannot be written .*No space left.*--resume or the same --sample"):
        file[torch.arange(2)] = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(images.DataError, match="cannot be written"):
        images.SampleFile(tmp_path / "text" / "samples.npy", (1, 1, 4, 4), np.uint8, {}, [])
