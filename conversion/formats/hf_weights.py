"""The weights of a Hugging Face folder as our parameters, checked by the key table."""

from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Shaped

from conversion.errors import ConversionError, listing
from conversion.formats.regions import Region, bounds, overlaps
from conversion.formats.safetensors_io import (
    WEIGHT_DTYPES,
    SafetensorsFolder,
    TensorSpec,
    copy_into,
    weight_dtype,
)
from conversion.keys import Config, Entry, Leaf, ParamPath, as_ours, leaves
from ov2_jax.config.hf import load_config


def check_keys(table: Mapping[str, Entry], tensors: Mapping[str, TensorSpec], where: str) -> None:
    """Raises one ConversionError that lists every unknown, missing and misshapen key."""
    problems = []
    unknown = sorted(tensors.keys() - table.keys())
    if unknown:
        problems.append(
            listing("Keys that the model described by config.json does not have", unknown)
        )
    if unknown == ["lm_head.weight"]:
        problems.append("  (config.json ties the head to the embedding: tie_word_embeddings.)")
    missing = [key for key in table if key not in tensors]
    if missing:
        problems.append(listing("Keys that are missing", missing))
    misshapen = [
        f"{key}: is {list(tensors[key].shape)}, must be {list(entry.hf_shape)}"
        for key, entry in table.items()
        if key in tensors and tensors[key].shape != entry.hf_shape
    ]
    if misshapen:
        problems.append(listing("Keys with the wrong shape", misshapen))
    untyped = [
        f"{key}: is {tensors[key].dtype.name}, must be one of {', '.join(WEIGHT_DTYPES)}"
        for key in table
        if key in tensors and tensors[key].dtype.name not in WEIGHT_DTYPES
    ]
    if untyped:
        problems.append(
            listing("Keys with a dtype that is not a plain floating-point one", untyped)
        )
    if problems:
        raise ConversionError("\n".join([f"{where} does not fit its config.json.", *problems]))


class HFWeights:
    """The weights of a Hugging Face folder, addressed as our parameters.

    Only headers are read until `read` is called. Raises ConversionError if the folder's keys,
    shapes or dtypes don't fit its config.json.
    """

    def __init__(self, folder: epath.PathLike, dtype: str | None = None) -> None:
        """`dtype`: cast all weights to this; None keeps each tensor's own."""
        self.folder = folder
        self.config: Config = load_config(folder)
        self.leaves: dict[ParamPath, Leaf] = leaves(self.config)
        self._weights = SafetensorsFolder(folder)
        table = {e.key: e for leaf in self.leaves.values() for e in leaf.entries}
        check_keys(table, self._weights.tensors, str(folder))
        self._cast = None if dtype is None else weight_dtype(dtype)
        if dtype is None:
            self._check_one_dtype_a_leaf()

    def _check_one_dtype_a_leaf(self) -> None:
        mixed = []
        for leaf in self.leaves.values():
            found = {self._weights.tensors[e.key].dtype.name for e in leaf.entries}
            if len(found) > 1:
                keys = f"{leaf.entries[0].key} ... {leaf.entries[-1].key}"
                mixed.append(f"{leaf.name}: {', '.join(sorted(found))} ({keys})")
        if mixed:
            raise ConversionError(
                listing(
                    f"{self.folder}: layers that are stacked into one array must have one dtype; "
                    "choose one with --dtype. Mixed are",
                    mixed,
                )
            )

    def dtype(self, path: ParamPath) -> np.dtype:
        """The dtype of what `read` returns for a leaf."""
        if self._cast is not None:
            return self._cast
        return self._weights.tensors[self.leaves[path].entries[0].key].dtype

    def nbytes(self) -> int:
        return sum(leaf.size * self.dtype(path).itemsize for path, leaf in self.leaves.items())

    def read(self, path: ParamPath, region: Region | None = None) -> Shaped[np.ndarray, "..."]:
        """A region of a leaf (all of it without `region`), as an array with memory of its own."""
        leaf = self.leaves[path]
        if region is None:
            region = tuple(slice(0, n) for n in leaf.shape)
        sizes = [bounds(s, n) for s, n in zip(region, leaf.shape, strict=True)]
        out = np.empty([stop - start for start, stop in sizes], self.dtype(path))
        for entry, in_entry, in_region in overlaps(leaf, region):
            tensor = as_ours(entry, self._weights.array(entry.key))
            copy_into(out[in_region], tensor[in_entry])
        return out
