"""Proposes the classes of vision rows for a corpus."""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Real

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.planning import Lengths, LengthTable, find_misfit, plan_table

_STARTS = 2  # sets of widths for which numbers of rows are searched


def propose_vision_rows(
    lengths: Lengths,
    rows: int,
    seq_len: int,
    *,
    unit: int = 4,
    divide: int = 1,
    classes: int = 3,
    token_cost: float = 16.0,
    even_width: float = 6144.0,
    samples: int = 10000,
) -> tuple[tuple[int, int], ...]:
    """Classes of vision rows for PackConfig(rows, seq_len) with which training is cheap.

    Widths are multiples of `unit` (the merge unit; 128 for attention kernels that work in blocks),
    numbers of rows are multiples of `divide`, and there are at most `classes`. Every record fits
    into an empty pack. The search is over candidate widths (sizes that windows often have, and
    small multiples) and numbers of rows. It minimises the cost of a plan of `samples` records,

        packs * (token slots * token_cost + sum of R * W * (1 + W / even_width)).

    `token_cost` is the cost of a token in the decoder, in patches through the encoder without
    attention (8.2e9 / 3.0e8 parameters: 27 for 8b). `even_width` is the row width above which
    attention costs more than the rest (6 D: 24 D^2 against 4 W D operations per patch and layer).

    A pure function. Raises DataError if a record is longer than seq_len.
    """
    table = LengthTable(lengths)
    every = np.arange(len(table.tokens))
    if table.tokens.max(initial=0) > seq_len:
        raise DataError(
            f"A record has {table.tokens.max()} tokens but a text row {seq_len}; leave it out, or "
            "make the row longer."
        )
    if not table.largest.any():
        return ()
    order = np.random.default_rng(0).permutation(every)[:samples]
    extremes = [np.argsort(-a, kind="stable")[:500] for a in (table.patches, table.largest)]
    hard = np.unique(np.concatenate([*extremes, order]))

    def widened(
        counts: dict[int, int], records: Int[np.ndarray, " members"] = hard
    ) -> dict[int, int]:
        """Adds rows until every record fits."""
        counts = dict(counts)
        while True:
            key = tuple((r, w) for w, r in sorted(counts.items()))
            misfit = find_misfit(table, records, PackConfig(rows, seq_len, key))
            if misfit is None:
                return counts
            counts[min(w for w in counts if w >= table.largest[misfit])] += divide

    costs: dict[tuple[int, tuple[tuple[int, int], ...]], float] = {}

    def cost(counts: dict[int, int], some: int = samples) -> float:
        key = tuple((r, w) for w, r in sorted(counts.items()))
        if (some, key) not in costs:
            config = PackConfig(rows, seq_len, key)
            ends = plan_table(table, order[:some], config).ends
            # The last pack counts by its number of samples; whole packs would hide the effect of a
            # row more or less.
            last = np.diff(ends, prepend=0)[-1] * len(ends) / ends[-1]
            patches = sum(r * w * (1 + w / even_width) for r, w in key)
            cost = (len(ends) - 1 + min(last, 1)) * (config.token_slots * token_cost + patches)
            costs[some, key] = cost
        return costs[some, key]

    windows, number = np.unique(table.run_windows, return_inverse=True)
    patches = np.bincount(number, table.run_windows * table.run_counts)
    patches *= rows * seq_len / table.tokens.sum()  # of each size of window in a full pack
    starts = []
    clips = table.run_windows[table.run_counts >= 4]
    many = int(clips.max(initial=0))  # the widest window that a record has many times
    for widths in _widths(windows, patches, many, unit, classes):
        # As many rows as the windows of each class need; fewer if records need more of the widest.
        need = 1.08 * np.bincount(np.searchsorted(widths, windows), patches, len(widths))
        fewest = widened({w: divide for w in widths})
        spare = max(fewest[widths[-1]] * widths[-1] - need[-1], 0)
        need[:-1] *= max(1 - spare / max(need[:-1].sum(), 1), 0)
        wanted = np.rint(need / widths / divide).astype(int) * divide
        counts = {w: max(fewest[w], r) for w, r in zip(widths, wanted.tolist(), strict=True)}
        starts.append(counts)
    starts.sort(key=lambda counts: cost(counts, samples // 4))
    found = [_downhill(counts, divide, widened, cost) for counts in starts[:_STARTS]]
    best = widened(min(found, key=cost), every)
    return tuple((r, w) for w, r in sorted(best.items()))


def _downhill(
    counts: dict[int, int],
    divide: int,
    widened: Callable[[dict[int, int]], dict[int, int]],
    cost: Callable[[dict[int, int]], float],
) -> dict[int, int]:
    """Changes the numbers of rows by width until no step lowers the cost. A step is fewer or more
    rows of a class, rows of one class for rows of another, or one class less."""
    while True:
        fewer = [{w: -divide} for w in counts]
        other = [{w: -divide, v: divide} for w in counts for v in counts if v != w]
        none = [{w: -counts[w]} for w in counts]
        for step in (*fewer, *other, *none, *({w: divide} for w in counts)):
            then = {w: r + step.get(w, 0) for w, r in counts.items()}
            then = {w: r for w, r in then.items() if r}
            if max(then, default=0) < max(counts):
                continue  # the widest row holds the largest window
            then = widened(then)
            if cost(then) < cost(counts):
                counts = then
                break
        else:
            return counts


def _widths(
    windows: Int[np.ndarray, " sizes"],
    patches: Real[np.ndarray, " sizes"],
    many: int,
    unit: int,
    classes: int,
) -> list[tuple[int, ...]]:
    """Sets of widths to try, from the sizes of windows and the patches that each size has.

    The last width holds the largest window. The others are sizes that windows often have or that
    clips have, twice those, and quantiles of the patches.
    """
    share = np.cumsum(patches) / patches.sum()
    parts = windows[np.searchsorted(share, (0.15, 0.3, 0.5, 0.7)).clip(max=len(windows) - 1)]
    often = windows[np.argsort(-patches, kind="stable")[:2]]
    tries = {-(-int(w) // unit) * unit for w in (*parts, *often, *(2 * often), many, 2 * many) if w}
    widest = -(-int(windows[-1]) // unit) * unit
    low = sorted(w for w in tries if w < widest)
    return [(*below, widest) for k in range(classes) for below in itertools.combinations(low, k)]
