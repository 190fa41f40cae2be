"""Image files: every kind made upright RGB, every damage noticed, crops as they should be."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lhc_triton.training.data.pictures import (
    CROP_DRAWS,
    BadPictureError,
    centre_box,
    check_picture,
    random_box,
    read_picture,
)


def whole(width: int, height: int) -> tuple[float, float, float, float]:
    return 0, 0, width, height


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours that change slowly, so that resampling in another way changes little."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, mode: str = "RGB", **options: object) -> Path:
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def test_an_image_of_the_right_size_comes_back_as_it_was(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(read_picture(save(tmp_path / "a.png", pixels), 16, whole, exact=True), pixels)
    assert np.array_equal(read_picture(save(tmp_path / "b.png", pixels), 16, whole, exact=False), pixels)


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_other_colours_become_rgb(tmp_path, mode):
    path = save(tmp_path / "a.jpg", smooth(32, 32), mode, quality=95)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read_picture(path, 32, whole, exact=True), expected)
    if mode != "L":
        assert np.abs(expected.astype(int) - smooth(32, 32)).mean() < 4


def test_palettes_bits_and_sixteen_bit_grey_become_rgb(tmp_path):
    pixels = smooth(32, 32)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    palette = read_picture(save(tmp_path / "p.png", pixels, "P"), 32, whole, exact=True)
    assert np.abs(palette.astype(int) - pixels).mean() < 30
    bits = read_picture(save(tmp_path / "b.png", pixels, "1"), 32, whole, exact=True)
    assert set(np.unique(bits)) == {0, 255}
    for name in ("deep.png", "deep.tiff", "deep.pgm"):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
        found = read_picture(tmp_path / name, 32, whole, exact=True)
        assert np.array_equal(found, np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 8, 16))
    image.convert(mode).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png", 16, whole, exact=True)
    assert np.array_equal(found[:, :8], np.full((16, 8, 3), 255))
    assert np.array_equal(found[:, 8:], np.zeros((16, 8, 3)))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation, suffix, exact):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    path = save(tmp_path / f"a.{suffix}", smooth(120, 200), exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert upright.size == ((120, 200) if orientation > 4 else (200, 120))
    expected = np.asarray(upright.resize((20, 20), Image.Resampling.BILINEAR, box=(20, 10, 100, 90)))
    sizes = []

    def box(width: int, height: int) -> tuple[float, float, float, float]:
        sizes.append((width, height))
        return 20, 10, 100, 90

    found = read_picture(path, 20, box, exact)
    assert sizes == [upright.size]
    assert np.abs(found.astype(int) - expected).max() <= (0 if exact else 6)


def test_the_middle_is_what_resizing_and_cropping_keep(tmp_path):
    path = save(tmp_path / "a.png", smooth(256, 384))
    resized = Image.open(path).resize((96, 64), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((20, 4, 76, 60)))
    found = read_picture(path, 56, centre_box, exact=True)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_random_boxes_lie_inside_with_the_areas_and_aspects_drawn():
    random = np.random.default_rng(0)
    boxes = np.array([random_box(500, 375, random.random(CROP_DRAWS).tolist()) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0
    assert right.max() == 500
    assert bottom.max() == 375
    aspects, shares = (right - left) / (bottom - top), (right - left) * (bottom - top) / (500 * 375)
    assert 0.74 < aspects.min() < aspects.max() < 1.35
    # Drawn again and again until it fits, which a tenth failure in a row hardly changes.
    drawn = 500 * 375 * random.uniform(0.08, 1, 40_000)
    ratios = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), 40_000))
    fits = (np.sqrt(drawn * ratios) <= 500) & (np.sqrt(drawn / ratios) <= 375)
    expected = drawn[fits] / (500 * 375)
    quantiles = np.linspace(0, 1, 11)
    np.testing.assert_allclose(np.quantile(shares, quantiles), np.quantile(expected, quantiles), atol=0.04)
    places = left[right - left < 500] / (500 - (right - left))[right - left < 500]
    np.testing.assert_allclose(np.quantile(places, quantiles), quantiles, atol=0.04)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (30, 500)])
def test_odd_shapes_have_boxes_too(tmp_path, size):
    random = np.random.default_rng(1)
    path = save(tmp_path / "a.png", smooth(*size[::-1]))
    for _ in range(20):
        draws = random.random(CROP_DRAWS).tolist()
        left, top, right, bottom = random_box(*size, draws)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        found = read_picture(path, 24, lambda w, h, draws=draws: random_box(w, h, draws), exact=False)
        assert found.shape == (24, 24, 3)
    assert read_picture(path, 24, centre_box, exact=True).shape == (24, 24, 3)


def damaged() -> dict[str, bytes]:
    kinds = {}
    for kind in ("JPEG", "PNG"):
        stream = BytesIO()
        Image.fromarray(smooth(64, 64)).save(stream, kind)
        whole_file = stream.getvalue()
        for share in (0.3, 0.7, 0.95):
            kinds[f"{kind} cut at {share}"] = whole_file[: int(share * len(whole_file))]
    stream = BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(stream, "TIFF")
    return kinds | {"empty": b"", "text": b"<html>404</html>", "numbers": stream.getvalue()}


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_named_with_the_reason_in_one_line(tmp_path, name):
    path = tmp_path / "a.jpg"
    path.write_bytes(damaged()[name])
    for read in (check_picture, lambda path: read_picture(path, 224, centre_box, exact=True)):
        with pytest.raises(BadPictureError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert caught.value.reason
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadPictureError, match=r"absent.jpg: there is no such file; remove it"):
        check_picture(tmp_path / "absent.jpg")
