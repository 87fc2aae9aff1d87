"""Pictures against transformers' own Qwen2-VL image processor, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from ov2_jax.data.encoding import images
from ov2_jax.data.rejected import SampleError
from ov2_jax.model.normalize import normalize_patches
from tests.data.files import picture

BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 120 * 120}


def hf_processor(**changes):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    options = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 1}
    return Qwen2VLImageProcessorPil(**options, **BOUNDS, **changes)


def ours(image: Image.Image) -> np.ndarray:
    image = images.to_rgb(image)
    height, width = images.smart_resize(image.height, image.width, factor=28, **BOUNDS)
    return images.patchify(images.resize(image, height, width), 14, 2)


def test_smart_resize_equals_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sides = (1, 2, 13, 14, 15, 27, 28, 41, 42, 43, 100, 197, 199, 640, 1279, 4000)
    for factor in (28, 32, 42, 48):
        for low, high in ((56 * 56, 28 * 28 * 1280), (784, 14400), (10**6, 4 * 10**6)):
            for height in sides:
                for width in sides:
                    if max(height, width) <= 200 * min(height, width):
                        bounds = {"factor": factor, "min_pixels": low, "max_pixels": high}
                        assert images.smart_resize(height, width, **bounds) == smart_resize(
                            height, width, **bounds
                        )


def test_smart_resize_refuses_strips():
    assert images.smart_resize(10, 2000, factor=28, **BOUNDS)
    with pytest.raises(SampleError, match="bad_aspect"):
        images.smart_resize(10, 2001, factor=28, **BOUNDS)


def sources():
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (90, 61, 4), np.uint8), "RGBA")
    rgb = rgba.convert("RGB")
    palette = rgb.quantize(32)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    return {
        "RGB": rgb,
        "L": rgb.convert("L"),
        "1": rgb.convert("1"),
        "LA": rgba.convert("LA"),
        "RGBA": rgba,
        "P": palette,
        "P transparent": see_through,
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
    }


@pytest.mark.parametrize("mode", sources())
def test_every_mode_equals_the_hf_processor(mode):
    image = sources()[mode]
    expected = hf_processor()(images=image, return_tensors="np")["pixel_values"]
    actual = np.asarray(normalize_patches(ours(image)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_exif_rotation_is_not_applied_as_in_the_hf_processor(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    Image.new("RGB", (80, 60)).save(path, exif=exif)
    assert images.load_image(str(path)).size == (80, 60)


def test_patches_and_positions_are_in_block_order():
    # Each pixel's value is the number of its patch in raster order of a 4 x 6 grid.
    grid = np.arange(24, dtype=np.uint8).reshape(4, 6)
    pixels = np.repeat(np.repeat(grid, 2, 0), 2, 1)[..., None] + np.zeros(3, np.uint8)
    patches = images.patchify(pixels, 2, 2)
    assert patches.shape == (24, 12)
    assert (patches == patches[:, :1]).all()
    expected = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert patches[:12, 0].tolist() == expected
    positions = images.patch_positions(7, 4, 6, 2)
    assert positions.dtype == np.int32
    assert (positions[:, 0] == 7).all()
    assert (positions[:, 1] * 6 + positions[:, 2]).tolist() == patches[:, 0].tolist()


def test_values_of_a_patch_are_channel_row_column():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    first = images.patchify(pixels, 2, 1)[0].reshape(3, 2, 2)
    np.testing.assert_array_equal(first, pixels[:2, :2].transpose(2, 0, 1))


def test_unreadable_files_say_why(tmp_path):
    good = picture(tmp_path / "good.jpg", 60, 80)
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:-400])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    for name, reason, words in (
        ("none.jpg", "missing_file", "there is no picture"),
        (".", "missing_file", "there is no picture"),
        ("cut.jpg", "bad_image", "truncated"),
        ("text.png", "bad_image", "no picture that Pillow can read"),
        ("empty.png", "bad_image", "no picture that Pillow can read"),
        ("deep.png", "bad_image", "convert it to 8 bits"),
    ):
        with pytest.raises(SampleError, match=words) as error:
            images.load_image(str(tmp_path / name))
        assert error.value.reason == reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_not_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    assert path.stat().st_size < 50_000
    with pytest.raises(SampleError, match="12000x12000 pixels"):
        images.load_image(str(path))
