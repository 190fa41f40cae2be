"""Image files: decoded, turned upright, made RGB, cropped and resized."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
_DRAFTED = ("JPEG", "MPO")  # decoded at a smaller size, for which the box must be known before

_LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height

EVALUATED_SHARE = 224 / 256
_AREAS, _RATIOS, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
CROP_DRAWS = 2 * _TRIES + 2
"""How many random numbers random_box needs."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the upright image."""


class BadPictureError(OSError):
    """An image file that cannot be read.

    Attributes:
        path: the file.
        reason: what is wrong with it, one line.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; remove it, or leave such files out by on_bad_file 'skip'")
        self.path, self.reason = path, reason


def centre_box(width: int, height: int) -> Box:
    """The middle square that is 224/256 of the shorter side: what resizing to 256 and cropping 224 keep."""
    side = EVALUATED_SHARE * min(width, height)
    return _middle(width, height, side, side)


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """A crop of 8 to 100 % of the area and an aspect of 3/4 to 4/3 (Szegedy et al. 2014, arXiv 1409.4842).

    Args:
        width: of the image.
        height: of the image.
        draws: CROP_DRAWS numbers, uniform in [0, 1).

    Returns:
        The first of ten drawn sizes that fits, at a drawn place; where none does, the largest middle crop of
        an aspect in that range.
    """
    *sizes, across, down = draws
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for area_draw, ratio_draw in zip(sizes[::2], sizes[1::2], strict=True):
        area = width * height * (_AREAS[0] + (_AREAS[1] - _AREAS[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    return _middle(width, height, min(width, height * _RATIOS[1]), min(height, width / _RATIOS[0]))


def _middle(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def read_picture(
    path: Path, size: int, choose_box: Callable[[int, int], Box], exact: bool
) -> npt.NDArray[np.uint8]:
    """Decode one image file.

    It is turned upright where its EXIF data say how; grey, palette and CMYK become RGB, 16-bit grey loses its
    lower 8 bits, and what is transparent shows white. The box is resized bilinearly, with antialiasing.

    Args:
        path: a JPEG, PNG, WebP, BMP, PPM or TIFF file, whatever its name ends in.
        size: height and width of the result.
        choose_box: gives the box for (width, height) of the upright image.
        exact: False lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size where the box still has no fewer
            pixels than the result: faster, and another resampling.

    Returns:
        uint8 [size, size, 3].

    Raises:
        BadPictureError: the file is missing, damaged, cut short, too large or of another kind.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.format not in _DRAFTED:  # whose sizes may, or may not, be the upright ones already
                ImageOps.exif_transpose(image, in_place=True)
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation) in _LYING:
                width, height = height, width
            box = choose_box(width, height)
            factor = int(min(box[2] - box[0], box[3] - box[1]) / size)
            if factor > 1 and not exact:
                image.draft(image.mode, (image.width // factor, image.height // factor))
            ImageOps.exif_transpose(image, in_place=True)
            across, down = image.width / width, image.height / height
            scaled = (
                box[0] * across,
                box[1] * down,
                min(box[2] * across, image.width),
                min(box[3] * down, image.height),
            )
            return np.asarray(_rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=scaled))
    # A damaged file can lead Pillow's decoders to any exception.
    except Exception as error:
        raise BadPictureError(path, _reason(error)) from error


def check_picture(path: Path) -> None:
    """Decode a file as cheaply as finds all damage.

    Raises:
        BadPictureError: read_picture would raise it.
    """
    read_picture(path, 1, lambda width, height: (0, 0, width, height), exact=False)


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a supported kind ({', '.join(_FORMATS)})"
    return " ".join(str(error).split()) or type(error).__name__
