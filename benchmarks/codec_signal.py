"""How close stock PyAV's scores come to true bit costs, and what they cost.

    python benchmarks/codec_signal.py CLIP [--bit-cost=inputs.npz] [--rounds=5] [--frames=256] ...

Prints one JSON line. With --bit-cost (an .npz with `bit_cost` [frames rows columns]) it compares
the scores with the true ones, over spans of 32 sampled frames: `overlap` is the share of the true
top blocks that are also the scores' top blocks (chance: about 0.10), and `spearman` is the mean
rank correlation of the blocks of a frame, without key frames. `selected_overlap` compares whole
runs of the selection, where groups end differently too.

`ratio` is the CPU time of reading the clip codec-style (decode, scores, selection, patches) over
that of decoding all its frames to RGB arrays: the best of alternating rounds in one process.
`extra_mib` is the peak of memory over the process's memory before reading, in the first round.
"""

import json
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from absl import flags
from jaxtyping import Float, Float32, Real

from ov2_jax.core.errors import UserError
from ov2_jax.core.program import Given, run
from ov2_jax.data.encoding.codec import CodecConfig, FileScores, StreamScores, read_codec_clip
from ov2_jax.data.encoding.codec.block_scores import block_scores

SPAN = 32


class BenchmarkError(UserError):
    """Arguments that cannot work."""


class KeptScores:
    """The stream's scores, kept for the comparison after the selection."""

    def __init__(self) -> None:
        self._stream = StreamScores()
        self.kept: dict[int, Real[np.ndarray, "r c"]] = {}

    def add(self, number: int, frame: av.VideoFrame, bits: int | None, wanted: bool) -> None:
        self._stream.add(number, frame, bits, wanted)

    def maps(self, numbers: Iterable[int]) -> Iterator[Real[np.ndarray, "r c"]]:
        numbers = list(numbers)
        for number, cost in zip(numbers, self._stream.maps(numbers), strict=True):
            self.kept[number] = cost
            yield cost


def ranks(values: Real[np.ndarray, " blocks"]) -> Float[np.ndarray, " blocks"]:
    """Ranks; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def top(scores: Float32[np.ndarray, "sampled blocks"], count: int) -> set[int]:
    return set(np.argsort(-scores.reshape(-1), kind="stable")[:count].tolist())


def compare(path: str, truth: str, config: CodecConfig, timeout_s: float) -> dict[str, Any]:
    """Overlap and rank correlation of the stream's scores with true bit costs."""
    stream = KeptScores()
    ours = read_codec_clip(path, config, timeout_s=timeout_s, scores=stream)
    true = read_codec_clip(path, config, timeout_s=timeout_s, scores=FileScores(truth))
    ids, hw = ours.selection.frame_ids, ours.selection.canvas_hw
    with np.load(truth) as arrays:
        bit_cost = arrays["bit_cost"]
    a = block_scores((bit_cost[i] for i in ids), len(ids), hw, config)
    b = block_scores((stream.kept[i] for i in ids), len(ids), hw, config)
    budget = (config.images_per_group - 1) * a.shape[1]
    overlaps = []
    for start in range(0, len(ids) - SPAN + 1, SPAN):
        rows = slice(start + 1, start + SPAN)
        overlaps.append(len(top(a[rows], budget) & top(b[rows], budget)) / budget)
    with av.open(path) as container:
        keys = {n for n, frame in enumerate(container.decode(video=0)) if frame.key_frame}
    pairs = [(x, y) for i, x, y in zip(ids.tolist(), a, b, strict=True) if i not in keys]
    rank = [np.corrcoef(ranks(x), ranks(y))[0, 1] for x, y in pairs if x.std() > 0 and y.std() > 0]
    same = set(map(tuple, ours.positions.tolist())) & set(map(tuple, true.positions.tolist()))
    return {
        "overlap": round(float(np.mean(overlaps)), 3) if overlaps else None,
        "spearman": round(float(np.mean(rank)), 3) if rank else None,
        "selected_overlap": round(len(same) / len(true.positions), 3),
    }


def decode_to_rgb(path: str) -> int:
    """The number of decoded frames."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        container.streams.video[0].codec_context.thread_count = 2
        return sum(frame.to_ndarray(format="rgb24").size > 0 for frame in container.decode(video=0))


def measure(path: str, config: CodecConfig, rounds: int, timeout_s: float) -> dict[str, Any]:
    """CPU seconds of both ways to read the clip, and memory."""
    best = {"rgb": np.inf, "codec": np.inf}
    extra = None
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        clip = read_codec_clip(path, config, timeout_s=timeout_s)
        best["codec"] = min(best["codec"], time.process_time() - start)
        if extra is None:
            extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        start = time.process_time()
        frames = decode_to_rgb(path)
        best["rgb"] = min(best["rgb"], time.process_time() - start)
    return {
        "frames": frames,
        "sampled": len(clip.selection.frame_ids),
        "canvas_hw": list(clip.selection.canvas_hw),
        "groups": len(clip.selection.groups),
        "rgb_s": round(best["rgb"], 3),
        "codec_s": round(best["codec"], 3),
        "ratio": round(best["codec"] / best["rgb"], 2),
        "extra_mib": round(extra),
    }


def _define_flags() -> None:
    flags.DEFINE_string("bit-cost", None, "An .npz file with the clip's true bit costs.")
    flags.DEFINE_integer("rounds", 5, "Rounds of the timing, of which the best counts.", 1)
    flags.DEFINE_integer("frames", 256, "Sampled frames.")
    flags.DEFINE_integer("max-pixels", 150_000, "Pixels of a canvas.")
    flags.DEFINE_integer("patch", 14, "Patch size in pixels.")
    flags.DEFINE_integer("block-size", 2, "Patches of a block's side, the model's merge size.")
    flags.DEFINE_float("timeout", 600.0, "Seconds to read the clip.")


def main(given: Given) -> None:
    if len(given.rest) != 1:
        raise BenchmarkError(f"The clips are {given.rest}; name one.")
    (clip,) = given.rest
    config = CodecConfig(
        num_sampled_frames=given.frames,
        max_pixels=given.max_pixels,
        patch=given.patch,
        block_size=given.block_size,
    )
    result = {"clip": Path(clip).name}
    result |= measure(clip, config, given.rounds, given.timeout)
    if given.bit_cost:
        result |= compare(clip, given.bit_cost, config, given.timeout)
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, _define_flags, rest=True)
