"""Pictures that are damaged, odd, or larger than they look."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.data.bad.cases import OK, Case, cut, flip, line, sample

_BAD = ("bad_image",)


def _pixels(seed: int = 0, height: int = 60, width: int = 84) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _grey(value: int | tuple, mode: str = "RGB", size: tuple[int, int] = (84, 56)) -> Image.Image:
    return Image.new(mode, size, value)


def png(
    width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", more: bytes = b""
) -> bytes:
    """A PNG by hand: any announced size, any pixel data."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", head) + more + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _damaged() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    image = Image.fromarray(_pixels())
    files = {
        "jpg": encoded(image, "JPEG", quality=90),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "png": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "gif": encoded(image, "GIF"),
        "bmp": encoded(image, "BMP"),
        "tif": encoded(image, "TIFF", compression="tiff_lzw"),
    }
    cases = {}
    for kind, data in files.items():
        for percent in (1, 20, 50, 75, 95):
            cases[f"cut{percent}.{kind}"] = cut(data, percent / 100), _BAD
        for seed in range(4):
            damaged = flip(data, seed, 0.3, 0.95)
            # PNG has checksums; in the others a flipped bit can be another colour.
            cases[f"flip{seed}.{kind}"] = damaged, _BAD if kind == "png" else (*_BAD, OK)
        for seed in range(3):
            damaged = flip(data, 90 + seed, 0, 60 / len(data), bits=3)
            cases[f"head{seed}.{kind}"] = damaged, (*_BAD, "bad_aspect", OK)
    png_data = files["png"]
    cases["flipped_checksum.png"] = (
        flip(png_data, 0, 1 - 15 / len(png_data), 1 - 13 / len(png_data), 1),
        _BAD,
    )
    cases["no_end.png"] = png_data[:-12], _BAD
    cases["zeros.jpg"] = files["jpg"][:200] + bytes(len(files["jpg"]) - 200), (*_BAD, OK)
    cases["empty.jpg"] = b"", _BAD
    cases["one_byte.png"] = b"\x89", _BAD
    cases["zero_bytes.webp"] = bytes(500), _BAD
    cases["text.jpg"] = b"404 not found\n", _BAD
    cases["page.jpg"] = b"<!DOCTYPE html><html><body>Forbidden</body></html>", _BAD
    cases["drawing.png"] = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', _BAD
    # PostScript would be run by another program.
    cases["script.jpg"] = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 84 56\n{} loop\n%%EOF\n",
        _BAD,
    )
    return cases


def _bombs() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    small = zlib.compress(bytes(3 * 84 + 1))
    gif = bytearray(encoded(_grey(5), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    bmp = bytearray(encoded(_grey(5), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, 5000, 22)
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))
    profile = png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(80_000_000)))
    loop = b"II*\0" + struct.pack("<IHI", 8, 0, 8)  # a directory that is followed by itself
    return {
        "65500x65500.png": (png(65500, 65500, data=small), _BAD),
        "12000x9000.png": (png(12000, 9000, data=small), _BAD),
        "lie.png": (png(3000, 3000, data=small), _BAD),
        "million.png": (png(2**31 - 1, 2**31 - 1, data=small), _BAD),
        "wide.gif": (bytes(gif), _BAD),
        "wide.bmp": (bytes(bmp), _BAD),
        "icon.ico": (ico + png(60000, 60000, data=small), _BAD),
        "text.png": (png(84, 56, data=small, more=text), _BAD),
        "profile.png": (png(84, 56, data=small, more=profile), (*_BAD, OK)),
        "loop.tif": (loop, _BAD),
    }


def _odd() -> dict[str, tuple[bytes, tuple[str, ...], dict]]:
    """Pictures that are fine."""
    frames = [_grey((50 * i + 25,) * 3) for i in range(3)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50}
    first = {"windows": [24], "grey": 25}
    half = _grey((0, 0, 0, 0), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which the reference processor does not do
    note = PngImagePlugin.PngInfo()
    note.add_text("k", "v" * 10_000)
    palette = _grey((90, 90, 90)).convert("P", palette=Image.Palette.ADAPTIVE)
    white = {"windows": [24], "grey": 255}
    grey = {"windows": [24], "grey": 90}
    return {
        "png_named.jpg": (encoded(_grey((90,) * 3), "PNG"), (OK,), grey),
        "jpg_named.png": (encoded(_grey((90,) * 3), "JPEG"), (OK,), grey),
        "animated.gif": (encoded(frames[0], "GIF", **animated), (OK,), first),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **animated), (OK,), first),
        "animated.png": (encoded(frames[0], "PNG", **animated), (OK,), first),
        "pages.tif": (encoded(frames[0], "TIFF", **animated), (OK,), first),
        "pair.mpo": (encoded(frames[0], "MPO", **animated), (OK,), first),
        "palette.png": (encoded(palette, "PNG"), (OK,), grey),
        "palette_clear.png": (encoded(palette, "PNG", transparency=0), (OK,), white),
        "palette_bytes.png": (encoded(palette, "PNG", transparency=b"\0\0"), (OK,), white),
        "clear.png": (encoded(half, "PNG"), (OK,), white),
        "clear.webp": (encoded(half, "WEBP", lossless=True), (OK,), white),
        "grey.png": (encoded(_grey(90, "L"), "PNG"), (OK,), grey),
        "grey_alpha.png": (encoded(_grey((90, 255), "LA"), "PNG"), (OK,), grey),
        "one_bit.png": (encoded(_grey(1, "1"), "PNG"), (OK,), white),
        "cmyk.jpg": (encoded(_grey((0, 0, 0, 165), "CMYK"), "JPEG"), (OK,), grey),
        "lab.tif": (encoded(_grey((255, 128, 128), "LAB"), "TIFF"), (OK,), {"grey": 254}),
        "rotated.jpg": (
            encoded(_grey((90,) * 3, size=(84, 28)), "JPEG", exif=exif),
            (OK,),
            {"windows": [12]},
        ),
        "bad_exif.jpg": (
            encoded(_grey((90,) * 3), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
            (OK,),
            grey,
        ),
        "note.png": (encoded(_grey((90,) * 3), "PNG", pnginfo=note), (OK,), grey),
        "16_bit.png": (
            encoded(Image.fromarray(np.full((56, 84), 9000, np.uint16)), "PNG"),
            _BAD,
            {},
        ),
        "16_bit.tif": (
            encoded(Image.fromarray(np.full((56, 84), 9000, np.uint16)), "TIFF"),
            _BAD,
            {},
        ),
        "float.tif": (encoded(_grey(0.5, "F"), "TIFF"), _BAD, {}),
        "int.tif": (encoded(_grey(5, "I"), "TIFF"), _BAD, {}),
        "1x1.png": (
            encoded(_grey((7,) * 3, size=(1, 1)), "PNG"),
            (OK,),
            {"windows": [4], "grey": 7},
        ),
        "1x200.png": (encoded(_grey((7,) * 3, size=(1, 200)), "PNG"), (OK,), {"grey": 7}),
        "1x201.png": (encoded(_grey((7,) * 3, size=(1, 201)), "PNG"), ("bad_aspect",), {}),
        "20000x10.png": (encoded(_grey((7,) * 3, size=(20000, 10)), "PNG"), ("bad_aspect",), {}),
        "2000x10.png": (encoded(_grey((7,) * 3, size=(2000, 10)), "PNG"), (OK,), {"grey": 7}),
        "0x0.png": (png(0, 0), _BAD, {}),
        "0x5.png": (png(0, 5), _BAD, {}),
        # The largest that is decoded: 81 million pixels in some kilobytes, with transparency.
        "9000x9000.png": (
            encoded(Image.new("LA", (9000, 9000), (9, 255)), "PNG", compress_level=1),
            (OK,),
            {"grey": 9},
        ),
    }


def picture_cases(folder: Path) -> list[Case]:
    """Writes the files below `folder`/pictures."""
    files = {name: (*entry, {}) for made in (_damaged(), _bombs()) for name, entry in made.items()}
    cases = []
    (folder / "pictures").mkdir()
    for name, (data, wants, facts) in {**files, **_odd()}.items():
        (folder / "pictures" / name).write_bytes(data)
        row = sample("<image>?", id=name, images=[f"pictures/{name}"])
        cases.append(Case(f"picture {name}", wants, line(row), facts=facts))
    return cases
