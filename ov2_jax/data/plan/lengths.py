"""Shards of lengths, each of so many consecutive records, and the table of all.

tokens [n]: 0 where the record was set aside      counts [n]: its windows
windows [k]: patches of each window, flat         dropped, fallbacks [n]
rejects: JSON lines of those that were set aside, in order (bytes)
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath

from ov2_jax.core.files import part_of
from ov2_jax.data.encoding.encode import SampleEncoder
from ov2_jax.data.packing.planning import Lengths
from ov2_jax.data.plan.folder import LENGTHS, Arrays, write_arrays
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sources.index import RecordSource

_SHARDS = "lengths"


def shard_file(folder: epath.Path, number: int) -> epath.Path:
    return folder / _SHARDS / f"{number:05d}.safetensors"


def finished_shards(folder: epath.Path) -> set[int]:
    there = folder / _SHARDS
    if not there.exists():
        return set()
    return {int(p.stem) for p in there.iterdir() if p.suffix == ".safetensors" and p.stem.isdigit()}


def reject_line(rejected: Rejected) -> bytes:
    """As RejectLog writes it."""
    line = json.dumps(rejected._asdict(), ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace")


def measure_shard(
    records: RecordSource, encoder: SampleEncoder, which: range, path: epath.Path
) -> None:
    """Validates the records and writes their lengths, atomically."""
    columns = np.zeros((4, len(which)), np.int32)
    windows: list[int] = []
    rejects: list[bytes] = []
    for i, record in enumerate(which):
        length = encoder.measure(records[record])
        if isinstance(length, Rejected):
            rejects.append(reject_line(length))
            continue
        columns[:, i] = (
            length.tokens,
            len(length.windows),
            length.dropped_rounds,
            length.uniform_fallbacks,
        )
        windows += length.windows
    tokens, counts, dropped, fallbacks = columns
    write_arrays(
        path,
        {
            "tokens": tokens,
            "counts": counts,
            "dropped": dropped,
            "fallbacks": fallbacks,
            "windows": np.array(windows, np.int32),
            "rejects": np.frombuffer(b"".join(rejects), np.uint8),
        },
    )


def write_table(folder: epath.Path, shards: int) -> None:
    """The finished shards as one table: tokens, windows, ends, dropped, fallbacks."""
    columns: dict[str, list[np.ndarray]] = {
        name: [np.zeros(0, np.int32)]
        for name in ("tokens", "counts", "dropped", "fallbacks", "windows")
    }
    for i in range(shards):
        arrays = Arrays(shard_file(folder, i))
        for name, parts in columns.items():
            parts.append(np.array(arrays[name]))  # a copy: a map each would be too many open files
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    joined["ends"] = np.cumsum(joined.pop("counts"), dtype=np.int64)
    write_arrays(folder / LENGTHS, joined)


def read_rejects(folder: epath.Path, shards: int) -> Iterator[bytes]:
    """The JSON lines of all shards, in order of the records."""
    for i in range(shards):
        yield from Arrays(shard_file(folder, i))["rejects"].tobytes().splitlines(keepends=True)


def usable_lengths(table: Arrays) -> tuple[Lengths, np.ndarray]:
    """The lengths of records that were not set aside, and their record numbers, int64."""
    tokens, ends = np.asarray(table["tokens"]), np.asarray(table["ends"])
    usable = tokens > 0  # the others have no windows either
    lengths = Lengths(tokens[usable], np.asarray(table["windows"]), ends[usable])
    return lengths, np.flatnonzero(usable)


def count_by_source(values: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Sums of the records' values by source."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(sizes)
    return (sums[ends] - sums[ends - np.array(sizes)]).tolist()


def write_lines(path: epath.Path, lines: Iterable[bytes]) -> int:
    """Atomically; returns how many."""
    part, n = part_of(path), 0
    with part.open("wb") as file:
        for line in lines:
            file.write(line)
            n += 1
    part.replace(path)
    return n
