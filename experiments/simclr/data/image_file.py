"""One image file as 8-bit RGB: bit depths, transparency, orientation."""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from experiments.simclr.program.errors import UserError

EXTENSIONS = {
    *(".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
}
SAMPLED = 256  # images that a range is guessed from
ROUND = (1, 255, 65535)  # what the largest value of a scale usually is
# tags of TIFF
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2


@dataclass(frozen=True)
class Depth:
    """What grey values of more than 8 bits are; the range is None where the format has none."""

    name: str
    range: tuple[float, float] | None = None


class ValueRanges:
    """From which range of values the images of more than 8 bits are scaled to 8.

    Unsigned integers of 12 and 16 bits have their format's range. Floats and other integers have
    none: theirs is guessed, once for all images of a kind, since a scale for each image would take
    their brightness away. It is 0 to 1, to 255 or to 65535 where the values lie in it and reach its
    upper three quarters, else from the smallest value to the largest, each without an image's
    outermost thousandth. A warning says what was taken.

    Args:
        given: the range for all of them instead.
        files: the images that a guess looks at: 256 of a kind, spread over all.
    """

    def __init__(
        self, given: Sequence[float] | None = None, files: Sequence[Path] | None = None
    ) -> None:
        if given is not None and (len(given) != 2 or not given[0] < given[1]):
            raise UserError(f"data.value_range must be [LOW,HIGH]; got {list(given)}")
        self.given = None if given is None else (float(given[0]), float(given[1]))
        self.files = files or []
        self._guessed: dict[Depth, tuple[float, float]] = {}
        self._largest: dict[Depth, float] = {}
        self._lock = threading.Lock()

    def of(self, depth: Depth) -> tuple[float, float]:
        """The range of values that becomes 0 to 255."""
        if (known := self.given or depth.range) is not None:
            return known
        with self._lock:
            if depth not in self._guessed:
                self._guessed[depth] = self._guess(depth)
            return self._guessed[depth]

    def note(self, depth: Depth, largest: float) -> None:
        """Remember the largest value of an image, for `warn_of_narrow_values`."""
        with self._lock:
            self._largest[depth] = max(largest, self._largest.get(depth, 0))

    def warn_of_narrow_values(self) -> None:
        """Say once that 16-bit files hold 12 bits or fewer, as many cameras and scanners write."""
        for depth, largest in self._largest.items():
            if depth.range == (0, 65535) and self.given is None and 255 < largest < 4096:
                warnings.warn(
                    f"{depth.name} images are scaled from 0 to 65535, and the largest value here "
                    f"is {largest:.0f}: they become dark. If they are of 12 bits, set "
                    "data.value_range=[0,4095]",
                    stacklevel=2,
                )

    def _guess(self, depth: Depth) -> tuple[float, float]:
        lowest, highest = [], []
        for file in _spread(self.files):
            try:
                with Image.open(file) as image:
                    if depth_of(image) != depth:
                        continue
                    values = _values(image, depth)
            except Exception:  # reading it tells what is wrong with it
                continue
            finite = values[np.isfinite(values)]
            if finite.size:
                low, high = np.quantile(finite, (0.001, 0.999))
                lowest.append(float(low))
                highest.append(float(high))
            if len(lowest) == SAMPLED:
                break
        low, high = min(lowest, default=0.0), max(highest, default=1.0)
        range_ = next(((0.0, top) for top in ROUND if low >= 0 and top / 4 < high <= top), None)
        low, high = range_ or (low, high if high > low else low + 1)
        warnings.warn(
            f"the format of {depth.name} images does not say their range: {low:g} to {high:g} was "
            f"taken, guessed from {len(lowest)} images. Set data.value_range=[LOW,HIGH] to say it",
            stacklevel=2,
        )
        return low, high


def read(file: Path, ranges: ValueRanges) -> Image.Image:
    """The image, upright, in 8-bit RGB, what is transparent before white.

    Raises what Pillow raises for a broken file: OSError, SyntaxError, ValueError and more.
    """
    with Image.open(file) as image:
        depth = depth_of(image)
        inverted = depth is not None and _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO
        image = ImageOps.exif_transpose(image)
        if depth is not None:
            image = _scaled(image, depth, ranges, inverted)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def depth_of(image: Image.Image) -> Depth | None:
    """What the image's values are if they have more than 8 bits; None if they have not.

    Colours of 16 bits are None: Pillow reads their upper 8.
    """
    bits = _tag(image, BITS_PER_SAMPLE)
    if image.mode.startswith("I;16"):
        return Depth("12-bit", (0, 4095)) if bits == 12 else Depth("16-bit", (0, 65535))
    if image.mode == "F":
        return Depth("floating-point")
    if image.mode != "I":
        return None
    if image.format == "PPM":  # Pillow scales its maxval to 65535
        return Depth("16-bit", (0, 65535))
    if image.format == "PNG":
        return Depth("16-bit", (0, 65535))
    if bits == 16:
        return Depth("signed 16-bit")
    signed = image.format != "TIFF" or _tag(image, SAMPLE_FORMAT) == SIGNED
    return Depth("signed 32-bit" if signed else "32-bit")


def _scaled(image: Image.Image, depth: Depth, ranges: ValueRanges, inverted: bool) -> Image.Image:
    values = _values(image, depth)
    low, high = ranges.of(depth)
    ranges.note(depth, float(values.max()))
    share = np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    share = share.clip(0, 1)
    grey = Image.fromarray(np.rint(255 * (1 - share if inverted else share)).astype(np.uint8))
    transparent = image.info.get("transparency")  # PNG: the one value that is
    if transparent is not None:
        grey.putalpha(Image.fromarray(255 * (values != transparent).astype(np.uint8)))
    return grey


def _values(image: Image.Image, depth: Depth) -> np.ndarray:
    values = np.asarray(image)
    if depth.name == "32-bit":  # Pillow holds them as if they were signed
        values = values.view(np.uint32)
    return values.astype(np.float64)


def _tag(image: Image.Image, number: int) -> int | None:
    """The first value of a TIFF's tag; None in other formats."""
    value = image.tag_v2.get(number) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value


def _spread(files: Sequence[Path]) -> Sequence[Path]:
    """The same files in an order whose beginning is spread over all."""
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]
