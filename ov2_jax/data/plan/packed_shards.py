"""Packs whose samples are encoded beforehand, one ArrayRecord record a pack.

A record is a safetensors message of the samples' arrays end to end, without padding, and of their
texts as JSON: the results of encoding, rejected samples included, in the order of the plan. Pixels
are stored raw: 588 bytes a patch of 14 pixels; compressing them would cost at each reading what it
saves. Placement follows from the plan, so reading gives the same batches as encoding.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from ov2_jax.core.errors import DataError
from ov2_jax.core.files import is_remote, writing
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample

_TEXTS = ("id", "source", "file", "line", "task", "dropped_rounds", "uniform_fallbacks")
_ARRAYS = ("tokens", "loss_mask", "windows", "patches", "patch_positions")


def samples_to_bytes(samples: Sequence[EncodedSample | Rejected]) -> bytes:
    """One record. Raises ValueError if there is no sample."""
    texts = [
        {"rejected": sample._asdict()}
        if isinstance(sample, Rejected)
        else {name: getattr(sample, name) for name in _TEXTS}
        | {"counts": [len(sample.tokens), len(sample.windows), len(sample.patches)]}
        for sample in samples
    ]
    good = [sample for sample in samples if isinstance(sample, EncodedSample)]
    arrays = {name: np.concatenate([getattr(s, name) for s in good]) for name in _ARRAYS if good}
    text = json.dumps(texts).encode()  # ASCII, so lone surrogates in file names stay as they are
    return safetensors.numpy.save({**arrays, "texts": np.frombuffer(text, np.uint8)})


def samples_from_bytes(record: bytes) -> list[EncodedSample | Rejected]:
    arrays = safetensors.numpy.load(record)
    samples: list[EncodedSample | Rejected] = []
    at = [0, 0, 0]
    for text in json.loads(arrays["texts"].tobytes()):
        if "rejected" in text:
            samples.append(Rejected(**text["rejected"]))
            continue
        counts = text.pop("counts")
        token, window, patch = (slice(a, a + n) for a, n in zip(at, counts, strict=True))
        at = [a + n for a, n in zip(at, counts, strict=True)]
        samples.append(
            EncodedSample(
                **text,
                tokens=arrays["tokens"][token],
                loss_mask=arrays["loss_mask"][token],
                windows=arrays["windows"][window],
                patches=arrays["patches"][patch],
                patch_positions=arrays["patch_positions"][patch],
            )
        )
    return samples


def write_packs(path: epath.PathLike, packs: Iterable[Sequence[EncodedSample | Rejected]]) -> None:
    """Writes a file of packs, whole or not at all."""
    with writing(path) as part:
        if not is_remote(path):
            _write(str(part), packs)
        else:
            with tempfile.TemporaryDirectory() as folder:
                local = str(Path(folder) / "packs")
                _write(local, packs)
                epath.Path(local).copy(part)


def _write(path: str, packs: Iterable[Sequence[EncodedSample | Rejected]]) -> None:
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    try:
        for samples in packs:
            writer.write(samples_to_bytes(samples))
    finally:
        writer.close()


class PackedShards:
    """The encoded samples of pack n of a plan: `shards(n)`. Raises DataError."""

    def __init__(self, files: Sequence[str], packs: int) -> None:
        try:
            self._source = ArrayRecordDataSource(list(files))
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(
                f"The packed shards beside {files[0]} cannot be opened ({error}); run "
                "ov2_jax.data.prepare --packed-shards again."
            ) from error
        if len(self._source) != packs:
            raise DataError(
                f"The packed shards beside {files[0]} hold {len(self._source)} packs of {packs}; "
                "run ov2_jax.data.prepare --packed-shards again."
            )

    def __call__(self, pack: int) -> list[EncodedSample | Rejected]:
        return samples_from_bytes(self._source[pack])
