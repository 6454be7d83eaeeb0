"""How good are the images? A set of samples, judged beside the data that it imitates.

Both sets are seen through the features x (d numbers) of a network: one that was trained on photos,
or a classifier of the data set itself. With means m and covariances C, of samples s and real r,

    Fréchet distance    |m_s - m_r|^2 + tr(C_s + C_r - 2 (C_s C_r)^1/2)    Heusel et al. 2017
    kernel distance     MMD^2 under k(x, y) = (x.y / d + 1)^3, unbiased    Bińkowski et al. 2018
    precision           share of the samples among real images: nearer to one of those than the
                        third nearest other real one is                    Kynkäänniemi et al. 2019
    recall              share of the real images among the samples, likewise

Precision falls with bad images, recall with missing ones; the distances rise with both. A copy of
a training image would do well in all four: its distance to the nearest, in pixels, gives it away.
The classifier tells how often each class comes up, and whether it was the one asked for.
Beside each figure stands its floor: the same of test images, as many as there are samples.

    python evaluate.py out/ddpm/samples.npy            # beside the data that its run was trained on
    python evaluate.py path/to/pngs --data fashion_mnist --labels path/to/labels.npy
    python evaluate.py path/to/pngs --data path/to/photos --features efficientnet_lite0

Measured: the figures of 2,048 images beside Fashion-MNIST take 3 minutes of one core of an AMD EPYC
with AVX-512 (torch 2.14.1), most of it the classifier's training, to 91.5% of the test images.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from fused_ddpm.config import flag, make_parser
from fused_ddpm.devices import check_device
from fused_ddpm.features import TITLES, classify, extract, get_classifier, pretrained
from fused_ddpm.files import UserError, ends_in_one_line, write
from fused_ddpm.images import class_names, load_images, to_float
from fused_ddpm.pictures import draw_columns
from fused_ddpm.samples import read_labels, read_samples

import torch
from tqdm import tqdm

FEWEST = 20  # images of a set: the kernel distance has ten parts of them


@dataclass
class Settings:
    samples: str
    data: str | None = flag(None, "what they imitate; by default, of the config.json beside them")
    data_dir: str = flag("data", "where downloaded data sets are kept, and the classifier")
    labels: str | None = flag(None, "their classes, .npy; by default the labels.npy beside them")
    features: str = flag("classifier", "the network to compare in", list(TITLES))
    weights: str | None = flag(None, "of inception, where they cannot be downloaded")
    num_real: int = flag(10_000, "training images to compare features with")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda, cpu, ...")
    out_dir: str | None = flag(None, "by default beside the samples: <their name>_evaluation")


def get_config(argv):
    """Command line -> Settings. Flags that do not fit exit with status 2."""
    parser = make_parser(Settings, "evaluate", __doc__.split("\n")[0])
    parser.usage = "%(prog)s SAMPLES [flags]"
    parser.add_argument("samples", help="an .npy, uint8 (N, H, W, C), or a folder of images")
    config = Settings(**vars(parser.parse_args(argv)))
    if config.num_real < FEWEST:
        parser.error(f"--num-real {config.num_real}: must be at least {FEWEST}")
    try:
        check_device(config.device)
    except UserError as error:
        parser.error(str(error))
    return config


# --------------------------------------------------------------------------------------------------
# The figures. x and y: features, float64 (N, d) and (M, d).


def frechet_distance(x, y):
    """Between two Gaussians of their means and covariances, Heusel et al. 2017."""
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # root C_y root has the eigenvalues of C_x C_y, and is symmetric
    overlap = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return (apart + cov_x.trace() + cov_y.trace() - 2 * overlap).item()


def kernel_distance(x, y):
    """(mean, its standard error) over disjoint parts: ten or more, each of at most 1000 images."""
    n = min(len(x), len(y))
    size = min(n // 10, 1000)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    values = []
    for i in range(n // size):
        a, b = x[i * size :][:size], y[i * size :][:size]
        aa, bb, pairs = kernel(a, a), kernel(b, b), size * (size - 1)
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / pairs
        values.append(within - 2 * kernel(a, b).mean())
    values = torch.stack(values)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def share_among(x, y, k=3):
    """The share of x that lies nearer to some y than the k-th nearest other y does.

    Kynkäänniemi et al. 2019, Eq. 1: precision if y is real, recall if x is.
    """
    radii = [torch.cdist(part, y).kthvalue(k + 1).values for part in y.split(1024)]
    radii = torch.cat(radii)  # k + 1, for each y is its own nearest
    inside = [(torch.cdist(part, y) <= radii).any(1) for part in x.split(1024)]
    return torch.cat(inside).double().mean().item()


def compare(x, real, title):
    """{figure: (value, its standard error or None, real images used)}, of features x and real."""
    x = shuffled(x)  # samples may come sorted by class
    n = min(len(x), len(real))
    precision, recall = share_among(x[:n], real[:n]), share_among(real[:n], x[:n])
    return {
        title: (frechet_distance(x, real), None, len(real)),
        "kernel distance": (*kernel_distance(x, real), n),
        "precision": (precision, None, n),
        "recall": (recall, None, n),
    }


@torch.no_grad()
def nearest_images(images, training, device, k=3):
    """The k training images nearest to each image: differences and indices, (N, k).

    Root mean square differences in grey levels, of 255. Both sets: uint8 (., C, H, W).
    """
    differences, indices = [], []
    for part in tqdm(images.split(1024), "nearest training images", leave=False):
        x, values, index = part.to(device).flatten(1).float(), [], []
        for start in range(0, len(training), 8192):
            y = training[start : start + 8192].to(device).flatten(1).float()
            near = torch.cdist(x, y).topk(min(k, len(y)), largest=False)
            values.append(near.values)
            index.append(near.indices + start)
        order = torch.cat(values, 1).topk(k, largest=False).indices
        indices.append(torch.cat(index, 1).gather(1, order).cpu())
        apart = part[:, None].float() - training[indices[-1]].float()  # exact: 0 for a copy
        differences.append(apart.flatten(2).square().mean(2).sqrt())
    return torch.cat(differences), torch.cat(indices)


# --------------------------------------------------------------------------------------------------


def shuffled(x):
    """In an order that is the same each time."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def data_of_run(path):
    """The --data of the run that left these samples."""
    try:
        return str(json.loads(path.with_name("config.json").read_text())["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("--data: what do the samples imitate? no config.json tells") from error


def table(columns, heads):
    """A line for each figure: of the samples, of the test images, training images used."""
    lines = ["".join(f"{head:>20}" for head in ("", *heads, "training images"))]
    for figure, (*_, n) in columns["floor"].items():
        line = f"{figure:>20}"
        for column in ("samples", "floor"):
            value, error, _ = columns[column][figure]
            text = f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"
            line += f"{text:>20}"
        lines.append(f"{line}{n:>20}")
    return "\n".join(lines)


def run(config):
    path, device = Path(config.samples).resolve(), config.device
    out_dir = Path(config.out_dir or path.with_name(f"{path.stem}_evaluation"))
    name, samples = config.data or data_of_run(path), read_samples(path)
    parts = [load_images(name, config.data_dir, samples.shape[-1], t) for t in (True, False)]
    training, test = [[shuffled(x) for x in part] for part in parts]  # folders: sorted by class
    here, there = ("x".join(map(str, x.shape[1:])) for x in (samples, test[0]))
    if here != there:
        raise UserError(f"{path}: images of {here}, those of --data {name} are {there}")
    for what, images in (path, samples), (f"--data {name}: of test images", test[0]):
        if len(images) < FEWEST:
            raise UserError(f"{what}: only {len(images)}; at least {FEWEST} are needed")
    names, few = class_names(name), len(class_names(name)) < 2
    if few and config.features == "classifier":
        cure = "no classes to train the classifier on; use --features efficientnet_lite0"
        raise UserError(f"--data {name}: has {cure}")
    labels = Path(config.labels) if config.labels else path.with_name("labels.npy")
    asked = config.labels or (labels.exists() and not few)
    labels = read_labels(labels, len(samples), len(names)) if asked else None
    print(f"evaluate.py: data {name} ({len(training[0])} images of {there}), device {device}")
    network, title = pretrained(config.features, device, config.weights), TITLES[config.features]
    n = min(len(samples), len(test[0]))
    about = {"samples": str(path), "data": name, "num_samples": len(samples), "num_floor": n}
    if not few:
        classifier, accuracy = get_classifier(config.data_dir, training, test, len(names), device)
        about["classifier_test_accuracy"] = accuracy
        print(f"classifier: {accuracy:.1%} of {len(test[0])} test images right")
        network = network or (lambda images: classifier.features(to_float(images)))

    real = extract(network, training[0][: config.num_real], device, "training images")
    columns = {}
    for column, images, truth in ("floor", test[0][:n], test[1][:n]), ("samples", samples, labels):
        features = extract(network, images, device, column)
        figures = columns[column] = compare(features, real, title)
        apart, index = nearest_images(images, training[0], device)
        if column == "floor":
            near = apart[:, 0].quantile(0.01)
        closer = (apart[:, 0] < near).double().mean().item()
        figures["nearest in training"] = (apart[:, 0].median().item(), None, len(training[0]))
        figures["nearer than 99%"] = (closer, None, len(training[0]))
        if not few:
            classes = classify(classifier, images, device)
            shares = classes.bincount(minlength=len(names)) / len(images)
            for label, share in zip(names, shares.tolist(), strict=True):
                figures[f"class {label}"] = (share, None, len(training[0]))
            if labels is not None:
                right = (classes == truth).double().mean().item()
                figures["class accuracy"] = (right, None, len(training[0]))

    chosen = torch.cat([torch.arange(8), apart[:, 0].argsort()[:8]])  # samples: first and nearest
    heads = enumerate(("nearest", "second", "third"))
    page = {"sample": samples[chosen]} | {h: training[0][index[chosen, k]] for k, h in heads}
    for column, figures in columns.items():
        keys = ("value", "standard_error", "num_training")
        about[column] = {k: dict(zip(keys, v, strict=True)) for k, v in figures.items()}
    write(out_dir / "metrics.json", about)
    write(out_dir / "neighbours.png", draw_columns(page, [f"{apart[i, 0]:.1f}" for i in chosen]))
    print(table(columns, (f"{len(samples)} samples", f"{n} test images")))
    print(f"metrics.json and neighbours.png are in {out_dir}/")


def main(argv=None):
    with ends_in_one_line("evaluate"):
        run(get_config(argv))


if __name__ == "__main__":
    main()
