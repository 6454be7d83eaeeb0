"""How near a reconstruction comes. Images are float (N, C, H, W) in [0, 1]."""

from fused_ddpm.fill import gaussian_blur, interpolate


def psnr(x, truth, where):
    """Decibels over the pixels of `where` (N, 1, H, W), each image by itself, then the mean."""
    where = where.expand_as(x)
    mse = ((x - truth) ** 2 * where).sum((1, 2, 3)) / where.sum((1, 2, 3))
    return (-10 * mse.clamp(min=1e-10).log10()).mean().item()


def ssim(x, truth, where):
    """Structural similarity (Wang et al. 2004; Gaussian window, sigma 1.5), mean over `where`."""
    inside = gaussian_blur(truth * 0 + 1, 1.5)

    def mean(image):
        return gaussian_blur(image, 1.5) / inside

    mx, my = mean(x), mean(truth)
    vx, vy = mean(x * x) - mx * mx, mean(truth * truth) - my * my
    covariance = mean(x * truth) - mx * my
    luminance = (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (vx + vy + 0.03**2)
    return (luminance * structure)[where.expand_as(x)].mean().item()


def compare(guesses, truth, where):
    """{"psnr": {name: dB}, "ssim": {name: ...}} of guesses {name: images} over `where`."""
    measures = {"psnr": psnr, "ssim": ssim}
    return {
        measure: {name: of(guess, truth, where) for name, guess in guesses.items()}
        for measure, of in measures.items()
    }


def evaluate(found, fraction):
    """Measures of what a script's `reconstruct` found, a dict, over the unseen pixels.

    draw, mean: one draw, and the mean of all; baseline: normalised convolution. fraction: of the
    pixels that are seen. "query": the same measures over the target pixels.
    """
    truth, seen, draws = found["truth"], found["cond_mask"], found["draws"]
    guesses = {"draw": draws[0], "mean": draws.mean(0)}
    guesses["baseline"] = interpolate(truth, seen, fraction)
    measured = compare(guesses, truth, where=~seen)
    measured |= {"query": compare(guesses, truth, where=found["target_mask"])}
    return measured | {"num_images": len(truth), "num_draws": len(draws), "sparsity": fraction}


def table(metrics, where="unseen"):
    """The same as lines of text, of the unseen pixels or of the "query" pixels among them."""
    measured = metrics["query"] if where == "query" else metrics
    called = {"draw": "one draw", "mean": f"mean of {metrics['num_draws']}"}
    called["baseline"] = "interpolation"
    lines = [f"{metrics['num_images']} test images, {where} pixels only:"]
    for key, decibels in measured["psnr"].items():
        similarity = measured["ssim"][key]
        lines.append(f"  {called[key]:14} PSNR {decibels:5.2f} dB   SSIM {similarity:.3f}")
    return "\n".join(lines)
