"""Readers: files of one format each as random-access rows, behind one interface.

A reader opens one file (or TFDS folder). If the file as a whole has a wrong layout, construction
raises DataError; if one row is bad, or lies in a damaged part, reading that row raises SampleError.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ov2_jax.config.data import SourceConfig
from ov2_jax.data.sources.readers.array_record import ArrayRecordReader
from ov2_jax.data.sources.readers.json_files import JsonReader
from ov2_jax.data.sources.readers.parquet import ParquetReader
from ov2_jax.data.sources.readers.tar import TarReader
from ov2_jax.data.sources.readers.tfds import TfdsReader


@runtime_checkable
class Reader(Protocol):
    """Rows of one file; cheap to send to worker processes, safe to use from threads."""

    def __len__(self) -> int: ...

    def line(self, index: int) -> int:
        """The row's place in the file for people, counted from 1 and unique in the file."""
        ...

    def read(self, index: int) -> bytes | Mapping[str, Any]:
        """JSON text, or a row that layouts.to_sample understands. Raises SampleError."""
        ...


def open_reader(source: SourceConfig, file: str) -> Reader:
    """Raises DataError if the file cannot be used."""
    match source.kind:
        case "json" | "jsonl":
            return JsonReader(file, lines=source.kind == "jsonl")
        case "parquet":
            return ParquetReader(file)
        case "tar":
            return TarReader(file)
        case "array_record":
            return ArrayRecordReader(file)
        case "tfds":
            return TfdsReader(file, source.split or "train")
    raise ValueError(f"{source.kind} has no reader")
