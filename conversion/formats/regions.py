"""Regions of our arrays: what is stored, moved and copied at a time."""

import concurrent.futures
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

from conversion.keys import Entry, Leaf

Region = tuple[slice, ...]

# A chunk is the least that a restoring host reads. 16 MiB splits a gate_proj layer of the 8B
# model (100 MB) in 6 along its output axis and keeps the model at about 1100 files.
CHUNK_BYTES = 16 * 2**20
# What one worker holds at a time. Workers overlap reading, transposing and writing.
BLOCK_BYTES = 32 * 2**20
WORKERS = 3


def chunk_shape(leaf: Leaf, itemsize: int) -> tuple[int, ...]:
    """Chunks of at most CHUNK_BYTES: some layers or experts whole, or one in equal strips."""
    lead, own = leaf.lead, leaf.shape[len(leaf.lead) :]
    room = CHUNK_BYTES // (math.prod(own) * itemsize)
    if len(lead) == 2 and room:
        layers, experts = lead
        # Equal chunks of experts: a host that restores a part of them reads no others.
        fit = max(n for n in range(1, min(experts, room) + 1) if experts % n == 0)
        return (min(layers, room // fit) if fit == experts else 1, fit, *own)
    if room:
        return (*(min(layers, room) for layers in lead), *own)
    shape = [*(1 for _ in lead), *own]
    pieces = math.ceil(math.prod(own) * itemsize / CHUNK_BYTES)
    shape[leaf.split_axis] = math.ceil(shape[leaf.split_axis] / pieces)
    return tuple(shape)


def blocks(
    shape: Sequence[int], chunk: Sequence[int], itemsize: int, axes: Sequence[int]
) -> Iterator[Region]:
    """Regions of whole chunks that tile an array, grown along `axes` up to BLOCK_BYTES."""
    block = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
    for axis in axes:
        room = BLOCK_BYTES // max(1, math.prod(block) * itemsize)
        if room > 1:
            block[axis] = min(block[axis] * room, shape[axis])
    starts = [range(0, n, b) for n, b in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(c, min(c + b, n)) for c, b, n in zip(corner, block, shape, strict=True))


def run_blocks(work: Callable[[Region], int], regions: Iterator[Region]) -> Iterator[int]:
    """Runs `work` on WORKERS threads over the regions; yields its results (bytes done)."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        running = {pool.submit(work, region) for region in itertools.islice(regions, WORKERS)}
        while running:
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                yield future.result()
            running |= {pool.submit(work, r) for r in itertools.islice(regions, len(done))}


def bounds(index: slice, size: int) -> tuple[int, int]:
    """Start and stop of a slice of step 1 over an axis of `size`."""
    start, stop, step = index.indices(size)
    assert step == 1, index
    return start, stop


class Overlap(NamedTuple):
    """The part of one Hugging Face tensor that lies in a region of a leaf.

    `leaf[region][in_region] == as_ours(entry, tensor)[in_entry]`.
    """

    entry: Entry
    in_entry: Region  # in our orientation
    in_region: tuple[int | slice | EllipsisType, ...]


def overlaps(leaf: Leaf, region: Region) -> list[Overlap]:
    """The Hugging Face tensors that a region of a leaf touches."""
    found = []
    ranges = [bounds(s, n) for s, n in zip(region, leaf.shape, strict=True)]
    outer, inner = ranges[: len(leaf.lead)], ranges[len(leaf.lead) :]
    own = tuple(slice(a, b) for a, b in inner[:-1])
    for place in itertools.product(*(range(*r) for r in outer)):
        lead = tuple(n - start for n, (start, _) in zip(place, outer, strict=True))
        for entry in leaf.by_lead[place]:
            low = max(inner[-1][0], entry.last_axis.start)
            high = min(inner[-1][1], entry.last_axis.stop)
            if low >= high:
                continue
            in_entry = slice(low - entry.last_axis.start, high - entry.last_axis.start)
            in_region = slice(low - inner[-1][0], high - inner[-1][0])
            found.append(Overlap(entry, (*own, in_entry), (*lead, ..., in_region)))
    return found
