"""ArrayRecord files whose records are JSON texts of the record form (media as paths or base64)."""

from array_record.python.array_record_data_source import ArrayRecordDataSource

from ov2_jax.core.errors import DataError, describe
from ov2_jax.core.files import is_remote
from ov2_jax.data.rejected import SampleError


class ArrayRecordReader:
    """A record that is not JSON is found when it is parsed, not before.

    The library opens `gs://` and local paths only. A damaged file is one row that cannot be read.
    """

    def __init__(self, file: str) -> None:
        if is_remote(file) and not file.startswith("gs://"):
            raise DataError(
                f"{file} cannot be read: ArrayRecord files must be local or on gs://; copy or "
                "mount them."
            )
        self._source, self._broken = None, ""
        try:
            self._source = ArrayRecordDataSource([file])
        except Exception as error:
            self._broken = describe(error)
        if self._source is not None and len(self._source) and self._is_example():
            raise DataError(
                f"{file} holds tf.train.Example records, not JSON texts; if TensorFlow Datasets "
                "wrote it, name its folder and format='tfds'."
            )

    def _is_example(self) -> bool:
        """Whether the first record starts like a protocol buffer (a newline), not like JSON."""
        try:
            record = self._source[0]
            return record[:1] == b"\x0a" and record.lstrip()[:1] != b"{"
        except Exception:  # reading it raises the error
            return False

    def __len__(self) -> int:
        return 1 if self._source is None else len(self._source)

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> bytes:
        if self._source is None:
            raise SampleError(
                "bad_shard", f"the file cannot be read as ArrayRecord: {self._broken}"
            )
        try:
            return self._source[index]
        except Exception as error:  # its decoders raise many classes
            raise SampleError("bad_shard", f"record {index + 1}: {describe(error)}") from error
