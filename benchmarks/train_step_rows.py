"""Chooses the text and vision rows that a step's samples are packed into, by a cost model.

The cost is in FLOPs of a forward pass: matmuls of every slot, filled or not, and attention by an
estimate of the scores in its blocks.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.data.packing.placement import Placement, place_pack
from ov2_jax.data.sample import SampleSize
from ov2_jax.model.attention.xla import BLOCK

# A FLOP of attention costs about as much as two of a matmul on CPU: exponentials, small products.
ATTENTION = 2.0
# FLOPs of visiting one more block, in addition to its scores: some 20 us at 300 GFLOP/s.
VISIT = 6e6
# Candidates for each side; packing is tried with every pair, cheapest first.
CANDIDATES = 24


class Rows(NamedTuple):
    """The rows, and where each sample is in them."""

    pack: PackConfig
    placements: list[Placement]


Classes = tuple[tuple[int, int], ...]  # (rows, slots of a row), as in PackConfig.vision_rows


def choose_rows(sizes: Sequence[SampleSize], model: ModelConfig, *, multiple: int = 1) -> Rows:
    """The cheapest pack that holds all samples; slots of a row are a multiple of `multiple`."""
    v, t = model.vision, model.text
    tokens = [s.tokens for s in sizes]
    windows = [w for s in sizes for w in s.windows]
    patch = 2.0 * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = t.hidden_size * (2 * q + 2 * kv + 3 * t.active_intermediate_size)
    token = 2.0 * (layer + t.hidden_size * t.vocab_size / t.num_hidden_layers)

    def text_cost(classes: Classes) -> float:
        return t.num_hidden_layers * _cost(classes, tokens, token, 4.0 * q, causal=True)

    def vision_cost(classes: Classes) -> float:
        cost = _cost(classes, windows, patch, 4.0 * v.hidden_size, causal=False)
        return v.num_hidden_layers * cost

    text = [_fit(tokens, rows, multiple) for rows in range(1, len(sizes) + 1)]
    pairs = itertools.product(
        _cheapest(text, text_cost),
        _cheapest(_vision(windows, math.lcm(v.merge_unit, multiple)), vision_cost),
    )
    for _, ((rows, length),), vision_rows in sorted((a + b, c, d) for (a, c), (b, d) in pairs):
        pack = PackConfig(rows, length, vision_rows)
        placements = place_pack(sizes, pack)
        if len(placements) == len(sizes):
            return Rows(pack, placements)
    raise AssertionError("One row of everything holds everything.")


def _cheapest(
    candidates: Iterable[Classes], cost: Callable[[Classes], float]
) -> list[tuple[float, Classes]]:
    """The cheapest, and one row for all segments, into which everything fits."""
    candidates = list(dict.fromkeys(candidates))
    ranked = sorted((cost(c), c) for c in candidates)
    return ranked[:CANDIDATES] + [(cost(candidates[0]), candidates[0])]


def _fit(segments: Sequence[int], rows: int, multiple: int) -> Classes:
    """`rows` rows, as short as best-fit-decreasing allows."""
    if not segments:
        return ()
    length = max(*segments, -(-sum(segments) // rows)) if rows > 1 else sum(segments)
    while True:
        length = -(-length // multiple) * multiple
        room = [length] * rows
        for segment in sorted(segments, reverse=True):
            fits = [r for r in room if r >= segment]
            if not fits:
                break
            room[room.index(min(fits))] -= segment
        else:
            return ((rows, length),)
        length += max(multiple, 4)


def _vision(windows: Sequence[int], multiple: int) -> list[Classes]:
    """Vision rows of one class, or of two: windows up to a size, and larger ones."""
    found = [_fit(windows, rows, multiple) for rows in range(1, len(windows) + 1)] or [()]
    for most in sorted(set(windows))[:-1]:
        small = [w for w in windows if w <= most]
        large = [w for w in windows if w > most]
        for one, two in itertools.product(
            (_fit(small, r, multiple) for r in range(1, len(small) + 1)),
            (_fit(large, r, multiple) for r in range(1, len(large) + 1)),
        ):
            if one[0][1] < two[0][1]:
                found.append(one + two)
    return found


def _cost(
    classes: Classes,
    segments: Sequence[int],
    slot: float,
    score: float,
    *,
    causal: bool,
) -> float:
    """FLOPs of a layer: `slot` for every slot, `score` for every score.

    If a row is cut into blocks, a segment has scores with its own blocks, half of them if causal,
    and with the segments that share its first and last block. A row of one block has all scores.
    """
    total = 0.0
    smaller = 0
    for rows, width in classes:
        inside = [w for w in segments if smaller < w <= width]
        if width <= BLOCK:
            scores, visits = rows * width**2, rows
        else:
            scores = sum(w * min(width, w / (1 + causal) + BLOCK) for w in inside)
            visits = scores / BLOCK**2
        total += rows * width * slot + ATTENTION * score * scores + VISIT * visits
        smaller = width
    return total
