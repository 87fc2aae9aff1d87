"""What a step of a recipe needs, whatever is compiled: model FLOPs, FLOPs of attention kernels, and
the fewest bytes that its collectives can send.

The planner has no data. It assumes that every slot is filled with samples and windows of one length
(`Filling`), which the report states.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ov2_jax.config.experiment import Experiment
from ov2_jax.data.encoding.images import smart_resize
from ov2_jax.data.encoding.video import FrameSampling
from ov2_jax.model.attention import row_segments, visited_blocks
from ov2_jax.model.attention.splash import block_size
from ov2_jax.model.layers.remat import SAVED
from ov2_jax.sharding.rules import GATHERED, mesh_axes, parameter_axes, path_string
from ov2_jax.training.monitoring.flops import Work, forward_flops

_TEXT_TOKENS = 1024  # of a clip's sample, in addition to its frames
_FRAME_TOKENS = 12  # of a frame's timestamp: "<123.4 seconds>", its two marks and a newline
_LONG_CLIP_S = 3600.0
LANES = 128  # rows are padded to whole lanes


@dataclasses.dataclass(frozen=True)
class Filling:
    """How rows are filled: with samples and windows of one length; the last of a row is shorter."""

    sample: int  # tokens of a sample
    window: int  # patches of an attention window
    clip: int  # patches of a clip

    def samples(self, length: int) -> list[int]:
        return _cut(length, self.sample)

    def windows(self, width: int) -> list[int]:
        return _cut(width, self.window)


def _cut(length: int, piece: int) -> list[int]:
    piece = min(piece, length)
    return [piece] * (length // piece) + ([length % piece] if length % piece else [])


def filling(experiment: Experiment, *, sample: int | None, window: int | None) -> Filling:
    """The filling that is assumed, from the config's data section.

    Every sample is the longest clip that the config allows, of square frames, with its timestamps
    and 1024 tokens of text; windows are that clip's. `sample` and `window` replace these lengths.
    """
    v, data = experiment.model.vision, experiment.data
    low, high = data.frame_pixels
    factor = v.patch_size * v.spatial_merge_size
    frame = max(  # rounding takes a row from some of these squares
        math.prod(smart_resize(side, side, factor=factor, min_pixels=low, max_pixels=high))
        for side in (720, 1080, 2048)
    ) // (v.patch_size**2)
    count = FrameSampling(data.num_frames, data.target_fps, data.max_frames).count(_LONG_CLIP_S)
    tokens = count * (frame // v.merge_unit + _FRAME_TOKENS) + _TEXT_TOKENS
    return Filling(
        sample=min(sample or tokens, experiment.pack.seq_len),
        window=window or min(count, v.frame_windows_size) * frame,
        clip=count * frame,
    )


def step_work(experiment: Experiment, fill: Filling) -> Work:
    """The work of a whole optimizer step, with every slot filled."""
    pack, packs = experiment.pack, experiment.packs_per_step
    windows = sum(r * sum(n * n for n in fill.windows(w)) for r, w in pack.vision_rows)
    samples = pack.rows * sum(n * n for n in fill.samples(pack.seq_len))
    return Work(
        packs * pack.token_slots, packs * pack.patch_slots, packs * samples, packs * windows
    )


def passes(experiment: Experiment) -> dict[str, int]:
    """Cost of each part's step in forward passes: 1, and 1 for each kind of gradient it needs."""
    found, before = {}, False
    for part in ("encoder", "merger", "decoder"):
        trained = part in experiment.optimizer.train
        before |= trained
        found[part] = 1 + trained + before
    return found


class ModelFlops(NamedTuple):
    """FLOPs of a step by part, all devices together."""

    matmuls: dict[str, float]
    attention: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.matmuls.values()) + sum(self.attention.values())


def model_flops(experiment: Experiment, work: Work) -> ModelFlops:
    """By the formula of training/monitoring/flops.py, with attention apart."""
    times = passes(experiment)
    both = forward_flops(experiment.model, work)
    without = work._replace(squared_samples=0, squared_windows=0)
    matmuls = forward_flops(experiment.model, without)
    return ModelFlops(
        {part: matmuls[part] * times[part] for part in matmuls},
        {
            part: (both[part] - matmuls[part]) * times[part]
            for part in both
            if both[part] > matmuls[part]
        },
    )


# Matmuls of block_q x block_k x head size for each block that an attention kernel visits. Forward:
# scores and values. Backward: the scores again, then the gradients of weights, queries, keys and
# values; with one kernel for queries and one for keys, scores and the weights' gradient come twice.
FORWARD_MATMULS = 2
BACKWARD_MATMULS = 5
BACKWARD_MATMULS_TWO_KERNELS = 7


def kernel_flops(visited: float, block_q: int, block_k: int, width: int, matmuls: int) -> float:
    """FLOPs of an attention kernel that visits `visited` blocks; `width` is heads x head size."""
    return visited * matmuls * 2.0 * block_q * block_k * width


def row_blocks(lengths: list[int], block: int, *, causal: bool) -> int:
    """Blocks of a row's scores that hold a visible pair, for segments of these lengths."""
    total = sum(lengths)
    size = math.ceil(total / block) * block
    ids = np.zeros((1, size), np.int32)
    ids[0, :total] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return int(visited_blocks(row_segments(ids, causal=causal), block, block).sum())


def attention_kernel_flops(
    experiment: Experiment, fill: Filling, block_size: Callable[[int], int] = block_size
) -> dict[str, float]:
    """FLOPs of a step's attention kernels on TPUs by part, all devices together.

    `block_size` gives the side of a kernel's blocks for a row's length. If the remat policy does
    not keep attention, its forward kernel runs twice.
    """
    v, t, pack = experiment.model.vision, experiment.model.text, experiment.pack
    times, packs = passes(experiment), experiment.packs_per_step
    again = FORWARD_MATMULS * (not keeps_attention(experiment.compute.remat))

    def row(part: str, lengths: list[int], causal: bool, width: int) -> float:
        length = math.ceil(sum(lengths) / LANES) * LANES  # as the kernels pad it
        block = block_size(length)
        visited = row_blocks(lengths, block, causal=causal)
        matmuls = FORWARD_MATMULS
        if times[part] > 1:
            matmuls += BACKWARD_MATMULS_TWO_KERNELS + again
        return kernel_flops(visited, block, block, width, matmuls)

    encoder = sum(
        rows * row("encoder", fill.windows(width), False, v.hidden_size)
        for rows, width in pack.vision_rows
    )
    heads = t.num_attention_heads * t.head_dim
    decoder = pack.rows * row("decoder", fill.samples(pack.seq_len), True, heads)
    return {
        "encoder": packs * v.num_hidden_layers * encoder,
        "decoder": packs * t.num_hidden_layers * decoder,
    }


def keeps_attention(remat: str) -> bool:
    """Whether a remat policy keeps what the backward pass of attention kernels needs."""
    return remat == "none" or "attention" in SAVED.get(remat, ())


def least_weight_bytes(
    experiment: Experiment, params: Any, mesh: Mapping[str, int]
) -> dict[str, float]:
    """The fewest bytes that a device sends in a step to gather parameters and add up gradients.

    Each sharded parameter travels in bfloat16. It is gathered once forward, and once more backward
    if gradients pass through its part; if it is trained, its gradient is reduce-scattered. What
    stays sharded (heads and MLPs over tensor, experts over expert) is not counted. Along axes that
    do not shard a parameter, its replicas add up their gradients by an all-reduce.
    """
    times = passes(experiment)
    found = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}

    def devices(axes: Iterable[str]) -> int:
        return math.prod(mesh[axis] for axis in axes)

    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_string(key)
        part = path.split(".")[0]
        cut = mesh_axes(path)
        meanings = parameter_axes(path) or ()
        gathered = {axis for meaning in meanings for axis in GATHERED.get(meaning, ())}
        size = 2.0 * math.prod(leaf.shape) / devices(cut - gathered)
        piece = size / devices(gathered)
        found["all-gather"] += (size - piece) * (2 if times[part] > 1 else 1)
        if part in experiment.optimizer.train:
            found["reduce-scatter"] += size - piece
            copies = devices(axis for axis in mesh if axis not in cut)
            found["all-reduce"] += 2 * piece * (copies - 1) / copies
    return found
