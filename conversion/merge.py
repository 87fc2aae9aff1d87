"""Merges a standalone encoder, a merger and a Qwen3 into one full model, the start checkpoint.

    python -m conversion.merge --encoder=HF_DIR --llm=HF_DIR [--merger=HF_DIR] --out=HF_DIR
        [--merge-size=2] [--frame-windows-size=4] [--dtype=bfloat16] [--seed=0] [--dry-run]

The encoder is a OneVision-Encoder or -Lang. Its q/k/v are stacked; its pooling head, post-norm and
RoPE tables are dropped. Without `--merger` the merger is fresh: normal kernels of standard
deviation 0.02, zero biases. A tied head of the language model is copied. Tokenizer, generation
config and special token ids come from the language model's folder, the patch size from the
encoder. `--dry-run` checks everything, prints the plan and writes nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float32

from conversion.destination import new_folder
from conversion.errors import ConversionError, listing
from conversion.formats.hf_completion import complete
from conversion.formats.hf_files import copy_side_files, write_json
from conversion.formats.hf_tokenizer import (
    SPECIAL_TOKENS,
    chat_template,
    special_token_ids,
    write_chat_template,
)
from conversion.formats.safetensors_io import (
    DEFAULT_MAX_SHARD_BYTES,
    DEFAULT_MAX_SHARD_SIZE,
    WEIGHT_DTYPES,
    SafetensorsFolder,
    SafetensorsWriter,
    TensorSpec,
    copy_into,
    parse_shard_size,
    weight_dtype,
)
from conversion.keys import Entry, ParamPath, key_table
from conversion.progress import byte_progress
from ov2_jax.config.hf import (
    FULL_MODEL_TYPES,
    model_config_from_hf,
    model_config_to_hf,
    read_hf_config,
    vision_config_from_hf,
)
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.program import Given, run

_MERGER = "model.visual.merger."
_OLD_MERGER = "model.mm_projector."
_FRESH_STD = 0.02
# Fields that describe the language model's own folder; the merged config has its own values.
_NOT_TEXT = ("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True)
class MergePart:
    """One of the merged folders: its weights under the names that the plan uses."""

    title: str
    weights: SafetensorsFolder
    names: dict[str, str]  # the plan's name -> the folder's
    dropped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MergeStep:
    """One tensor of the merged model."""

    entry: Entry
    part: MergePart | None  # None for a fresh tensor
    names: tuple[str, ...]  # of `part`; several are stacked along axis 0


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """A checked merge: every tensor of the model and its source."""

    config: ModelConfig
    raw_config: dict[str, Any]
    dtype: np.dtype
    parts: tuple[MergePart, ...]
    steps: tuple[MergeStep, ...]

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(s.entry.key, s.entry.hf_shape, self.dtype) for s in self.steps]

    def describe(self) -> str:
        """The plan in a few lines."""
        lines = []
        for part in self.parts:
            lines.append(
                f"{part.title:9} {part.weights.folder}: {len(part.names)} keys used, "
                f"{len(part.dropped)} dropped, {part.weights.nbytes / 1e9:.2f} GB"
            )
            lines += [f"            dropped {name}" for name in part.dropped]
        fresh = [s.entry.key for s in self.steps if s.part is None]
        if fresh:
            lines.append(f"{'merger':9} fresh: {len(fresh)} keys")
        vision, text = self.config.vision, self.config.text
        parameters = sum(math.prod(spec.shape) for spec in self.specs)
        lines += [
            f"{'model':9} patch {vision.patch_size}, merge {vision.spatial_merge_size}, windows of "
            f"{vision.frame_windows_size} frames; encoder {vision.num_hidden_layers} x "
            f"{vision.hidden_size}, decoder {text.num_hidden_layers} x {text.hidden_size}",
            f"{'result':9} {len(self.steps)} keys, {parameters:,} parameters, {self.dtype.name}, "
            f"{sum(spec.nbytes for spec in self.specs) / 1e9:.2f} GB",
        ]
        return "\n".join(lines)


def _part(title: str, folder: epath.PathLike) -> MergePart:
    """Opens a folder, maps its names to the plan's, and drops what no merged model has."""
    weights = SafetensorsFolder(folder)
    names: dict[str, str] = {}
    dropped = []
    for stored in weights.tensors:
        name = stored
        if title == "encoder":
            name = name.replace("_orig_mod.", "")  # left behind by torch.compile
        if title == "merger" and name.startswith(_OLD_MERGER):
            name = _MERGER + name.removeprefix(_OLD_MERGER)
        buffer = name.split(".")[-1].startswith("inv_freq")
        if buffer or (title == "encoder" and name.startswith(("head.", "layernorm_post."))):
            dropped.append(stored)
        elif name in names:
            raise ConversionError(f"{folder}: {stored} and {names[name]} are the same key.")
        else:
            names[name] = stored
    return MergePart(title, weights, names, tuple(dropped))


def _configs(
    encoder: epath.PathLike, llm: epath.PathLike, merge_size: int, frame_windows_size: int
) -> tuple[ModelConfig, dict[str, Any], bool]:
    """The merged config, the language model's config.json, and whether its head is tied."""
    raw_encoder, raw_llm = read_hf_config(encoder), read_hf_config(llm)
    for folder, raw, wanted in (
        (encoder, raw_encoder, "a standalone OneVision-Encoder"),
        (llm, raw_llm, "a Qwen3"),
    ):
        if "vision_config" in raw:
            raise ConversionError(f"{folder} is a full model already; {wanted} is needed here.")
    kinds = {text: full for full, text in FULL_MODEL_TYPES.items()}
    if raw_llm.get("model_type") not in kinds:
        raise ConversionError(
            f"{llm} has model_type {raw_llm.get('model_type')!r}; a Qwen3 is needed here, "
            f"{' or '.join(kinds)}."
        )
    vision = dataclasses.replace(
        vision_config_from_hf(raw_encoder, f"{encoder}/config.json"),
        use_head=False,
        spatial_merge_size=merge_size,
        frame_windows_size=frame_windows_size,
        out_hidden_size=raw_llm["hidden_size"],
    )
    config = model_config_from_hf(
        {
            "model_type": kinds[raw_llm["model_type"]],
            "tie_word_embeddings": False,
            "vision_config": dataclasses.asdict(vision),
            "text_config": raw_llm,
            **special_token_ids(llm),
        }
    )
    return config, raw_llm, bool(raw_llm.get("tie_word_embeddings", False))


def make_plan(
    encoder: epath.PathLike,
    llm: epath.PathLike,
    merger: epath.PathLike | None = None,
    *,
    merge_size: int = 2,
    frame_windows_size: int = 4,
    dtype: str | None = None,
) -> MergePlan:
    """Plans and checks a merge from configs and headers alone.

    Args:
      encoder, llm, merger: Hugging Face folders; None for `merger` makes a fresh one.
      merge_size: m; m*m patches become one token.
      frame_windows_size: frames that attend to each other.
      dtype: of the result; None takes the language model's.

    Raises:
      ConversionError: lists every key that is unused, missing or misshapen.
    """
    config, raw_llm, tied = _configs(encoder, llm, merge_size, frame_windows_size)
    parts = {"encoder": _part("encoder", encoder), "llm": _part("llm", llm)}
    if merger is not None:
        parts["merger"] = _part("merger", merger)
    standalone: dict[tuple[ParamPath, tuple[int, ...]], list[str]] = {}
    for entry in key_table(config.vision):
        standalone.setdefault((entry.path, entry.lead), []).append(entry.key)

    def step(entry: Entry) -> MergeStep:
        if entry.path[0] == "encoder":
            return MergeStep(entry, parts["encoder"], tuple(standalone[entry.path, entry.lead]))
        if entry.path[0] == "merger":
            return MergeStep(entry, parts.get("merger"), (entry.key,))
        if entry.key == "lm_head.weight" and tied and entry.key not in parts["llm"].names:
            return MergeStep(entry, parts["llm"], ("model.embed_tokens.weight",))
        name = entry.key.replace("model.language_model.", "model.")
        return MergeStep(entry, parts["llm"], (name,))

    steps = tuple(step(entry) for entry in key_table(config))
    _check(steps, parts)
    if dtype is None:
        found = {t.dtype.name for t in parts["llm"].weights.tensors.values()}
        if len(found) > 1:
            raise ConversionError(
                f"{llm} has weights of several dtypes ({', '.join(sorted(found))}); "
                "choose one with --dtype."
            )
        dtype = found.pop()
    raw = model_config_to_hf(config, dtype=dtype)
    text = {name: value for name, value in raw_llm.items() if name not in _NOT_TEXT}
    raw["text_config"] = text | raw["text_config"]
    return MergePlan(config, raw, weight_dtype(dtype), tuple(parts.values()), steps)


def _check(steps: tuple[MergeStep, ...], parts: Mapping[str, MergePart]) -> None:
    problems = []
    for part in parts.values():
        wanted: dict[str, MergeStep] = {n: s for s in steps if s.part is part for n in s.names}
        unused = sorted(part.names[n] for n in part.names.keys() - wanted.keys())
        if unused:
            problems.append(listing(f"{part.title}: keys with no place in the model", unused))
        missing = [n for n in wanted if n not in part.names]
        if missing:
            problems.append(listing(f"{part.title}: keys that are missing", missing))
        misshapen = []
        for name, step in wanted.items():
            rows, *rest = step.entry.hf_shape
            must = (rows // len(step.names), *rest)
            if name in part.names:
                tensor = part.weights.tensors[part.names[name]]
                if tensor.shape != must:
                    misshapen.append(f"{name}: is {list(tensor.shape)}, must be {list(must)}")
                elif tensor.dtype.name not in WEIGHT_DTYPES:
                    misshapen.append(f"{name}: has dtype {tensor.dtype.name}")
        if misshapen:
            problems.append(listing(f"{part.title}: keys that don't fit", misshapen))
    if problems:
        raise ConversionError("\n".join(["The parts do not make one model.", *problems]))


def _fresh(entry: Entry, rng: np.random.Generator) -> Float32[np.ndarray, "..."]:
    """A parameter of a new merger, initialised as in the reference."""
    kind = entry.path[-1]
    if kind == "kernel":
        return _FRESH_STD * rng.standard_normal(entry.hf_shape, np.float32)
    return np.full(entry.hf_shape, float(kind == "scale"), np.float32)


def write(
    plan: MergePlan,
    llm: epath.PathLike,
    out: epath.PathLike,
    *,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Writes the merged model into the new folder `out`, tensor by tensor.

    Args:
      plan: what to write.
      llm: the language model's folder, whose tokenizer and other files are copied.
      out: must not exist, or be empty; appears when everything is written.
      seed: of a fresh merger.
      max_shard_bytes: largest safetensors file.

    Raises:
      ConversionError: `out` is taken or remote.
    """
    rng = np.random.default_rng(seed)
    with new_folder(out) as folder:
        copy_side_files(llm, folder)
        if SPECIAL_TOKENS["image_token_id"] not in chat_template(folder):
            write_chat_template(folder)  # a language model's own drops pictures
        write_json(folder / "config.json", plan.raw_config)
        with (
            SafetensorsWriter(folder, plan.specs, max_shard_bytes) as writer,
            byte_progress("merging", sum(spec.nbytes for spec in plan.specs)) as progress,
        ):
            for step in plan.steps:
                target = writer.array(step.entry.key)
                if step.part is None:
                    sources = [_fresh(step.entry, rng)]
                else:
                    names = [step.part.names[name] for name in step.names]
                    sources = [step.part.weights.array(name) for name in names]
                rows = len(target) // len(sources)
                for i, source in enumerate(sources):
                    copy_into(target[i * rows : (i + 1) * rows], source)
                progress(target.nbytes)
        complete(folder, plan.config, plan.dtype.name)


def _define_flags() -> None:
    flags.DEFINE_string("encoder", None, "Folder of the standalone encoder.", required=True)
    flags.DEFINE_string("llm", None, "Folder of the Qwen3.", required=True)
    flags.DEFINE_string("merger", None, "Folder with the merger's weights (default: fresh).")
    flags.DEFINE_string("out", None, "New Hugging Face folder.", required=True)
    flags.DEFINE_integer("merge-size", 2, "Patches along a merged token's side.", 1)
    flags.DEFINE_integer("frame-windows-size", 4, "Frames that attend to each other.", 1)
    flags.DEFINE_enum("dtype", None, WEIGHT_DTYPES, "Dtype (default: the language model's).")
    flags.DEFINE_integer("seed", 0, "Seed of a fresh merger.", 0)
    flags.DEFINE_bool("dry-run", False, "Check, print the plan and write nothing.")
    flags.DEFINE_string("max-shard-size", DEFAULT_MAX_SHARD_SIZE, "Largest safetensors file.")


def main(given: Given) -> None:
    max_shard_bytes = parse_shard_size(given.max_shard_size)
    plan = make_plan(
        given.encoder,
        given.llm,
        given.merger,
        merge_size=given.merge_size,
        frame_windows_size=given.frame_windows_size,
        dtype=given.dtype,
    )
    print(plan.describe())
    if given.dry_run:
        print("Dry run: everything fits, nothing was written.")
        return
    write(plan, given.llm, given.out, seed=given.seed, max_shard_bytes=max_shard_bytes)
    print(f"{given.out} is ready for conversion.from_hf and transformers.")


if __name__ == "__main__":
    run(main, _define_flags)
