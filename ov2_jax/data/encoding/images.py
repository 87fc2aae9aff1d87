"""Pictures to patches, pixel for pixel as transformers' Qwen2-VL image processor makes them.

Pixels stay uint8 (the model normalises them on the device). As in the Hugging Face processor, an
EXIF rotation is not applied, and a transparent picture is laid over white.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, UnidentifiedImageError

from ov2_jax.core.errors import describe
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import Media, check_exists, decodable

T = TypeVar("T")

MAX_ASPECT = 200
# A decoded picture of this size takes 360 MB; Pillow's own warning starts here too. A PNG of a few
# bytes can claim any size, so the header is checked before anything is decoded.
MAX_SOURCE_PIXELS = 89_478_485
_STRIP_PIXELS = 1 << 22  # laid over white at once

# Pillow warns of every odd tag of every picture. A tag that matters becomes a SampleError.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Image.init()
# PostScript is a program, and Pillow would run it in Ghostscript.
_FORMATS = tuple(name for name in Image.OPEN if name != "EPS")


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width): multiples of `factor`, an area in min_pixels..max_pixels, nearly the aspect.

    transformers' Qwen2-VL rule: a side may first round to 0 and is then enlarged with the rest. If
    the two bounds and the factor contradict each other, the area can leave the bounds. Raises
    SampleError bad_aspect above 200:1.
    """
    if min(height, width) < 1:
        raise SampleError("bad_aspect", f"{width}x{height} has no pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("bad_aspect", f"{width}x{height} is longer than {MAX_ASPECT}:1")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = (height * width / max_pixels) ** 0.5
        new_height = max(factor, int(height / beta / factor) * factor)
        new_width = max(factor, int(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = (min_pixels / (height * width)) ** 0.5
        new_height = int(np.ceil(height * beta / factor)) * factor
        new_width = int(np.ceil(width * beta / factor)) * factor
    if new_height <= 0 or new_width <= 0:
        raise SampleError("bad_aspect", f"{width}x{height} is too small for min_pixels")
    return new_height, new_width


def to_rgb(image: Image.Image) -> Image.Image:
    """Any 8-bit picture to RGB. Raises SampleError bad_image for 16-bit and float pictures."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.mode.startswith(("I", "F")):
        # Pillow would clip the values instead of scaling them, and most of it would be white.
        raise SampleError(
            "bad_image",
            f"pictures of mode {image.mode} are not read; convert it to 8 bits a channel",
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """In strips: composing a large picture as a whole would take four times its memory."""
    result = Image.new("RGB", image.size)
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def load_image(path: Media) -> Image.Image:
    """Decodes a file or embedded bytes to RGB. Raises SampleError missing_file or bad_image."""

    def load(image: Image.Image) -> Image.Image:
        if image.format == "PNG":
            # Decoding stops at the last row and reads neither the checksums nor the end.
            with Image.open(decodable(path), formats=("PNG",)) as again:
                again.verify()
        image.load()
        return to_rgb(image)

    return _with_picture(path, load)


def image_size(path: Media) -> tuple[int, int]:
    """(height, width) from the file's header. Raises SampleError missing_file or bad_image."""
    return _with_picture(path, lambda image: (image.height, image.width))


def _with_picture(path: Media, use: Callable[[Image.Image], T]) -> T:
    check_exists(path, "picture")
    try:
        with Image.open(decodable(path), formats=_FORMATS) as image:
            if image.width * image.height > MAX_SOURCE_PIXELS:
                raise SampleError(
                    "bad_image",
                    f"{path} has {image.width}x{image.height} pixels; at most "
                    f"{MAX_SOURCE_PIXELS} are decoded",
                )
            return use(image)
    except SampleError as error:
        if str(path) in error.detail:
            raise
        raise SampleError(error.reason, f"{path}: {error.detail}") from error
    except UnidentifiedImageError as error:
        raise SampleError("bad_image", f"{path} is no picture that Pillow can read") from error
    except Exception as error:  # Pillow's plugins raise nearly everything on broken files
        raise SampleError("bad_image", f"{path}: {describe(error)}") from error


def resize(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Bicubic. The result lies in memory channel by channel, which `patchify` is fastest with."""
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(band) for band in image.split()]).transpose(1, 2, 0)


def patchify(
    pixels: UInt8[np.ndarray, "height width C"], patch: int, merge: int
) -> UInt8[np.ndarray, "P values"]:
    """Patches in block order (merge x merge), their C*p*p values by (channel, row, column)."""
    height, width, channels = pixels.shape
    h, w = height // (merge * patch), width // (merge * patch)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    # A patch's row of p bytes moves as one item: three times as fast as byte by byte.
    rows = planes.view(f"V{patch}").reshape(channels, h, merge, patch, w, merge)
    # (C, h, m, p, w, m) -> (h, w, m, m, C, p)
    blocks = np.ascontiguousarray(rows.transpose(1, 4, 2, 5, 0, 3))
    return blocks.view(np.uint8).reshape(h * w * merge**2, channels * patch**2)


def patch_positions(t: int, h: int, w: int, merge: int) -> Int32[np.ndarray, "{h}*{w} 3"]:
    """(t, row, column) of a grid's patches in m x m block order; all have the same t."""
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    grid = np.stack([np.full_like(rows, t), rows, columns], axis=-1)
    blocks = grid.reshape(h // merge, merge, w // merge, merge, 3).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(h * w, 3).astype(np.int32)
