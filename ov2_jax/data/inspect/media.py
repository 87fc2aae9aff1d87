"""Pictures, frames and canvases of a sample, rebuilt from its patches."""

import base64
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from ov2_jax.config.model import VisionConfig
from ov2_jax.data.encoding.images import patch_positions
from ov2_jax.data.encoding.tokenizer import IMAGE_PAD, VISION_START, Tokenizer
from ov2_jax.data.inspect.packs import LOSS, VISION, SeenSample

PICTURE, FRAMES, CODEC = "picture", "frames", "codec"  # kinds of windows and media

# Smaller pictures are kept exactly, as PNG. A photograph of 1 MB as PNG has 150 kB as JPEG.
_PNG_BYTES = 40_000
_JPEG_QUALITY = 92

_FRAME_HEAD = re.compile(r"(?:<(\d+(?:\.\d+)?) seconds>)?" + re.escape(VISION_START) + r"$")


class TextSpan(NamedTuple):
    """Consecutive tokens of one kind."""

    text: str
    kind: str  # text, loss, special, pad
    count: int  # tokens


class Run(NamedTuple):
    """Consecutive placeholders."""

    patches: slice
    seconds: str | None  # the time in the text before it
    glued: bool  # only that time is between it and the run before


class Picture(NamedTuple):
    """A whole grid of patches."""

    t: int
    seconds: str | None
    height: int  # pixels
    width: int
    rows: int  # patches
    columns: int
    tokens: int
    uri: str


class GroupFrame(NamedTuple):
    """The blocks of one frame in a group of canvases."""

    t: int
    seconds: str | None
    blocks: list[int]  # flat: number in the group, row, column; in blocks of m x m patches


class Group(NamedTuple):
    """A codec window."""

    canvases: list[Picture]
    anchor: int | None  # index of the frame that is complete
    frames: list[GroupFrame]


class ShownMedia(NamedTuple):
    """A picture or clip."""

    kind: str  # PICTURE, FRAMES or CODEC
    pictures: list[Picture]  # a picture, or the frames of a clip
    groups: list[Group]  # of a codec clip


# --- kinds ----------------------------------------------------------------------------------------


def window_kind(positions: Int[np.ndarray, "P 3"]) -> str:
    """The kind of a window, from its patches' (t, h, w); parts of frames are codec-style."""
    t = positions[:, 0]
    area = (positions[:, 1].max() + 1) * (positions[:, 2].max() + 1)
    times, counts = np.unique(t, return_counts=True)
    if (counts != area).any():
        return CODEC
    return FRAMES if len(times) > 1 or times[0] else PICTURE


def window_kinds(sample: SeenSample) -> list[str]:
    ends = np.cumsum(sample.windows)
    return [
        window_kind(sample.positions[end - size : end])
        for size, end in zip(sample.windows, ends, strict=True)
    ]


def sample_kind(kinds: Sequence[str]) -> str:
    """codec clip, clip, pictures, picture or text."""
    if CODEC in kinds:
        return "codec clip"
    if FRAMES in kinds:
        return "clip"
    return ("text", "picture")[len(kinds)] if len(kinds) < 2 else "pictures"


# --- text -----------------------------------------------------------------------------------------


def text_spans(sample: SeenSample, tokenizer: Tokenizer, special: frozenset[int]) -> list[TextSpan]:
    """The sample's exact text; the placeholders of one run are one span."""
    tokens, kinds = sample.tokens, sample.kinds
    looks = np.where(kinds == LOSS, 1, 0)
    looks[np.isin(tokens, list(special))] += 2
    looks[kinds == VISION] = 4
    starts = np.flatnonzero(np.diff(looks, prepend=-1))
    names = ("text", "loss", "special", "special loss", "pad")
    return [
        TextSpan(
            IMAGE_PAD if looks[start] == 4 else _decode(tokenizer, tokens[start:end]),
            names[looks[start]],
            int(end - start),
        )
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)
    ]


def _decode(tokenizer: Tokenizer, tokens: Int32[np.ndarray, " n"]) -> str:
    return tokenizer.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def _runs(sample: SeenSample, tokenizer: Tokenizer, unit: int) -> list[Run]:
    pads = sample.kinds == VISION
    starts = np.flatnonzero(pads & ~np.concatenate([[False], pads[:-1]]))
    ends = np.flatnonzero(pads & ~np.concatenate([pads[1:], [False]])) + 1
    runs, merged, before = [], 0, 0
    for start, end in zip(starts, ends, strict=True):
        text = _decode(tokenizer, sample.tokens[before:start])
        head = _FRAME_HEAD.search(text)
        between = text[: head.start()] if head else text
        # The run before ended with one token, and perhaps a newline.
        glued = bool(runs) and not re.sub(r"^<\|vision_end\|>", "", between).strip("\n")
        patches = slice(merged * unit, (merged + int(end - start)) * unit)
        runs.append(Run(patches, head.group(1) if head else None, glued))
        merged, before = merged + int(end - start), end
    return runs


# --- pictures -------------------------------------------------------------------------------------


def unpatchify(
    patches: UInt8[np.ndarray, "P values"],
    places: Int[np.ndarray, "P 2"],
    grid: tuple[int, int],
    vision: VisionConfig,
) -> UInt8[np.ndarray, "height width C"]:
    """The pixels of patches at places (row, column) of a grid; places without a patch are grey."""
    p = vision.patch_size
    pixels = np.full((*grid, vision.num_channels, p, p), 128, np.uint8)
    pixels[places[:, 0], places[:, 1]] = patches.reshape(-1, vision.num_channels, p, p)
    # h w C p p -> h p w p C
    return pixels.transpose(0, 3, 1, 4, 2).reshape(grid[0] * p, grid[1] * p, vision.num_channels)


def data_uri(pixels: UInt8[np.ndarray, "height width C"]) -> str:
    """An exact PNG if it is small, else a JPEG of full colour resolution."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    kind = "png"
    image.save(out, "PNG", compress_level=4)
    if out.tell() > _PNG_BYTES:
        kind, out = "jpeg", io.BytesIO()
        image.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _picture(
    patches: UInt8[np.ndarray, "P values"],
    places: Int[np.ndarray, "P 2"],
    grid: tuple[int, int],
    vision: VisionConfig,
    t: int,
    seconds: str | None,
) -> Picture:
    pixels = unpatchify(patches, places, grid, vision)
    tokens = len(patches) // vision.merge_unit
    return Picture(t, seconds, *pixels.shape[:2], *grid, tokens, data_uri(pixels))


# --- media ----------------------------------------------------------------------------------------


def media_of(sample: SeenSample, tokenizer: Tokenizer, vision: VisionConfig) -> list[ShownMedia]:
    """The sample's pictures and clips, in order."""
    runs = _runs(sample, tokenizer, vision.merge_unit)
    by_start = {run.patches.start: run for run in runs}
    seconds = {
        (run.patches.start, run.patches.stop): run.seconds
        for run in runs
        if run.seconds is not None
    }
    media: list[list[slice]] = []
    end, last_t, timed = 0, -1, False
    for size, kind in zip(sample.windows, window_kinds(sample), strict=True):
        here = slice(end, end + size)
        end += size
        t = sample.positions[here, 0]
        run = by_start.get(here.start)
        # A clip's frame numbers rise from window to window (parts of one frame may be in two);
        # a picture's are 0. A window that begins inside a run belongs to the media before it.
        falls = int(t.min()) <= last_t - (kind == CODEC)
        fresh = run is not None and (not run.glued or falls or (run.seconds is not None) != timed)
        if fresh or not media:
            media.append([])
        media[-1].append(here)
        last_t, timed = int(t.max()), run.seconds is not None if run else timed
    return [_shown(sample, windows, seconds, vision) for windows in media]


def _shown(
    sample: SeenSample,
    windows: list[slice],
    seconds: dict[tuple[int, int], str],
    vision: VisionConfig,
) -> ShownMedia:
    whole = slice(windows[0].start, windows[-1].stop)
    positions = sample.positions[whole]
    grid = int(positions[:, 1].max()) + 1, int(positions[:, 2].max()) + 1
    times = {
        int(sample.positions[start, 0]): text
        for (start, _), text in seconds.items()
        if whole.start <= start < whole.stop
    }
    kinds = [window_kind(sample.positions[w]) for w in windows]
    if CODEC in kinds:
        groups = [_group(sample, w, grid, times, vision) for w in windows]
        return ShownMedia(CODEC, [], groups)
    t = positions[:, 0]
    starts = np.flatnonzero(np.diff(t, prepend=-1))
    pictures = [
        _picture(
            sample.patches[whole][start:end],
            positions[start:end, 1:],
            grid,
            vision,
            int(t[start]),
            times.get(int(t[start])),
        )
        for start, end in zip(starts, [*starts[1:], len(t)], strict=True)
    ]
    return ShownMedia(PICTURE if kinds == [PICTURE] else FRAMES, pictures, [])


def _group(
    sample: SeenSample,
    window: slice,
    grid: tuple[int, int],
    times: dict[int, str],
    vision: VisionConfig,
) -> Group:
    """The group of one window. Canvases are filled block by block; a patch's position is its place
    in the clip."""
    merge, unit, area = vision.spatial_merge_size, vision.merge_unit, grid[0] * grid[1]
    patches, positions = sample.patches[window], sample.positions[window]
    layout = patch_positions(0, *grid, merge)[:, 1:]
    canvases = []
    for start in range(0, len(patches), area):
        part = patches[start : start + area]
        canvases.append(_picture(part, layout[: len(part)], grid, vision, 0, None))
    blocks = positions[::unit]  # the upper left patch of every block
    frames, anchor = [], None
    for t in np.unique(blocks[:, 0]).tolist():
        mine = np.flatnonzero(blocks[:, 0] == t)
        places = np.column_stack([mine, blocks[mine, 1:] // merge])
        if anchor is None and len(mine) * unit == area:
            anchor = len(frames)
        frames.append(GroupFrame(t, times.get(t), places.reshape(-1).tolist()))
    return Group(canvases, anchor, frames)
