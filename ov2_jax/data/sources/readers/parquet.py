"""Parquet files: a row is found by its row group, which is read as a whole.

Parquet cannot seek to a row. Each thread keeps one row group, so reading in order decodes each row
group once, while shuffled reading decodes one for every sample. Keep row groups small (the Hugging
Face Hub writes 100 rows with pictures), or write the data as ArrayRecord.
"""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ov2_jax.core.errors import DataError, describe
from ov2_jax.core.files import open_binary
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.layouts import layout_of


class ParquetReader:
    """A damaged file is one row that cannot be read; a damaged row group spoils its rows only."""

    def __init__(self, file: str) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                f"{file} is Parquet, which needs pyarrow; pip install 'ov2_jax[parquet]'."
            ) from error
        self._file = file
        self._local = threading.local()
        self._broken = ""
        try:
            with open_binary(file) as opened, pyarrow.parquet.ParquetFile(opened) as parquet:
                groups = [
                    parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)
                ]
                columns = parquet.schema_arrow.names
                if any(n < 0 for n in groups) or sum(groups) != parquet.metadata.num_rows:
                    raise ValueError(
                        f"its row groups have {sum(groups)} rows, but its footer has "
                        f"{parquet.metadata.num_rows}"
                    )
        except Exception as error:  # a damaged footer raises many classes, also UnicodeDecodeError
            groups, columns, self._broken = [1], ["messages"], describe(error)
        self._columns = layout_of(columns, file)[1]
        self._ends = np.cumsum(groups, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        if self._broken:
            raise SampleError("bad_shard", f"the file cannot be read as Parquet: {self._broken}")
        try:
            return self._group(group).slice(index - start, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise SampleError("bad_record", f"a text is not UTF-8: {error}") from error

    def _group(self, group: int) -> Any:
        """The row group as a pyarrow Table."""
        import pyarrow.parquet

        kept = getattr(self._local, "kept", None)
        if kept is None or kept[0] != group:
            try:
                with (
                    open_binary(self._file) as opened,
                    pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as parquet,
                ):
                    table = parquet.read_row_group(group, self._columns, use_threads=False)
                    rows = parquet.metadata.row_group(group).num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise SampleError("bad_shard", f"row group {group}: {error}") from error
            if table.num_rows != rows:
                raise SampleError(
                    "bad_shard", f"row group {group} has {table.num_rows} of its {rows} rows"
                )
            kept = self._local.kept = (group, table)
        return kept[1]
