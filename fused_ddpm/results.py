"""What the sparse scripts leave behind: figures, arrays and pictures of what they reconstructed."""

from fused_ddpm.grids import resize
from fused_ddpm.images import as_file
from fused_ddpm.metrics import evaluate, table
from fused_ddpm.pictures import draw_ranks, draw_reconstructions


def write_results(run, found, intervals=None, regions=("unseen",)):
    """metrics.json, reconstructions.npz, samples.npy, pictures; the table is printed.

    found: see evaluate. intervals: of the draws, if they are fitted to such. What is on
    another grid than the truth is measured on that of the truth. regions: of the printed tables.
    """
    if not run.leads:
        return
    side = found["truth"].shape[-1]
    other = {name: x for name, x in found.items() if x.shape[-1] != side}
    seen = found | {name: resize(x.flatten(0, -4), side).contiguous() for name, x in other.items()}
    seen["draws"] = seen["draws"].view(*found["draws"].shape[:3], side, side)
    learnt, asked = run.config.sparsity, getattr(run.config, "test_sparsity", None)
    if asked and not learnt[0] <= asked <= learnt[-1]:
        run.say(f"warning: the network has learnt from {learnt} of the pixels, not from {asked}")
    metrics = evaluate(seen, intervals)
    run.write("metrics.json", metrics)
    run.write("reconstructions.npz", found)
    run.write("samples.npy", as_file(found["draws"][0]))
    run.write("reconstructions.png", draw_reconstructions(seen, intervals))
    if "calibration" in metrics:
        run.write("ranks.png", draw_ranks(metrics))
    for region in regions:
        run.say(table(metrics, region))
    run.say(f"pictures, metrics.json and reconstructions.npz are in {run.dir}/")
