"""Data sets: those that need no network, folders good and bad, what is said of missing ones."""

import cfg_ddpm
import ddpm
from fused_ddpm import images, shapes
from fused_ddpm.files import UserError
from fused_ddpm.images import (
    Data,
    DataError,
    as_file,
    choose_data,
    class_numbers,
    load_images,
    mirror_half,
    to_bytes,
    to_float,
    to_unit,
)

import numpy as np
import pytest
import torch
from helpers import make_config
from PIL import Image


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
    for name in shapes.NAMES:
        d = shapes.shape_distance(name, x, y)
        areas[name] = (d < 0).double().mean().item() * 9
        slope = torch.hypot(*torch.gradient(d, spacing=0.01))
        # Never steeper than a distance, so that edges are soft, not jagged.
        assert slope.quantile(0.99) < 1.05, name
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


def test_one_colour_image_among_grey_ones(tmp_path):
    for i in range(20):
        save_image(tmp_path / "late" / f"{i:02d}.png", np.zeros((8, 8, 3) if i == 19 else (8, 8)))
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
        for train in (True, False):
            load_images(str(tmp_path), image_size=8, train=train)


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
    said = r"mnist is not in .* and cannot be downloaded .*no network.*; put it there"
    with pytest.raises(DataError, match=said):
        load_images("mnist", tmp_path)


@pytest.mark.skipif(
    not images.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist"
)
def test_debian_fashion_mnist():
    train, labels = load_images("fashion_mnist", train=True)
    assert train.shape == (60000, 1, 32, 32) and labels.bincount().tolist() == [6000] * 10
    test, labels = load_images("fashion_mnist", train=False)
    assert test.shape == (10000, 1, 32, 32) and labels.bincount().tolist() == [1000] * 10
    assert test[:, :, :2].sum() == 0 and 60 < test[:, :, 2:30, 2:30].float().mean() < 85


def test_class_names(tmp_path):
    assert images.class_names("shapes") == shapes.NAMES
    assert images.class_names("fashion_mnist")[9] == "ankle boot"
    assert len(images.class_names("cifar10")) == 10
    for name, count in [("b dogs", 3), ("a cats", 2), ("empty", 0)]:
        (tmp_path / name).mkdir()
        for i in range(count):
            save_image(tmp_path / name / f"{i}.png", np.zeros((8, 8, 3)))
    assert images.class_names(str(tmp_path)) == ["a cats", "b dogs"]
    _, labels = load_images(str(tmp_path), train=True)
    assert labels.tolist() == [0, 0, 1, 1]  # one of the five is the test part
    assert images.class_names(str(tmp_path / "b dogs")) == []


# -- numbers and classes ---------------------------------------------------------------------------


def test_bytes_to_numbers_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    x = to_float(every)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_bytes(x), every)
    assert to_bytes(torch.tensor([-1.5, 1.5, 0.4 / 127.5])).tolist() == [0, 255, 128]
    torch.testing.assert_close(to_unit(x), every / 255)
    assert to_unit(torch.tensor([-1.5, 1.5])).tolist() == [0, 1]
    pictures = every.view(2, 1, 8, 16).expand(-1, 3, -1, -1)
    saved = as_file(to_unit(to_float(pictures)))
    assert saved.dtype == np.uint8 and np.array_equal(saved, pictures.movedim(1, -1).numpy())


COLOURS = ["red", "green", "blue", "T-shirt"]


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3,0", [3, 0]),
        ("Green, t-shirt,0", [1, 3, 0]),
        ("blue,blue,red", [2, 2, 0]),
    ],
)
def test_classes_by_name_or_number(text, expected):
    assert class_numbers(text, COLOURS) == expected


@pytest.mark.parametrize(
    "text, wrong", [("4", "4"), ("-1", "-1"), ("red,purple", "purple"), ("", ""), ("red,", "")]
)
def test_classes_that_do_not_exist(text, wrong):
    said = rf"--classes {text}: '{wrong}' is none of the classes: 0 red, 1 green"
    with pytest.raises(UserError, match=said):
        class_numbers(text, COLOURS)


# -- the parts of a data set -----------------------------------------------------------------------


def test_parts_are_disjoint_and_shuffled_but_the_same_each_time():
    data = Data(make_config(ddpm))
    assert data.name == "shapes" and data.shape == (3, 16, 16)
    assert data.images.shape == (216, 3, 16, 16) and data.images.dtype == torch.uint8
    assert data.train.labels.shape == (216,) and data.train.labels.dtype == torch.int64
    assert data.test_part(99).images.shape == (40, 3, 16, 16)
    assert {name: len(part[0]) for name, part in data.held_out.items()} == {"val": 24, "test": 40}
    whole, labels = load_images("shapes", image_size=16, train=True)
    _, val = data.held_out["val"]
    parts = torch.cat([val.images, data.images])
    part_labels = torch.cat([val.labels, data.train.labels])

    def in_order(images, labels):
        rows = torch.cat([labels[:, None].byte(), images.flatten(1)], dim=1)
        return sorted(row.numpy().tobytes() for row in rows)

    assert in_order(parts, part_labels) == in_order(whole, labels)
    assert not torch.equal(parts, whole)
    assert torch.equal(Data(make_config(ddpm, seed=5)).images, data.images)  # whatever the seed
    assert data.facts == {"shape": [3, 16, 16], "class_names": shapes.NAMES, "scale": None}
    held_out = [part for _, part in data.held_out.values()]
    assert all(part.observed is None for part in (data.train, data.test_part(9), *held_out))


def test_held_out_images_are_128_at_most_and_once_more_without_a_class(monkeypatch):
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 1500, False: 140})
    data = Data(make_config(cfg_ddpm), labelled=True)
    held_out = data.held_out
    assert held_out.keys() == {"val", "test", "val_uncond"}
    assert all(torch.equal(index, torch.arange(128)) for index, _ in held_out.values())
    val, uncond = held_out["val"][1], held_out["val_uncond"][1]
    assert len(val) == 128 and torch.equal(val.images, uncond.images)
    assert (uncond.labels == 10).all() and val.labels.max() < 10
    assert len(data.test_part(999)) == 140 and data.images.shape[0] == 1350
    assert data.most_held_out == 150
    rest = {name: index.tolist() for name, (index, _) in data.held_out_batch(128).items()}
    assert rest.pop("test") == list(range(128, 140))
    assert rest == {"val": list(range(128, 150)), "val_uncond": list(range(128, 150))}
    assert torch.equal(data.held_out_batch(128)["test"][1].images, data.test_part(999).images[128:])
    assert data.held_out_batch(140, 5).keys() == {"val", "val_uncond"}


def test_the_facts_of_a_checkpoint_are_enough_to_sample():
    facts = {"shape": [1, 24, 24], "class_names": ["cat", "dog"]}
    config = make_config(cfg_ddpm, data="/gone", image_size=16, classes="dog")
    data = Data(config, facts, labelled=True)
    assert data.shape == (1, 24, 24) and data.class_names == ["cat", "dog"]
    assert data.classes.tolist() == [1] and data.name == "/gone"
    assert data.facts == facts | {"scale": None}  # as of a checkpoint older than scales


def test_auto_is_settled_in_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(images, "download", lambda *args: 1 / 0)
    config = make_config(ddpm, data="auto", data_dir=str(tmp_path))
    assert Data(config).name == config.data == "shapes"


def test_classes_are_needed_where_they_are(tmp_path):
    for i in range(12):
        save_image(tmp_path / f"{i}.png", np.full((16, 16, 3), 10 * i))
    data = Data(make_config(ddpm, data=str(tmp_path)))
    assert data.class_names == [] and len(data.images) == 10 and len(data.test_part(9)) == 1
    said = r"has no classes; sort its images into one sub-folder for each"
    with pytest.raises(UserError, match=said):
        Data(make_config(cfg_ddpm, data=str(tmp_path)), labelled=True)


def test_too_few_images_for_the_processes(tmp_path, monkeypatch):
    for i in range(4):
        save_image(tmp_path / f"{i}.png", np.full((16, 16, 3), 10 * i))
    monkeypatch.setattr(images, "world", lambda: 3)
    monkeypatch.setattr(images, "from_first", lambda value: value)
    data = Data(make_config(ddpm, data=str(tmp_path)))
    with pytest.raises(UserError, match="2 training images are too few for 3 processes"):
        len(data.images)


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"shape": [1, 16, 16], "class_names": shapes.NAMES}, "is for 1x16x16, this is 3x16x16"),
        ({"shape": [3, 16, 16], "class_names": ["cat", "dog"]}, "is for the classes cat, dog"),
    ],
)
def test_data_that_do_not_fit_the_checkpoint_are_refused(facts, said):
    data = Data(make_config(cfg_ddpm), facts, labelled=True)
    with pytest.raises(UserError, match=f"--data shapes: the checkpoint {said}"):
        len(data.images)


def test_what_is_no_data_set_says_so_where_classes_are_needed(tmp_path):
    with pytest.raises(UserError, match="neither a data set"):
        Data(make_config(cfg_ddpm, data="misspelt"), labelled=True)


def test_half_are_mirrored_with_all_that_belongs_to_them():
    x, keys = torch.arange(2000.0 * 12).view(2000, 2, 2, 3), torch.arange(2000)
    one, mask = mirror_half(keys, x, x[:, :1] % 2 == 0)
    turned = (one != x).flatten(1).any(1)
    assert 0.45 < turned.float().mean() < 0.55
    assert torch.equal(one[turned], x[turned].flip(-1)) and torch.equal(mask, one[:, :1] % 2 == 0)
    assert torch.equal(mirror_half(keys[7:9], x[7:9])[0], one[7:9])
