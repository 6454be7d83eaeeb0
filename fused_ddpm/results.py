"""What the sparse scripts leave behind: figures, arrays and pictures of what they reconstructed."""

from dataclasses import replace

from fused_ddpm.grids import resize
from fused_ddpm.images import as_file, to_unit
from fused_ddpm.metrics import evaluate, table
from fused_ddpm.pictures import draw_ranks, draw_reconstructions, draw_sheet, show_seen

import torch


def draw_each(run, model, sample, inputs, shape, config, file=None, parts=1):
    """K draws of each of N images by sample(seeds, *inputs), float (K, N, *shape) in [0, 1].

    inputs: tensors (N, ...). The draws of an image come one after another, for once_each. file: see
    run.samples. parts: in which each is made.
    """
    n, depends_on = len(inputs[0]), [*model.state_dict().values(), *inputs]
    count = config.num_draws * n
    samples = run.samples(count, shape, torch.float32, file, depends_on, scratch=True)
    image_by_image = torch.arange(count, device=config.device).view(config.num_draws, n).T.flatten()
    steps = config.sample_steps * parts
    for jobs in samples.missing(steps, image_by_image):  # of those not there yet this process's
        draw, i = jobs // n, jobs % n
        for x_t in sample(run.seeds((draw << 20) + i), *(x[i] for x in inputs)):
            samples.tick()
        samples.put(jobs, to_unit(x_t))
    return samples.gather().unflatten(0, (config.num_draws, n))


def write_results(run, found, intervals=None, regions=("unseen",)):
    """metrics.json, reconstructions.npz, samples.npy, pictures; the table is printed.

    found: see evaluate. intervals: of the draws, if they are fitted to such. What is on
    another grid than the truth is measured on that of the truth. regions: of the printed tables.
    """
    if not run.leads:
        return
    side = found["truth"].shape[-1]
    other = {name: x for name, x in found.items() if x.shape[-1] != side}
    seen = found | {
        name: resize(x.flatten(0, -4), side).clamp(0, 1).contiguous() for name, x in other.items()
    }
    seen["draws"] = seen["draws"].view(*found["draws"].shape[:3], side, side)
    learnt, asked = run.config.sparsity, getattr(run.config, "test_sparsity", None)
    if asked and not learnt[0] <= asked <= learnt[-1]:
        print(f"warning: the network has learnt from {learnt} of the pixels, not from {asked}")
    metrics = evaluate(seen, intervals)
    run.write("metrics.json", metrics)
    run.write("reconstructions.npz", found)
    run.write("samples.npy", as_file(found["draws"][0]))
    run.write("reconstructions.png", draw_reconstructions(seen, intervals))
    if "calibration" in metrics:
        run.write("ranks.png", draw_ranks(metrics))
    for region in regions:
        print(table(metrics, region))
    print(f"pictures, metrics.json and reconstructions.npz are in {run.dir}/")


def draw_as_classes(complete, part, data):
    """The same sparse images, of a Part, completed as if they were of each of data.classes.

    complete(part): what a script's `reconstruct` finds, one draw.
    """
    columns = {}
    for label in data.classes.tolist():
        found = complete(replace(part, labels=0 * part.labels + label))
        columns[data.class_names[label]] = found["draws"][0]
    truth, seen = found["truth"], show_seen(found["truth"], found["cond_mask"])
    return draw_sheet({"original": truth, "seen": seen} | columns)
