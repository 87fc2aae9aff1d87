"""Samples of all sources behind one index."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from ov2_jax.config.data import SourceConfig, leaves
from ov2_jax.core.errors import DataError, describe
from ov2_jax.core.files import expand, is_file
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.readers import Reader, open_reader
from ov2_jax.data.sources.records import RawRecord

_OPENERS = 16  # files opened at once: remote ones spend the time waiting


class _Part(NamedTuple):
    """One file of a source."""

    source: SourceConfig
    file: str
    reader: Reader


def _open(source: SourceConfig) -> list[_Part]:
    try:
        files = expand(source.path)
        found = source.kind == "tfds" or all(is_file(file) for file in files)
    except (ImportError, OSError) as error:  # a scheme's package is missing, no permission, ...
        raise DataError(f"The data source {source.path} cannot be opened: {error}.") from error
    if not files or not found:
        raise DataError(f"The data source {source.path} does not exist or is no file.")
    with ThreadPoolExecutor(_OPENERS) as pool:
        readers = list(pool.map(partial(open_reader, source), files))
    return [_Part(source, *pair) for pair in zip(files, readers, strict=True)]


class RecordSource:
    """All sources behind one index: `source[i]` is a RawRecord, `len(source)` their number.

    An error of a single record is never raised: it becomes the record's data.

    Attributes:
      files: for each source, its files (or TFDS folder) and the number of records of each.
      sizes: for each source, its number of records.

    Raises:
      DataError: a source cannot be opened, or all of them are empty.
    """

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        sources = leaves(sources)
        parts = [_open(source) for source in sources]
        self._parts = [part for of_source in parts for part in of_source]
        self._ends = np.cumsum([len(part.reader) for part in self._parts])
        self.files = tuple(tuple((p.file, len(p.reader)) for p in ps) for ps in parts)
        self.sizes = tuple(sum(n for _, n in files) for files in self.files)
        if not len(self):
            raise DataError(f"There is no sample in {', '.join(s.path for s in sources)}.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawRecord:
        which = int(np.searchsorted(self._ends, index, side="right"))
        source, file, reader = self._parts[which]
        row = index - int(self._ends[which]) + len(reader)
        try:
            data = reader.read(row)
        except SampleError as error:
            data = error
        except MemoryError:
            raise
        except Exception as error:  # libraries and storage raise all classes; the run goes on
            data = SampleError("bad_shard", describe(error))
        return RawRecord(
            data, file, reader.line(row), source.root_of(file), source.title, source.video
        )
