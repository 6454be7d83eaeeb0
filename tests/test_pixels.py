"""Files with pixels missing: every format in and out, what is observed, and bad files."""

import itertools
import struct
import zlib

from fused_ddpm.files import UserError
from fused_ddpm.images import to_bytes, to_float
from fused_ddpm.pixels import (
    DataError,
    Scale,
    as_dtype,
    read_header,
    read_picture,
    upright,
    write_picture,
)

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

H, W = 7, 5
RNG = np.random.default_rng(0)
HOLES = RNG.random((H, W)) < 0.4
HOLES[0, 0], HOLES[1, 1] = False, True


def colours(*channels, dtype=np.uint8):
    high = 255 if dtype == np.uint8 else 60_000
    return RNG.integers(1, high, (H, W, *channels)).astype(dtype)


def with_alpha(values):
    alpha = np.where(HOLES, 0, RNG.integers(1, 256, (H, W))).astype(np.uint8)
    values = values if values.ndim == 3 else values[..., None]
    return np.concatenate([values, alpha[..., None]], axis=-1)


def save(path, array, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def filled_with(path, fill, out=None, missing=None):
    """(picture, the file written after filling, read by nothing of ours)."""
    picture = read_picture(path, missing)
    out = out or path.with_name(f"filled{path.suffix}")
    written = write_picture(out, picture, np.full(picture.values.shape, fill, np.float64))
    return picture, written


# -- in and out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "tga"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_alpha_is_what_is_missing(tmp_path, ending, channels):
    if ending == "webp" and not channels:
        pytest.skip("WebP has no greyscale")
    array = with_alpha(colours(*channels))
    path = save(tmp_path / f"a.{ending}", array, **{"lossless": True} if ending == "webp" else {})
    picture, written = filled_with(path, 99.6)
    count = array.shape[-1] - 1
    assert picture.values.shape == (H, W, count) and picture.values.dtype == np.uint8
    assert np.array_equal(picture.observed, ~HOLES)
    assert np.array_equal(picture.values[~HOLES], array[~HOLES][:, :-1])
    assert (picture.values[HOLES] == 0).all()  # whatever the file has under its holes
    new = Image.open(written)
    assert new.format == Image.open(path).format and new.mode == Image.open(path).mode
    new = np.asarray(new)
    assert np.array_equal(new[~HOLES], array[~HOLES])  # alpha too
    assert (new[HOLES] == [100] * count + [255]).all()


def test_one_transparent_colour_and_palettes(tmp_path):
    array = colours(3)
    array[HOLES] = (9, 8, 7)
    save(tmp_path / "rgb.png", array, transparency=(9, 8, 7))
    grey = colours()
    grey[HOLES] = 200
    grey[~HOLES] //= 2
    save(tmp_path / "grey.png", grey, transparency=200)
    deep = Image.fromarray(np.where(HOLES, 3, 500).astype(np.uint16))
    save(tmp_path / "deep.png", deep, transparency=3)
    for name, mode in [("rgb", "RGB"), ("grey", "L"), ("deep", "I;16")]:
        picture, written = filled_with(tmp_path / f"{name}.png", 5)
        assert np.array_equal(picture.observed, ~HOLES), name
        new = Image.open(written)
        assert new.mode == mode and not new.has_transparency_data
        old = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert np.array_equal(np.asarray(new)[~HOLES], old[~HOLES])
    index = Image.fromarray(np.where(HOLES, 0, 1 + colours() % 3).astype(np.uint8))
    index.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert index.mode == "P"
    for name in ("palette.gif", "palette.png"):
        save(tmp_path / name, index, transparency=0)
        picture, written = filled_with(tmp_path / name, 5)
        assert np.array_equal(picture.observed, ~HOLES)
        assert Image.open(written).format == "PNG" and Image.open(written).mode == "RGBA"
        old = np.asarray(Image.open(tmp_path / name).convert("RGBA"))
        assert np.array_equal(np.asarray(Image.open(written))[~HOLES], old[~HOLES])
        assert not read_header(tmp_path / name).whole
    save(tmp_path / "whole.gif", index)
    assert read_header(tmp_path / "whole.gif").whole
    assert read_picture(tmp_path / "whole.gif").values.shape == (H, W, 3)


@pytest.mark.parametrize(
    "name, dtype, file_type",
    [
        ("a.png", np.uint16, np.uint16),
        ("a.tif", np.uint16, np.uint16),
        ("a.tif", np.uint16, ">u2"),
        ("a.pgm", np.uint16, np.uint16),
        ("a.tif", np.int32, np.int32),
        ("a.tif", np.float32, np.float32),
        ("a.pfm", np.float32, np.float32),
    ],
)
def test_depth_is_kept(tmp_path, name, dtype, file_type):
    array = colours(dtype=dtype)
    array[HOLES] = 7
    array[~HOLES & (array == 7)] = 8
    if dtype != np.uint16:
        array = -array
    path = save(tmp_path / name, array.astype(file_type))
    before = np.asarray(Image.open(path))
    picture, written = filled_with(path, 70_000, missing=array[HOLES][0])
    assert picture.values.dtype == dtype and np.array_equal(picture.observed, ~HOLES)
    assert np.array_equal(picture.values[~HOLES][:, 0], array[~HOLES])
    new = Image.open(written)
    assert (new.mode, new.format) == (Image.open(path).mode, Image.open(path).format)
    new = np.asarray(new)
    assert new.dtype == before.dtype and np.array_equal(new[~HOLES], array[~HOLES])
    assert (new[HOLES] == (65_535 if dtype == np.uint16 else 70_000)).all()
    assert read_header(path).dtype == dtype and read_header(path).size == (H, W)


def tiff(path, array, photometric=1, sample_format=1):
    """A TIFF written by hand: one strip, little-endian."""
    array = array.astype(array.dtype.newbyteorder("<"))
    channels = 1 if array.ndim == 2 else array.shape[2]
    bits = array.dtype.itemsize * 8
    data = array.tobytes()
    ends = 8 + len(data)
    tags = [(256, 4, W), (257, 4, H), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, channels), (278, 4, H), (279, 4, len(data))]
    tags += [(339, 3, sample_format)]
    extra = struct.pack("<3H", bits, bits, bits)
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        count = 3 if tag == 258 and channels == 3 else 1
        value = ends + 2 + 12 * len(tags) + 4 if count == 3 else value
        directory += struct.pack("<HHII", tag, kind, count, value)
    header = b"II*\0" + struct.pack("<I", ends)
    path.write_bytes(header + data + directory + b"\0" * 4 + extra)
    return path


def test_signed_16_bits_stay_so(tmp_path):
    metres = (colours(dtype=np.int32) - 30_000).astype(np.int16)
    metres[HOLES] = -32_768
    path = tiff(tmp_path / "a.tif", metres, sample_format=2)
    assert np.array_equal(
        np.asarray(Image.open(path)), metres
    )  # the file is what it is meant to be
    picture, written = filled_with(path, -1234.4, missing=-32_768)
    assert picture.values.dtype == np.int16 and np.array_equal(picture.observed, ~HOLES)
    again = read_picture(written)
    assert again.values.dtype == np.int16 and (again.values[HOLES] == -1234).all()
    assert np.array_equal(again.values[~HOLES][:, 0], metres[~HOLES])
    assert Image.open(written).tag_v2[258] == (16,)


def test_unsigned_32_bits_as_far_as_pillow_goes(tmp_path):
    values = colours(dtype=np.uint32)
    assert (read_picture(tiff(tmp_path / "a.tif", values)).values[..., 0] == values).all()
    values[2, 2] = 3_000_000_000
    with pytest.raises(DataError, match=r"b.tif: values above 2147483647; save it as .npy"):
        read_picture(tiff(tmp_path / "b.tif", values))


def png(path, size, bits, colour_type, rows):
    """By hand, for what Pillow does not write. rows: bytes."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def sixteen_bit_png(path, channels, colour_type):
    array = colours(channels, dtype=np.uint16).astype(">u2")
    return png(path, (W, H), 16, colour_type, b"".join(b"\0" + row.tobytes() for row in array))


def test_what_pillow_would_cut_to_8_bits_is_refused(tmp_path):
    files = [
        sixteen_bit_png(tmp_path / "rgb.png", 3, 2),
        sixteen_bit_png(tmp_path / "la.png", 2, 4),
        sixteen_bit_png(tmp_path / "rgba.png", 4, 6),
        tiff(tmp_path / "rgb.tif", colours(3, dtype=np.uint16), photometric=2),
        save(tmp_path / "rgb.sgi", colours(3), bpc=2),
        tmp_path / "rgb.ppm",
    ]
    raw = colours(3, dtype=np.uint16).astype(">u2").tobytes()
    files[-1].write_bytes(b"P6 %d %d 65535\n" % (W, H) + raw)
    for path in files:
        for read in (read_header, read_picture):
            with pytest.raises(DataError, match=r"would lose bits; save it as \.npy") as error:
                read(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(H, W), (H, W, 1), (H, W, 2), (H, W, 4)])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "f2"])
def test_numpy_files(tmp_path, shape, dtype):
    array = RNG.normal(size=shape).astype(dtype)
    array[HOLES] = np.nan
    if len(shape) == 3:
        array[1, 1, 1:] = 3  # NaN in one channel is enough
    np.save(tmp_path / "a.npy", array)
    picture, written = filled_with(tmp_path / "a.npy", 0.25)
    assert np.array_equal(picture.observed, ~HOLES) and not np.isnan(picture.values).any()
    assert picture.values.shape == (H, W, shape[2] if len(shape) == 3 else 1)
    new = np.load(written)
    assert new.dtype == array.dtype and new.shape == shape
    assert new[~HOLES].tobytes() == array[~HOLES].tobytes() and (new[HOLES] == 0.25).all()
    header = read_header(tmp_path / "a.npy")
    assert (header.channels, header.size, header.whole) == (picture.values.shape[2], (H, W), False)


def test_npz(tmp_path):
    array, latitudes = colours(2, dtype=np.int16), np.arange(H) / 7
    mask = np.where(HOLES, 0, 1)
    np.savez(tmp_path / "a.npz", mask=mask, depth=array)
    np.savez_compressed(tmp_path / "b.npz", latitudes=latitudes, image=array, mask=mask > 0)
    for name in "ab":
        picture, written = filled_with(tmp_path / f"{name}.npz", -3, tmp_path / f"{name}2.npz")
        assert np.array_equal(picture.observed, ~HOLES) and picture.values.dtype == np.int16
        with np.load(written) as new:
            key = "depth" if name == "a" else "image"
            assert new[key].dtype == np.int16 and np.array_equal(new[key][~HOLES], array[~HOLES])
            assert (new[key][HOLES] == -3).all() and "mask" not in new
            assert name == "a" or np.array_equal(new["latitudes"], latitudes)


def test_a_mask_beside_the_image(tmp_path):
    array = colours(3)
    path = save(tmp_path / "a.b.bmp", array)
    assert read_header(path).whole and read_picture(path).observed.all()
    for mask in (~HOLES * np.uint8(255), ~HOLES * np.uint16(1), (~HOLES)[..., None] * colours(3)):
        save(tmp_path / "a.b.mask.png", mask)
        assert np.array_equal(read_picture(path).observed, ~HOLES)
    Image.fromarray(~HOLES).save(tmp_path / "a.b.mask.png")  # of one bit
    picture, written = filled_with(path, 300)
    assert np.array_equal(picture.observed, ~HOLES) and not read_header(path).whole
    new = np.asarray(Image.open(written))
    assert np.array_equal(new[~HOLES], array[~HOLES]) and (new[HOLES] == 255).all()


def test_the_kinds_of_missing_add_up(tmp_path):
    array = RNG.normal(size=(H, W, 2)).astype(np.float32)
    array[0, 1] = -9999
    array[0, 2] = np.float32(-1e34)
    array[0, 3, 0] = np.nan
    array[0, 4, 0] = -9999  # in one channel only: a value
    np.savez(tmp_path / "a.npz", image=array, mask=np.arange(H)[:, None] < np.full(W, H - 1))
    seen = read_picture(tmp_path / "a.npz", -9999).observed
    assert seen[0].tolist() == [True, False, True, False, True] and not seen[-1].any()
    assert not read_picture(tmp_path / "a.npz", -1e34).observed[0, 2]


def test_what_cannot_be_kept_is_written_as_png(tmp_path):
    jpeg = save(tmp_path / "a.jpg", colours(3))
    save(tmp_path / "a.mask.png", ~HOLES)
    _, written = filled_with(jpeg, 50)
    assert written == tmp_path / "filled.png" and not (tmp_path / "filled.jpg").exists()
    new, old = np.asarray(Image.open(written)), np.asarray(Image.open(jpeg))
    assert np.array_equal(new[~HOLES], old[~HOLES]) and (new[HOLES] == 50).all()
    ink = save(tmp_path / "ink.jpg", Image.fromarray(colours(3)).convert("CMYK"))
    assert Image.open(ink).mode == "CMYK"
    _, written = filled_with(ink, 50, tmp_path / "ink2.jpg")
    assert Image.open(written).mode == "RGB"
    bits = save(tmp_path / "bits.png", Image.fromarray(~HOLES))
    _, written = filled_with(bits, 50, tmp_path / "bits2.png")
    assert Image.open(written).mode == "1" and np.array_equal(
        np.asarray(Image.open(written)), ~HOLES
    )


def test_the_grid_is_the_files_own_and_viewers_turn_both(tmp_path):
    scene = Image.fromarray(colours(3))
    for turn, ending in itertools.product(range(1, 9), ("png", "jpg", "webp")):
        exif = Image.Exif()
        exif[0x0112] = turn
        path = save(tmp_path / f"{turn}.{ending}", scene, exif=exif)
        picture, written = filled_with(path, 0, tmp_path / f"{turn}b.{ending}")
        assert picture.orientation == turn and picture.values.shape == (H, W, 3)
        assert np.array_equal(np.asarray(Image.open(written)), np.asarray(Image.open(path)))
        assert Image.open(written).getexif()[0x0112] == turn
        seen = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        assert np.array_equal(upright(picture.values, turn), seen)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_come_upright(tmp_path, compression):
    exif = Image.Exif()
    exif[0x0112] = 6
    array = colours()
    path = save(tmp_path / "a.tif", array, exif=exif, compression=compression)
    picture, written = filled_with(path, 0)
    assert np.array_equal(picture.values[..., 0], np.rot90(array, -1)) and picture.orientation == 1
    assert read_header(path).size == (W, H)
    assert np.array_equal(np.asarray(Image.open(written)), np.rot90(array, -1))


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
def test_a_colour_profile_goes_along(tmp_path, ending):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / f"a.{ending}", Image.fromarray(colours(3)), icc_profile=profile)
    save(tmp_path / "a.mask.png", ~HOLES)
    _, written = filled_with(path, 0)
    assert Image.open(written).info["icc_profile"] == profile


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint8])
def test_whole_numbers_are_clipped_to_their_range(dtype):
    info = np.iinfo(dtype)
    low, middle, high = as_dtype(np.array([-1e30, 6.6, 1e30]), dtype).tolist()
    assert low == info.min and middle == 7 and 0.999 * info.max < high <= info.max


def test_plain_text_formats(tmp_path):
    (tmp_path / "a.pbm").write_bytes(b"P1\n3 2\n1 0 1 0 0 1\n")
    (tmp_path / "a.pgm").write_bytes(b"P2\n3 2\n1000\n1 0 1 0 0 1000\n")
    assert read_picture(tmp_path / "a.pbm").values[..., 0].tolist() == [[0, 255, 0], [255, 255, 0]]
    deep = read_picture(tmp_path / "a.pgm").values
    assert deep.dtype == np.uint16 and deep[..., 0].tolist() == [[66, 0, 66], [0, 0, 65_535]]


def test_a_geotiff_stays_in_its_place(tmp_path):
    tags = {33550: (30.0, 30.0, 0.0), 33922: (0.0, 0.0, 0.0, 4e5, 5e6, 0.0), 270: "depth"}
    info = ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
        info.tagtype[tag] = 2 if tag == 270 else 12
    metres = RNG.normal(size=(H, W)).astype(np.float32)
    metres[HOLES] = np.nan
    path = save(tmp_path / "a.tif", metres, tiffinfo=info)
    _, written = filled_with(path, -4000)
    new = Image.open(written)
    assert {tag: new.tag_v2[tag] for tag in tags} == tags
    assert np.asarray(new)[~HOLES].tobytes() == metres[~HOLES].tobytes()
    assert (np.asarray(new)[HOLES] == -4000).all()


# -- scale -----------------------------------------------------------------------------------------


def test_8_bits_scale_as_ever():
    every = np.arange(256, dtype=np.uint8)
    x = Scale().to_unit_range(every)
    assert np.array_equal(x, to_float(torch.from_numpy(every)).numpy())
    assert np.array_equal(Scale().to_values(x, np.uint8), every)
    loose = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)
    assert np.array_equal(
        Scale().to_values(loose, np.uint8), to_bytes(torch.from_numpy(loose)).numpy()
    )


def test_scale_of_anything_else():
    scale = Scale.of(np.linspace(-1000, 1000, 100_001))
    assert scale.low == pytest.approx(-998 * 1.1) and scale.high == pytest.approx(998 * 1.1)
    assert scale.unit == pytest.approx(998 * 1.1)
    x = scale.to_unit_range(np.array([-5000.0, 0, 998 * 1.1, np.nan]))
    assert x.dtype == np.float32 and x[:3].tolist() == pytest.approx([-1, 0, 1]) and np.isnan(x[3])
    depths = RNG.uniform(-900, 900, 50)
    back = scale.to_values(scale.to_unit_range(depths), np.float64)
    np.testing.assert_allclose(back, depths, atol=1e-4)
    for constant in (0.0, 1e-9, 7.0, -1e30):
        scale = Scale.of(np.full(10, constant, np.float32))
        value = np.array([constant], np.float32)
        assert scale.low < scale.high
        assert scale.to_values(scale.to_unit_range(value), np.float32) == pytest.approx(constant)


def test_values_are_rounded_and_clipped_to_whole_numbers():
    x = np.array([-1e9, -0.6, 0.4, 254.6, 1e9])
    assert as_dtype(x, np.uint8).tolist() == [0, 0, 0, 255, 255]
    assert as_dtype(x, np.int16).tolist() == [-32_768, -1, 0, 255, 32_767]
    assert as_dtype(x, np.float32).tolist() == x.astype(np.float32).tolist()


# -- bad files -------------------------------------------------------------------------------------


def refused(path, said, missing=None):
    with pytest.raises(DataError, match=said) as error:
        read_picture(path, missing)
    assert "\n" not in str(error.value) and str(path.parent) in str(error.value)


def test_bad_arrays(tmp_path):
    cases = {
        "whole numbers or floats": np.zeros((4, 4), complex),
        "is of bool": np.zeros((4, 4), bool),
        "has 5 channels": np.zeros((4, 4, 5)),
        "has shape": np.zeros(4),
        "infinite values": np.array([[1, np.inf]]),
        "no observed pixel; remove it": np.full((4, 4), np.nan),
    }
    for said, array in cases.items():
        np.save(tmp_path / "a.npy", array)
        refused(tmp_path / "a.npy", said)
        np.savez(tmp_path / "a.npz", array)
        refused(tmp_path / "a.npz", said)
    np.save(tmp_path / "a.npy", np.array([[None]]), allow_pickle=True)
    refused(tmp_path / "a.npy", "is of object")
    np.save(tmp_path / "a.npy", np.zeros((0, 5)))
    refused(tmp_path / "a.npy", "no observed pixel")
    np.savez(tmp_path / "a.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    refused(tmp_path / "a.npz", "which of its arrays is the image")
    for mask, said in [(np.ones((2, 3)), "the mask is 2x3, the image 2x2"), (np.nan, "its mask")]:
        np.savez(tmp_path / "a.npz", image=np.ones((2, 2)), mask=mask)
        refused(tmp_path / "a.npz", said)
    with open(tmp_path / "huge.npy", "wb") as file:  # says it is, and ends there
        header = {"descr": "<f8", "fortran_order": False, "shape": (40_000, 40_000)}
        np.lib.format.write_array_header_1_0(file, header)
    refused(tmp_path / "huge.npy", "40000x40000 pixels are too many")


def test_bad_images(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((H, W), np.uint8))
    refused(path, "no observed pixel", missing=0)
    save(tmp_path / "a.mask.png", np.ones((W, H), np.uint8))
    refused(path, "a.mask.png: the mask is 5x7, the image 7x5")
    (tmp_path / "a.mask.png").write_bytes(b"nonsense")
    refused(path, "a.mask.png: cannot be read as an image")
    clear = np.zeros((H, W, 4), np.uint8)
    refused(save(tmp_path / "b.png", clear), "no observed pixel")
    huge = png(tmp_path / "huge.png", (20_000, 20_000), 8, 0, b"")
    refused(huge, "cannot be read .*exceeds limit")
    refused(tmp_path / "none.png", "cannot be read")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path / "none.npz")


ENDINGS = "png tif webp bmp ppm tga gif jpg qoi dds sgi xbm avif ico pcx jp2 npy npz".split()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's; pytest hears what users do not
@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_files_end_in_one_line(tmp_path, ending):
    whole, rng = tmp_path / f"whole.{ending}", np.random.default_rng(1)
    array = colours(3)
    if ending == "npy":
        np.save(whole, array)
    elif ending == "npz":
        np.savez(whole, array)
    else:
        image = Image.fromarray(array).resize((64, 64))
        save(whole, image.convert("1") if ending == "xbm" else image)
    read_picture(whole)
    data, bad = whole.read_bytes(), tmp_path / f"bad.{ending}"
    for trial in range(25):
        damaged = bytearray(data[: rng.integers(len(data))] if trial % 2 else data)
        for _ in range(trial % 3 * 4):  # the first bytes hold what leads a reader astray
            if damaged:
                damaged[rng.integers(min(len(damaged), 100))] = rng.integers(256)
        bad.write_bytes(damaged)
        for read in (read_header, read_picture):
            try:
                read(bad)
            except DataError as error:
                assert "\n" not in str(error) and str(bad) in str(error)
