"""Data sets that TensorFlow Datasets wrote as ArrayRecord, read without TensorFlow."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ov2_jax.core.errors import DataError, describe
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.layouts import layout_of
from ov2_jax.data.sources.media import Embedded


class TfdsReader:
    """One split of a version's folder (the one with dataset_info.json and features.json).

    Pictures are the stored bytes; pictures in a sequence are decoded by TFDS.
    """

    def __init__(self, folder: str, split: str) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"{folder} needs TFDS, which is not installed; pip install 'ov2_jax[tfds]'."
            ) from error
        try:
            builder = tfds.builder_from_directory(folder)
            features = builder.info.features
            pictures = {
                name: tfds.decode.SkipDecoding()
                for name, feature in features.items()
                if isinstance(feature, tfds.features.Image)
            }
            self._source = builder.as_data_source(split, decoders=pictures)
        except Exception as error:  # TFDS raises many classes; all mean that it cannot be read
            raise DataError(
                f"{folder} cannot be read by TFDS as split {split!r}: {error}"
            ) from error
        self._features = features
        self._columns = layout_of(features, folder)[1]
        for name in self._columns:
            if isinstance(features[name], tfds.features.Video):
                raise DataError(
                    f"{folder} has decoded frames in {name}, without their times; store clips as "
                    "files and their paths as Text."
                )

    def __len__(self) -> int:
        return len(self._source)

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Mapping[str, Any]:
        try:
            row = self._source[index]
            return {name: _plain(row[name], self._features[name], name) for name in self._columns}
        except SampleError:
            raise
        except Exception as error:  # its decoders raise many classes on damaged records
            raise SampleError("bad_shard", describe(error)) from error


def _plain(value: Any, feature: Any, name: str) -> Any:
    """A TFDS value as in JSON: text, numbers, lists of objects; pictures stay as they are."""
    import tensorflow_datasets as tfds

    match feature:
        case tfds.features.Image():
            return Embedded(value, name) if isinstance(value, bytes) else value
        case tfds.features.FeaturesDict():
            return {key: _plain(value[key], inner, key) for key, inner in feature.items()}
        case tfds.features.Sequence(feature=tfds.features.FeaturesDict() as inner):
            # TFDS stores a list of objects as an object of lists.
            columns = {key: _plain_list(value[key], inner[key], key) for key in inner}
            return [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
        case tfds.features.Sequence():
            return _plain_list(value, feature.feature, name)
        case tfds.features.Text():
            try:
                return value.decode() if isinstance(value, bytes) else str(value)
            except UnicodeDecodeError as error:
                raise SampleError("bad_record", f"{name} is not UTF-8 text") from error
    return value.item() if isinstance(value, np.generic) else value


def _plain_list(values: Any, feature: Any, name: str) -> list[Any]:
    return [_plain(value, feature, name) for value in values]
