"""One image file with pixels missing: in, as values and what is observed, and out again.

    picture = read_picture("depth.png", missing=0)       # or alpha 0, NaN, depth.mask.png
    write_picture(out / "depth.png", picture, filled)    # observed pixels bit for bit as they were

A pixel is missing where its alpha is 0, where it is NaN in any channel, where all its channels are
the value `missing`, or where NAME.mask.png beside NAME.ext (key `mask` of .npz) is 0. Values are
the file's own, of its own type: 8 and 16 bits, 32-bit integers and floats, whatever .npy holds.
"""

import functools
import threading
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from fused_ddpm.files import UserError, reason, write

import numpy as np
from PIL import Image, TiffImagePlugin

warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are odd, but can be read

GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes of PIL
ARRAYS = (".npy", ".npz")
# Of .npy headers, by numpy with ast.literal_eval: in two threads at once CPython 3.11 may raise
# "AST constructor recursion depth mismatch".
PARSING = threading.Lock()
MASK = ".mask.png"
LOSSLESS = ("PNG", "TIFF", "WEBP", "BMP", "PPM", "TGA")  # others come out as PNG
ORIENTATION = 0x0112  # of EXIF
SAMPLE_FORMAT = 339  # of TIFF: 2 is signed
TIFF_TAGS = (270, 282, 283, 296, 33550, 33922, 34264, 34735, 34736, 34737, 42112)  # text, dpi, geo
PROFILE, CONVERTED = 34675, ("CMYK", "YCbCr", "LAB", "HSV")  # of colours, which goes if these do


class DataError(UserError):
    """Data that is not there, or cannot be read or written: the message says what to do."""


class Header(NamedTuple):
    """What a file says of itself before its pixels are read."""

    channels: int  # without alpha
    dtype: np.dtype
    size: tuple  # (H, W)
    whole: bool  # no pixel can be missing


@dataclass(frozen=True)
class Picture:
    """An image as its file has it, in the file's own grid: not turned as EXIF says (see upright).

    values: (H, W, C), C from 1 to 4 and without alpha, in the file's units; 0 where missing.
    observed: bool (H, W).
    """

    path: Path
    values: np.ndarray
    observed: np.ndarray
    orientation: int = 1
    alpha: np.ndarray | None = None  # (H, W), of files that have one
    form: dict = field(default_factory=dict)  # what else write_picture needs


@dataclass(frozen=True)
class Scale:
    """Between a file's values and the network's [-1, 1]: low is -1, high is 1."""

    low: float = 0.0
    high: float = 255.0

    @classmethod
    def of(cls, values):
        """Of observed values: all but a thousandth at each end, and 5% more on both sides."""
        low, high = np.quantile(np.asarray(values, np.float64), [0.001, 0.999]).tolist()
        margin = 0.05 * ((high - low) or max(abs(low), 1.0))
        return cls(low - margin, high + margin)

    @property
    def unit(self):
        """What 1 is worth in the file's units: a standard deviation is to be multiplied by it."""
        return (self.high - self.low) / 2

    def to_unit_range(self, values):
        """Values -> float32 [-1, 1]; what lies beyond is clipped."""
        if values.dtype == np.uint8 and self == Scale():
            return values.astype(np.float32) / np.float32(127.5) - 1  # to_float's very bits
        x = (values.astype(np.float64) - self.low) / self.unit - 1
        return x.clip(-1, 1).astype(np.float32)

    def to_values(self, x, dtype):
        """float [-1, 1] -> values of this type, rounded if it has whole numbers only."""
        return as_dtype((np.asarray(x, np.float64) + 1) * self.unit + self.low, dtype)


def as_dtype(values, dtype):
    """Values as this type; for whole numbers rounded and clipped to its range."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return values.astype(dtype)
    info = np.iinfo(dtype)
    most = info.max if info.bits < 64 else np.nextafter(float(info.max), 0)  # float64 rounds it up
    return values.round().clip(info.min, most).astype(dtype)


def upright(array, orientation):
    """(H, W, ...) turned as EXIF's orientation, 1 to 8, says it is to be looked at."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


# -- reading ---------------------------------------------------------------------------------------


def with_one_line(read):
    """Whatever a damaged file makes its reader stumble over ends in a DataError that names it."""

    @functools.wraps(read)
    def read_or_say(path, *args):
        try:
            return read(Path(path), *args)
        except UserError:
            raise
        except Exception as error:  # PIL and numpy raise all sorts: SyntaxError, struct.error, ...
            said = f"{path}: cannot be read as an image ({reason(error)}); remove or replace it"
            raise DataError(said) from error

    return read_or_say


@with_one_line
def read_header(path, missing=None):
    """A Header, from the first bytes of the file. Raises DataError."""
    if path.suffix.lower() in ARRAYS:
        with open_array(path) as (file, _):
            (height, width, channels), dtype = array_header(path, file)[:2]
        whole = dtype.kind in "iu" and path.suffix.lower() == ".npy"
    else:
        with open_image(path) as image:
            width, height = image.size
            channels, dtype = 1 if image.mode in GREY else 3, depth(path, image)
            whole = dtype.kind in "iu" and not image.has_transparency_data
    whole = whole and missing is None and not mask_path(path).is_file()
    return Header(channels, dtype, (height, width), whole)


@with_one_line
def read_picture(path, missing=None):
    """A Picture. missing: a number that stands for "missing". Raises DataError."""
    if path.suffix.lower() in ARRAYS:
        values, observed, rest = read_array(path)
    else:
        with open_image(path) as image:
            values, observed, rest = read_image(path, image)
    if values.dtype.kind == "f":
        observed = observed & ~np.isnan(values).any(-1)
    if missing is not None:
        observed = observed & (values != missing).any(-1)
    if mask_path(path).is_file():
        observed = observed & read_mask(mask_path(path), observed.shape)
    if not observed.any():
        raise DataError(f"{path}: has no observed pixel; remove it")
    if not observed.all():
        values = np.where(observed[..., None], values, values.dtype.type(0))
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"{path}: has infinite values; make them NaN if they are missing")
    return Picture(path, values, observed, **rest)


def mask_path(path):
    return path.with_name(path.stem + MASK)


@with_one_line
def read_mask(path, shape):
    with open_image(path) as image:
        deep = image.mode.startswith("I")
        mask = np.asarray(image if deep else image.convert("RGB")) != 0
    return check_mask(path, mask if deep else mask.any(-1), shape)


def check_mask(path, mask, shape):
    if mask.shape != shape:
        here, there = ("x".join(map(str, x)) for x in (mask.shape, shape))
        raise DataError(f"{path}: the mask is {here}, the image {there}; they must agree")
    return mask


# -- of Pillow -------------------------------------------------------------------------------------


@contextmanager
def open_image(path):
    """Image.open, but not by name: Pillow would map a turned TIFF into memory, and scramble it."""
    with open(path, "rb") as file, Image.open(file) as image:
        yield image


def raw_mode(image):
    """How the file stores a pixel, where Pillow tells."""
    codec, *_, args = image.tile[0] if image.tile else ("", "")
    args = args if isinstance(args, tuple) else (args,)
    if codec == "SGI16" or (codec.startswith("ppm") and args[1:] > (255,)):
        return f"{image.mode};16"
    return str(args[0]) if args else ""


def depth(path, image):
    """The dtype of an image's values; DataError where Pillow would cut them to 8 bits."""
    raw = raw_mode(image)
    if image.mode.startswith("I;16"):
        return np.dtype(np.uint16)
    if image.mode == "I":
        if raw in ("I;16S", "I;16BS"):
            return np.dtype(np.int16)
        return np.dtype(np.uint16 if ";16" in raw else np.int32)
    if image.mode == "F":
        return np.dtype(np.float32)
    if ";16" in raw:
        raise DataError(f"{path}: 16-bit colour or alpha would lose bits; save it as .npy")
    return np.dtype(np.uint8)


def read_image(path, image):
    dtype, mode, raw = depth(path, image), image.mode, raw_mode(image)
    clear, kept = image.info.get("transparency"), image.has_transparency_data
    image.load()
    alpha, observed = None, np.ones(image.size[::-1], bool)
    if dtype != np.uint8:
        values = np.asarray(image)
        if raw == "I;32N" and values.min() < 0:  # unsigned, and Pillow wraps them
            raise DataError(f"{path}: values above 2147483647; save it as .npy")
        values = values.astype(dtype)
        if clear is not None:
            observed = values != int(clear)
    else:
        grey = mode in GREY
        colour = "L" if grey else "RGB"
        values = np.asarray(image.convert(f"{colour}A" if kept else colour))
        if kept:
            alpha = values[..., -1]
            values, observed = values[..., :-1], alpha > 0
        if mode in ("1", "L", "RGB"):  # one colour is transparent: no alpha in the file
            alpha = None
        else:
            mode = f"{colour}A" if kept else colour
    form = {"format": image.format, "mode": mode, "options": accompanying(image)}
    turned = image.getexif().get(ORIENTATION, 1)
    values = values if values.ndim == 3 else values[..., None]
    return values, observed, {"orientation": turned, "alpha": alpha, "form": form}


def accompanying(image):
    """What the new file takes from the old: colour profile, EXIF, resolution, place on earth."""
    if image.format == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        for tag in (*TIFF_TAGS, PROFILE):
            if tag in image.tag_v2 and not (tag == PROFILE and image.mode in CONVERTED):
                tags.tagtype[tag] = image.tag_v2.tagtype[tag]
                tags[tag] = image.tag_v2[tag]
        return {"tiffinfo": tags}
    options = {name: image.info.get(name) for name in ("dpi", "exif")}
    if image.mode not in CONVERTED:
        options["icc_profile"] = image.info.get("icc_profile")
    return {name: value for name, value in options.items() if value}


# -- of numpy --------------------------------------------------------------------------------------


@contextmanager
def open_array(path):
    """(file, names): a .npy, or the image in a .npz; names of its arrays, the image's first."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as file:
            yield file, [None]
        return
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        images = ["image"] if "image" in names else [name for name in names if name != "mask"]
        if len(images) != 1:
            raise DataError(f"{path}: which of its arrays is the image? Name that one `image`")
        names.sort(key=lambda name: name != images[0])
        with archive.open(f"{images[0]}.npy") as file:
            yield file, names


def array_header(path, file):
    """((H, W, C), dtype, the shape itself), checked, from a .npy file's first bytes."""
    with PARSING:
        version, _ = np.lib.format.read_magic(file)
        shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: is of {dtype}; whole numbers or floats are needed")
    if len(shape) not in (2, 3):
        raise DataError(f"{path}: has shape {shape}; (H, W) or (H, W, C) is needed")
    full = shape if len(shape) == 3 else (*shape, 1)
    if not 1 <= full[2] <= 4:
        raise DataError(f"{path}: has {full[2]} channels; (H, W, C) with C from 1 to 4 is needed")
    if full[0] * full[1] > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow stops, too
        raise DataError(f"{path}: {full[0]}x{full[1]} pixels are too many; cut it into parts")
    return full, dtype, shape


def read_array(path):
    with open_array(path) as (file, names):
        full, dtype, shape = array_header(path, file)
        file.seek(0)
        with PARSING:
            values = np.lib.format.read_array(file, allow_pickle=False).reshape(full)
    observed = np.ones(full[:2], bool)
    if "mask" in names:
        with PARSING, np.load(path) as arrays:
            mask = arrays["mask"]
        if mask.dtype.kind not in "biuf" or np.isnan(mask).any():
            raise DataError(f"{path}: its mask must hold True and False, or 1 and 0")
        observed = check_mask(path, mask != 0, full[:2])
    values = values.astype(dtype.newbyteorder("="), copy=False)
    return values, observed, {"form": {"dtype": dtype, "shape": shape, "names": names}}


# -- writing ---------------------------------------------------------------------------------------


def write_picture(path, picture, values):
    """The picture with values (H, W, C), in its units, where it has none. Returns the path written.

    Same format, type and size, and every observed pixel as it was, bit for bit. What cannot hold
    that (JPEG, palettes as in GIF, ...) becomes a PNG, and path ends in .png then. Missing pixels
    get full alpha, others keep theirs. EXIF goes along, so viewers turn the new file as the old.
    """
    path, form = Path(path), picture.form
    filled = as_dtype(np.asarray(values).reshape(picture.values.shape), picture.values.dtype)
    out = np.where(picture.observed[..., None], picture.values, filled)
    if "shape" in form:
        array, (key, *others) = out.reshape(form["shape"]).astype(form["dtype"]), form["names"]
        if key is not None:
            with np.load(picture.path) as arrays:  # coordinates and the like go along
                rest = {name: arrays[name] for name in others if name != "mask"}
            array = {key: array} | rest
        write(path, array)
        return path
    kind, options = form["format"], form["options"]
    image = to_image(picture, out)
    if kind == "TIFF" and out.dtype == np.int16:
        options["tiffinfo"][SAMPLE_FORMAT] = 2
    if kind not in LOSSLESS:
        kind, ending = ("TIFF", ".tif") if image.mode in ("I", "F") else ("PNG", ".png")
        path = path.with_suffix(ending)
    if kind == "WEBP":
        options = options | {"lossless": True, "exact": True}
    write(path, SimpleNamespace(save=functools.partial(image.save, format=kind, **options)))
    return path


def to_image(picture, out):
    mode = picture.form["mode"]
    if out.dtype == np.int16:  # Pillow has no such mode: write_picture says that it is signed
        out = out.view(np.uint16) if picture.form["format"] == "TIFF" else out.astype(np.int32)
    if mode == "I;16B" and picture.form["format"] == "TIFF":
        out = out.astype(">u2")
    if picture.alpha is not None:
        alpha = np.where(picture.observed, picture.alpha, np.uint8(255))
        out = np.concatenate([out, alpha[..., None]], axis=-1)
    image = Image.fromarray(out[..., 0] if out.shape[-1] == 1 else out)
    return image.convert("1", dither=Image.Dither.NONE) if mode == "1" else image
