"""Compares the model on a checkpoint with tensors dumped from PyTorch.

    python -m conversion.verify --hf=HF_DIR --case=CASE_DIR

Everything is computed in float32. One line is printed per expected tensor; the exit status is 1 if
one of them fails. docs/verify.md describes the case folder and how to dump one.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Float, Int, Int32, Shaped

from conversion.errors import ConversionError, listing
from conversion.keys import Config, Entry, ParamPath, as_ours, key_table
from conversion.load import load_hf_params
from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import ModelConfig, VisionConfig
from ov2_jax.core.batch import Array, Batch, VisionRows
from ov2_jax.core.program import Given, run
from ov2_jax.model.encoder import VisionEncoder
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.model.moe.mixture import load_balancing_loss

NamedArrays = Mapping[str, Shaped[np.ndarray, "..."]]
# (sample, its inputs, its expected names) -> our tensors by name
Outputs = Callable[[str, NamedArrays, Iterable[str]], dict[str, Shaped[np.ndarray, "..."]]]

IGNORED_LABEL = -100  # as in PyTorch's cross entropy

# Bounds in float32: absolute, but gradients relative to their norm.
ABSOLUTE = 2e-5
LOSS_ABSOLUTE = 2e-6
GRADIENT_RELATIVE = 1e-4

# With use_head, a dump may have the last features before the post-norm (the reference's
# `hidden_states[-1]`) or behind it (its `skip_merger` output). Either may match.
_ALSO = {"vision_last": "vision_post_norm"}

_TEXT_INPUTS = {"input_ids", "labels"}
_VISION_INPUTS = {"pixel_values", "image_grid_thw", "patch_positions"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One expected tensor against ours; `problem` is the reason if there is nothing to compare."""

    name: str
    shape: tuple[int, ...]
    max_abs: float = float("nan")
    relative: float = float("nan")  # norm of the difference / norm of the expected
    bound: str = ""
    passed: bool = False
    problem: str = ""

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        details = (
            self.problem
            or f"max abs {self.max_abs:.2e}  relative {self.relative:.2e}  ({self.bound})"
        )
        return f"{verdict}  {self.name}  {list(self.shape)}  {details}"


def compare(
    name: str, expected: Shaped[np.ndarray, "..."], actual: Shaped[np.ndarray, "..."]
) -> Comparison:
    """Compares within the bound of the tensor's kind, which its name states; NaNs fail."""
    if actual.shape != expected.shape:
        return Comparison(name, expected.shape, problem=f"ours has shape {list(actual.shape)}")
    want, got = expected.astype(np.float64), actual.astype(np.float64)
    max_abs = float(np.max(np.abs(got - want), initial=0.0))
    difference, norm = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    relative = difference / norm if norm else float(difference > 0)
    kind = name.split(".", 1)[1]
    if kind.startswith("grad."):
        bound, passed = f"relative <= {GRADIENT_RELATIVE:g}", relative <= GRADIENT_RELATIVE
    else:
        limit = LOSS_ABSOLUTE if kind in ("loss", "aux_loss") else ABSOLUTE
        bound, passed = f"max abs <= {limit:g}", max_abs <= limit
    return Comparison(name, expected.shape, max_abs, relative, bound, passed)


def read_samples(file: pathlib.Path) -> dict[str, dict[str, Shaped[np.ndarray, "..."]]]:
    """Reads a case's safetensors file, whose names are `<sample>.<name>`; returns it by sample."""
    from safetensors.numpy import load_file  # cases are small and plain; no streaming needed

    if not file.exists():
        raise ConversionError(f"{file.parent} is not a case: it has no {file.name}.")
    samples: dict[str, dict[str, np.ndarray]] = {}
    for full, value in load_file(file).items():
        sample, dot, name = full.partition(".")
        if not dot:
            raise ConversionError(f"{file}: {full!r} must be named <sample>.<name>.")
        samples.setdefault(sample, {})[name] = value
    return samples


def window_ids(
    grid_thw: Int[np.ndarray, "media 3"], frame_windows_size: int
) -> Int32[np.ndarray, " P"]:
    """Window number of each patch, from 1.

    Every picture or clip, a (t, h, w) of the grid, is cut into windows of `frame_windows_size`
    frames; its last one may be shorter.
    """
    ids = []
    window = 0
    for t, h, w in grid_thw.tolist():
        frames = np.arange(t) // frame_windows_size
        ids.append(np.repeat(frames + window + 1, h * w))
        window += -(-t // frame_windows_size)
    return np.concatenate(ids).astype(np.int32)


# --- the full model -------------------------------------------------------------------------------


def _check_inputs(sample: str, inputs: NamedArrays, needed: set[str], allowed: set[str]) -> None:
    problems = [f"{sample}.{n} is missing" for n in sorted(needed - inputs.keys())]
    problems += [f"{sample}.{n} is unknown" for n in sorted(inputs.keys() - allowed)]
    if problems:
        raise ConversionError(listing("inputs.safetensors does not fit the model", problems))


def _vision_rows(config: ModelConfig, sample: str, inputs: NamedArrays) -> VisionRows:
    """All patches of a sample as one row, with a segment for each window."""
    pixels = inputs["pixel_values"].astype(np.float32)
    windows = window_ids(inputs["image_grid_thw"], config.vision.frame_windows_size)
    if not len(pixels) == len(windows) == len(inputs["patch_positions"]):
        raise ConversionError(
            f"sample {sample}: pixel_values has {len(pixels)} patches, patch_positions "
            f"{len(inputs['patch_positions'])}, and image_grid_thw {len(windows)}."
        )
    return VisionRows(
        pixels.reshape(1, 1, len(pixels), -1),
        inputs["patch_positions"].astype(np.int32)[None, None],
        windows[None, None],
    )


def _batch(config: ModelConfig, sample: str, inputs: NamedArrays) -> Batch:
    """A sample as a batch of one pack with one text row and no padding."""
    has_vision = "pixel_values" in inputs
    needed = _TEXT_INPUTS | (_VISION_INPUTS if has_vision else set())
    _check_inputs(sample, inputs, needed, needed)
    tokens = inputs["input_ids"].astype(np.int32)  # B L, B is 1
    labels = inputs["labels"].astype(np.int32)
    if tokens.shape != labels.shape or tokens.shape[0] != 1:
        raise ConversionError(
            f"sample {sample}: input_ids {list(tokens.shape)} and labels {list(labels.shape)} must "
            "both be [1, tokens]."
        )
    is_image = tokens == config.image_token_id
    vision = (_vision_rows(config, sample, inputs),) if has_vision else ()
    merged = vision[0].patches.shape[2] // config.vision.merge_unit if has_vision else 0
    if is_image.sum() != merged:
        raise ConversionError(
            f"sample {sample}: {is_image.sum()} image tokens for {merged} merged vision tokens."
        )
    targets = np.full_like(tokens, IGNORED_LABEL)
    targets[:, :-1] = labels[:, 1:]
    return Batch(
        tokens=tokens[None],
        targets=targets[None],
        positions=np.arange(tokens.shape[1], dtype=np.int32)[None, None],
        segment_ids=np.ones_like(tokens)[None],
        vision_index=np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)[None],
        vision=vision,
    )


def _mean_loss(
    logits: Float[jax.Array, "B L V"], targets: Int32[Array, "B L"]
) -> Float[jax.Array, ""]:
    """Mean cross entropy over the supervised tokens."""
    supervised = targets != IGNORED_LABEL
    log_p = jax.nn.log_softmax(logits, -1)
    picked = jnp.take_along_axis(log_p, jnp.where(supervised, targets, 0)[..., None], -1)[..., 0]
    return -jnp.sum(picked * supervised) / jnp.sum(supervised)


def _by_key(table: tuple[Entry, ...], gradients: Mapping[ParamPath, Any]) -> dict[str, np.ndarray]:
    """Our gradients by Hugging Face key, in the shapes of Hugging Face."""
    found = {}
    for entry in table:
        leaf = np.asarray(gradients[entry.path])
        ours = leaf[entry.lead][..., entry.last_axis]
        gradient = np.empty(entry.hf_shape, np.float32)
        as_ours(entry, gradient)[...] = ours
        found[f"grad.{entry.key}"] = gradient
    return found | _fused_experts(gradients)


def _fused_experts(gradients: Mapping[ParamPath, Any]) -> dict[str, np.ndarray]:
    """Gradients of experts under the names of the PyTorch module, which checkpoints do not have.

    `experts.gate_up_proj` [E 2F D], gate first, and `experts.down_proj` [E D F] of each layer.
    """
    root = ("decoder", "layers", "mlp", "experts")
    if (*root, "down_proj", "kernel") not in gradients:
        return {}
    gate, up, down = (  # N E O I
        np.swapaxes(np.asarray(gradients[*root, name, "kernel"]), -1, -2)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    found = {}
    for i in range(len(down)):
        where = f"grad.model.language_model.layers.{i}.mlp.experts."
        found[f"{where}gate_up_proj"] = np.concatenate([gate[i], up[i]], 1)
        found[f"{where}down_proj"] = down[i]
    return found


def _model_outputs(config: ModelConfig, params: dict[str, Any]) -> Outputs:
    graph, state = _module(
        lambda: LlavaOnevision2(config, rngs=nnx.Rngs(0), compute=ComputeConfig(dtype="float32")),
        params,
    )
    table = key_table(config)

    @jax.jit
    def vision(state: nnx.State, rows: VisionRows) -> dict[str, jax.Array]:
        model = nnx.merge(graph, state)
        patches, positions, segments = (x[0] for x in rows)  # R W ..., R is 1
        features, layers = model.encoder(patches[0], positions[0], [segments], collect_layers=True)
        named = {f"vision_layer{i}": layer for i, layer in enumerate(layers)}
        return named | {
            "vision_last": layers[-1],
            "vision_post_norm": features,  # equal to vision_last if there is no post-norm
            "vision_merged": model.merger(features),
        }

    def text(state: nnx.State, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, state)
        hidden, collected = model(batch)
        logits = model.decoder.logits(hidden)
        loss, named = _mean_loss(logits, batch.targets[0]), {"logits": logits}
        if collected.load is not None:
            named["aux_loss"] = load_balancing_loss(collected.load)[None]
            loss += config.router_aux_loss_coef * named["aux_loss"][0]
        return loss, named | {"loss": loss[None]}

    forward = jax.jit(text)
    backward = jax.jit(jax.value_and_grad(text, has_aux=True))

    def outputs(sample: str, inputs: NamedArrays, wanted: Iterable[str]) -> dict[str, np.ndarray]:
        batch = _batch(config, sample, inputs)
        found = dict(vision(state, batch.vision[0])) if batch.vision else {}
        if any(name.startswith("grad.") for name in wanted):
            (_, named), gradients = backward(state, batch)
            found |= _by_key(table, flatten_dict(nnx.to_pure_dict(gradients)))
        else:  # the gradients of an 8B model are 34 GB
            _, named = forward(state, batch)
        return {k: np.asarray(v) for k, v in (found | named).items()}

    return outputs


# --- the standalone encoder -----------------------------------------------------------------------


def raster_patches(
    pixels: Shaped[np.ndarray, "B C height width"] | Shaped[np.ndarray, "B C frames height width"],
    patch_size: int,
) -> tuple[Shaped[np.ndarray, "B P values"], int, int]:
    """Patches in raster (t, h, w) order, values in (C, row, column) order; and h, w of the grid."""
    if pixels.ndim == 4:
        pixels = pixels[:, :, None]
    b, c, t, height, width = pixels.shape
    h, w = height // patch_size, width // patch_size
    cut = pixels[..., : h * patch_size, : w * patch_size]
    cut = cut.reshape(b, c, t, h, patch_size, w, patch_size)  # B C t h p w p
    return cut.transpose(0, 2, 3, 5, 1, 4, 6).reshape(b, t * h * w, -1), h, w


def _encoder_outputs(config: VisionConfig, params: dict[str, Any]) -> Outputs:
    graph, state = _module(
        lambda: VisionEncoder(config, rngs=nnx.Rngs(0), compute=ComputeConfig(dtype="float32")),
        params["encoder"],
    )

    @jax.jit
    def features(
        state: nnx.State,
        patches: Float[jax.Array, "B P values"],
        positions: Int32[jax.Array, "B P 3"],
    ) -> dict[str, Float[jax.Array, "..."]]:
        model = nnx.merge(graph, state)
        whole = jnp.ones(patches.shape[:2], jnp.int32)  # a sample is one window
        flat = (x.reshape(-1, x.shape[-1]) for x in (patches, positions))
        hidden = model(*flat, [whole])[0].reshape(*whole.shape, -1)  # B P D
        found = {"last_hidden_state": hidden}
        if config.use_head:
            found["pooler_output"] = model.pool(hidden, whole)
        return found

    def outputs(sample: str, inputs: NamedArrays, wanted: Iterable[str]) -> dict[str, np.ndarray]:
        del wanted
        allowed = {"pixel_values", "visible_indices"}
        _check_inputs(sample, inputs, {"pixel_values"}, allowed)
        patches, h, w = raster_patches(inputs["pixel_values"], config.patch_size)
        visible = np.broadcast_to(np.arange(patches.shape[1]), patches.shape[:2])
        if "visible_indices" in inputs:
            visible = inputs["visible_indices"]
            # As in the reference, a full set of indices permutes only the positions.
            if visible.shape[1] != patches.shape[1]:
                patches = np.take_along_axis(patches, visible[..., None], 1)
        positions = np.stack([visible // (h * w), visible // w % h, visible % w], -1)
        found = features(state, patches, positions.astype(np.int32))
        return {k: np.asarray(v) for k, v in found.items()}

    return outputs


# --- both -----------------------------------------------------------------------------------------


def _module(make: Callable[[], nnx.Module], params: dict[str, Any]) -> tuple[Any, nnx.State]:
    """The graph of a module, and its state with `params`; initialises no parameter."""
    graph, state = nnx.split(nnx.eval_shape(make))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return graph, state


def verify(hf: epath.PathLike, case: epath.PathLike) -> Iterator[Comparison]:
    """Runs every sample of a case; yields a comparison for every expected tensor.

    Args:
      hf: Hugging Face folder of a full model or a standalone encoder.
      case: folder with inputs.safetensors and expected.safetensors.

    Raises:
      ConversionError: the folder or the inputs don't fit together.
    """
    folder = pathlib.Path(case)
    inputs = read_samples(folder / "inputs.safetensors")
    expected = read_samples(folder / "expected.safetensors")
    if not expected:
        raise ConversionError(f"{case}/expected.safetensors has no tensors.")
    config: Config
    config, params = load_hf_params(hf, dtype="float32")
    make = _model_outputs if isinstance(config, ModelConfig) else _encoder_outputs
    with jax.default_matmul_precision("highest"):
        outputs = make(config, params)
        for sample in sorted(expected, key=_natural):
            found = outputs(sample, inputs[sample], expected[sample]) if sample in inputs else {}
            for name, value in expected[sample].items():
                if name in found:
                    result = compare(f"{sample}.{name}", value, found[name])
                    if not result.passed and name in _ALSO:
                        also = compare(f"{sample}.{name}", value, found[_ALSO[name]])
                        result = also if also.passed else result
                    yield result
                else:
                    reason = "not made by this model" if found else "no such sample in inputs"
                    yield Comparison(f"{sample}.{name}", value.shape, problem=reason)


def _natural(text: str) -> list[Any]:
    """A sort key that puts 10 behind 9."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", text)
    ]


def _define_flags() -> None:
    flags.DEFINE_string("hf", None, "Hugging Face folder.", required=True)
    flags.DEFINE_string("case", None, "Case folder.", required=True)


def main(given: Given) -> int:
    results = []
    for result in verify(given.hf, given.case):
        print(result, flush=True)
        results.append(result)
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} of {len(results)} tensors pass.")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main, _define_flags)
