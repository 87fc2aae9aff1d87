"""The values that lengths and plans depend on, by flat names, to compare and to show to people.

Lengths depend on the data config, the model's patches, windows and token ids, the pack's shape
(which decides what fits), the tokenizer's content, and every file's name, records and bytes. They
depend on the seed only if a coin decides how clips are read. The places of files and media (`path`,
`root`) count while a folder is being prepared, but a prepared data set may move afterwards.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ov2_jax.config.data import DataConfig, SourceConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.files import size
from ov2_jax.data.encoding.tokenizer import Tokenizer

# Increased when the same configuration begins to give other lengths.
_FORMAT = 1

# Fields of DataConfig that do not change an encoded sample. `sources` and `shuffle` belong to the
# mixture; encoding_inputs lists the fields of a source that encoding depends on.
_NOT_ENCODING = (
    "sources",
    "shuffle",
    "plan",
    "num_workers",
    "lookahead",
    "decode_timeout_s",
    "max_reject_share",
    "reject_check_after",
)
_VISION = ("num_channels", "patch_size", "spatial_merge_size", "frame_windows_size")
_TOKEN_IDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
_PLACES = ("path", "root")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of the tokenizer's content, wherever it lies."""
    text = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encoding_inputs(
    data: DataConfig,
    model: ModelConfig,
    pack: PackConfig,
    tokenizer: Tokenizer,
    seed: int,
) -> dict[str, Any]:
    """Everything that a record's length depends on, except the files, as plain JSON values."""
    fields = dataclasses.asdict(dataclasses.replace(data, sources=()))
    found: dict[str, Any] = {"format": _FORMAT, "tokenizer": tokenizer_hash(tokenizer)}
    for name, value in fields.items():
        if name not in _NOT_ENCODING:
            found |= _flat(f"data.{name}", value)
    found |= {f"model.vision.{name}": getattr(model.vision, name) for name in _VISION}
    found |= {f"model.{name}": getattr(model, name) for name in _TOKEN_IDS}
    found |= {f"pack.{name}": value for name, value in dataclasses.asdict(pack).items()}
    sources = leaves(data.sources)
    found["data.sources"] = f"{len(sources)} data sets"
    for i, source in enumerate(sources):
        names = ("path", "root", "kind", "split", "video", "title")
        found |= {f"data.sources[{i}].{name}": getattr(source, name) for name in names}
    if any(source.video == "alternate" for source in sources):
        found["seed"] = seed
    return json.loads(json.dumps(found))


def file_inputs(files: Sequence[Sequence[tuple[str, int]]]) -> dict[str, str]:
    """Name, records and bytes of every file of every source (RecordSource.files)."""
    return {
        f"data.sources[{i}] file {k + 1}": (
            f"{PurePath(file).name} ({records} records, {size(file)} bytes)"
        )
        for i, of_source in enumerate(files)
        for k, (file, records) in enumerate(of_source)
    }


def mixture_inputs(data: DataConfig) -> dict[str, Any]:
    """Everything that decides which records an epoch has, except the seed."""

    def of(sources: Sequence[SourceConfig], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, source in enumerate(sources):
            here = f"{prefix}[{i}]"
            for name in ("weight", "epochs", "cap"):
                found[f"{here}.{name}"] = getattr(source, name)
            found |= of(source.sources, f"{here}.sources")
        return found

    return {"data.shuffle": data.shuffle, **of(data.sources, "data.sources")}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(f"{name}.{key}", inner).items()}


def difference(
    then: Mapping[str, Any], now: Mapping[str, Any], *, moved: bool = False
) -> str | None:
    """`NAME A, but this run has B` for the first name whose values differ; None if all are equal.

    With `moved` the places of sources may differ.
    """
    for name in [*now, *sorted(set(then) - set(now))]:
        if moved and name.startswith("data.sources[") and name.rpartition(".")[2] in _PLACES:
            continue
        if name not in then or name not in now or then[name] != now[name]:
            before, after = then.get(name, "missing"), now.get(name, "missing")
            return f"{name} {before!r}, but this run has {after!r}"
    return None
