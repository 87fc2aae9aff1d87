"""How well stock PyAV's signal stands in for true bit costs, and what it costs.

    python benchmarks/codec_signal.py CLIP [--bit-cost=inputs.npz] [--rounds=5] [--frames=256] ...

Prints one JSON line. With --bit-cost (an .npz with `bit_cost` [frames r c]) it compares the signal
to the truth, over spans of 32 sampled frames: `overlap`, the share of the true top-K blocks that
the signal's top-K has (chance: about 0.10), and `spearman`, the mean rank correlation of the blocks
of a frame, key frames left out. `selected_overlap` compares whole runs of the selection, where
groups end differently too.

`ratio` is the CPU time of reading the clip codec-style (decode, scores, selection, patches) over
that of decoding all its frames to RGB arrays, the best of alternating rounds in one process.
`extra_mib` is the peak of memory over what the process had before reading, of the first round.
"""

import argparse
import json
import resource
import time

import av
import numpy as np

from ov2_jax.data.encoding.codec import CodecConfig, FileScores, StreamScores, read_codec_clip
from ov2_jax.data.encoding.codec.select import block_scores

SPAN = 32


class _Both:
    """The stream's scores, kept so that they can be compared after the selection."""

    def __init__(self):
        self._stream = StreamScores()
        self.kept = {}

    def add(self, number, frame, bits, wanted):
        self._stream.add(number, frame, bits, wanted)

    def maps(self, numbers):
        numbers = list(numbers)
        for number, cost in zip(numbers, self._stream.maps(numbers), strict=True):
            self.kept[number] = cost
            yield cost


def ranks(values):
    """Mean ranks of equal values."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def top(scores, k):
    return set(np.argsort(-scores.reshape(-1), kind="stable")[:k].tolist())


def compare(path, truth, config, timeout_s):
    """Overlap and rank correlation of the stream's scores with true bit costs."""
    both = _Both()
    ours = read_codec_clip(path, config, timeout_s=timeout_s, scores=both)
    true = read_codec_clip(path, config, timeout_s=timeout_s, scores=FileScores(truth))
    ids, hw = ours.selection.frame_ids, ours.selection.canvas_hw
    with np.load(truth) as arrays:
        bit_cost = arrays["bit_cost"]
    a = block_scores((bit_cost[i] for i in ids), len(ids), hw, config)
    b = block_scores((both.kept[i] for i in ids), len(ids), hw, config)
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


def decode_to_rgb(path):
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        container.streams.video[0].codec_context.thread_count = 2
        return sum(frame.to_ndarray(format="rgb24").size > 0 for frame in container.decode(video=0))


def measure(path, config, rounds, timeout_s):
    """CPU seconds of both ways, and memory."""
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clip")
    parser.add_argument("--bit-cost")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--max-pixels", type=int, default=150_000)
    parser.add_argument("--patch", type=int, default=14)
    parser.add_argument("--block-size", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0)
    args = parser.parse_args(argv)
    config = CodecConfig(
        num_sampled_frames=args.frames,
        max_pixels=args.max_pixels,
        patch=args.patch,
        block_size=args.block_size,
    )
    result = {"clip": args.clip.rsplit("/", 1)[-1]}
    result |= measure(args.clip, config, args.rounds, args.timeout)
    if args.bit_cost:
        result |= compare(args.clip, args.bit_cost, config, args.timeout)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
