"""Images of every depth as 8-bit RGB: brightness survives, and a guess is told once."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.simclr.data import ImageFolder
from experiments.simclr.data.image_file import ValueRanges, read
from experiments.simclr.program.errors import UserError

SIZE = 8


def grey(path, ranges=None):
    """The one grey of an even image."""
    image = read(path, ranges or ValueRanges())
    assert image.mode == "RGB"
    ((_, colour),) = image.getcolors()
    assert len(set(colour)) == 1
    return colour[0]


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def even(value, dtype):
    return np.full((SIZE, SIZE), value, dtype)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (257, 1), (20000, 78), (45000, 175), (65535, 255)]
)
def test_16_bits_are_scaled_by_their_range(tmp_path, ending, value, expected):
    path = save(tmp_path / f"x.{ending}", even(value, np.uint16))
    assert abs(grey(path) - expected) <= (ending == "jp2")  # which is lossy


def test_a_pgm_is_scaled_by_its_own_largest_value(tmp_path):
    for name, header in {"plain": b"P2 1 1 1023\n512", "raw": b"P5 1 1 1023\n\x02\x00"}.items():
        (tmp_path / name).write_bytes(header)
        assert grey(tmp_path / name) == 128


def tiff(path, values, bits, sample_format=1, photometric=1, order="<"):
    """A TIFF of one strip, with the tags that Pillow does not write of itself."""
    data = values if isinstance(values, bytes) else values.tobytes()
    short, long = f"{order}u2", f"{order}u4"
    tags = [(256, SIZE), (257, SIZE), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, SIZE), (279, len(data)), (339, sample_format)]
    entries = b"".join(
        np.array([tag, 4], short).tobytes() + np.array([1, value], long).tobytes()
        for tag, value in tags
    )
    directory = np.array([len(tags)], short).tobytes() + entries + bytes(4)
    start = (b"II" if order == "<" else b"MM") + np.array([42], short).tobytes()
    path.write_bytes(start + np.array([8 + len(data)], long).tobytes() + data + directory)
    # the strip lies at 8, behind the header
    return path


def test_tiffs_of_other_depths(tmp_path):
    twelve = bytes([0x80, 0x08, 0x00]) * (SIZE * SIZE // 2)  # two values of 0x800
    assert grey(tiff(tmp_path / "12.tif", twelve, 12)) == 128
    assert grey(tiff(tmp_path / "16.tif", even(51400, ">u2"), 16, order=">")) == 200
    # 0 is white
    assert grey(tiff(tmp_path / "white.tif", even(51400, "<u2"), 16, photometric=0)) == 55


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, (0, 1)), (255.0, (0, 255)), (65535.0, (0, 65535))]
)
def test_the_range_of_floats_is_guessed_once_for_all_of_them(tmp_path, scale, expected):
    rows = np.linspace(0, 1, 40)
    paths = [save(tmp_path / f"{i}.tif", even(scale * v, np.float32)) for i, v in enumerate(rows)]
    ranges = ValueRanges(files=paths)
    with pytest.warns(UserWarning, match=r"floating-point.*data\.value_range") as warned:
        greys = [grey(path, ranges) for path in paths]
    assert len(warned) == 1
    assert greys == [round(255 * v) for v in rows]
    assert f"{expected[0]:g} to {expected[1]:g}" in str(warned[0].message)


@pytest.mark.parametrize("kind", ["float", "signed 16-bit", "signed 32-bit", "32-bit"])
def test_other_values_span_from_the_smallest_to_the_largest(tmp_path, kind):
    low, high = {"float": (-3.0, 9.0), "32-bit": (3e9, 4e9)}.get(kind, (-1000, 3000))
    dtype, bits, sample_format = {
        "float": ("<f4", 32, 3),
        "signed 16-bit": ("<i2", 16, 2),
        "signed 32-bit": ("<i4", 32, 2),
        "32-bit": ("<u4", 32, 1),
    }[kind]
    values = np.linspace(low, high, 6)
    paths = [
        tiff(tmp_path / f"{i}.tif", even(v, dtype), bits, sample_format)
        for i, v in enumerate(values)
    ]
    with pytest.warns(UserWarning, match="does not say their range"):
        assert [grey(p, ValueRanges(files=paths)) for p in paths] == [0, 51, 102, 153, 204, 255]


def test_what_is_no_number_is_black_and_infinity_white(tmp_path):
    values = np.tile(np.array([np.nan, 0.0, 1.0, np.inf], np.float32), (SIZE, SIZE // 4))
    path = save(tmp_path / "x.tif", values)
    with pytest.warns(UserWarning, match="0 to 1 was taken"):
        row = np.asarray(read(path, ValueRanges(files=[path])))[0, :4, 0]
    assert row.tolist() == [0, 0, 255, 255]


def test_a_range_that_is_given_is_used_without_a_word(tmp_path):
    deep = save(tmp_path / "x.png", even(1024, np.uint16))
    floats = save(tmp_path / "x.tif", even(1024, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [grey(p, ValueRanges([0, 4096])) for p in (deep, floats)] == [64, 64]
    for wrong in ([1], [3, 3], [5, 1]):
        with pytest.raises(UserError, match=r"data\.value_range must be \[LOW,HIGH\]; got"):
            ValueRanges(wrong)


@pytest.mark.parametrize(("kind", "ending"), [("u2", "png"), ("u2", "pgm"), ("f4", "tif")])
def test_classes_that_only_their_brightness_tells_apart_stay_apart(tmp_path, kind, ending):
    for i in range(10):
        for name, share in (("dark", 0.2), ("bright", 0.6)):
            value = share + 0.01 * i
            save(
                tmp_path / name / f"{i}.{ending}",
                even(value * (65535 if kind == "u2" else 1), kind),
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ImageFolder(str(tmp_path), batch_size=2, image_size=4)
        data.setup()
    greys = data.train_images[:, 0, 0, 0].float()
    means = [greys[data.train_labels == label].mean().item() for label in (0, 1)]
    assert data.class_names == ["bright", "dark"]
    assert means == pytest.approx([0.645 * 255, 0.245 * 255], abs=4)


def test_12_bits_in_files_of_16_are_told(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", even(4000 + i, np.uint16))
    with pytest.warns(UserWarning, match=r"largest value here is 4003.*value_range=\[0,4095\]"):
        ImageFolder(str(tmp_path), batch_size=2, image_size=4).setup()


def transparent_images():
    """Images whose left half is transparent, and black below; the right is opaque red or grey."""
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[:, SIZE // 2 :] = 255
    mask = Image.fromarray(alpha)
    red = Image.new("RGB", (SIZE, SIZE), (200, 0, 0))
    black = Image.new("RGB", (SIZE, SIZE))
    colours = Image.composite(red, black, mask)
    rgba = colours.copy()
    rgba.putalpha(mask)
    grey_alpha = colours.convert("L")
    grey_alpha.putalpha(mask)
    palette = colours.quantize(4)
    (hidden,) = {palette.getpixel((0, 0))}
    return {
        "rgba.png": (rgba, {}),
        "rgba.webp": (rgba, {"lossless": True}),
        "la.png": (grey_alpha, {}),
        "palette.png": (palette, {"transparency": hidden}),
        "key.png": (colours, {"transparency": (0, 0, 0)}),
        "16bit.png": (
            Image.fromarray((alpha.astype(np.uint16)) * 200),
            {"transparency": 0},
        ),
    }


@pytest.mark.parametrize("name", transparent_images())
def test_what_is_transparent_is_seen_before_white(tmp_path, name):
    image, options = transparent_images()[name]
    image.save(tmp_path / name, **options)
    pixels = np.asarray(read(tmp_path / name, ValueRanges()))
    assert (pixels[:, : SIZE // 2] == 255).all()
    assert (pixels[:, SIZE // 2 :, 1] < 220).all()


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (SIZE, SIZE), (100, 0, 0, 128)).save(tmp_path / "x.png")
    pixel = read(tmp_path / "x.png", ValueRanges()).getpixel((0, 0))
    assert pixel == pytest.approx((178, 127, 127), abs=1)


def test_deep_images_are_turned_upright(tmp_path):
    values = even(0, np.uint16)
    values[:2] = 65535
    turned = Image.Exif()
    turned[0x0112] = 3
    save(tmp_path / "x.png", values, exif=turned)
    pixels = torch.from_numpy(np.array(read(tmp_path / "x.png", ValueRanges())))
    assert (pixels[-2:] == 255).all()
    assert (pixels[:-2] == 0).all()
