"""Golden cases (results of the public PyTorch reference) as batches of this package."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from safetensors.numpy import load_file

from conversion.keys import Transform, key_table
from conversion.load import load_hf_params
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.batch import IGNORE, Batch, VisionRows

GOLDEN = Path(__file__).parent / "golden"
DENSE = ("dense_p14m2", "dense_p16m3_tied", "codec_positions")
MODELS = (*DENSE, "moe")


class Sample(NamedTuple):
    tokens: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]  # already shifted
    patches: Float32[np.ndarray, "P values"]
    positions: Int[np.ndarray, "P 3"]
    windows: list[int]  # patches of each attention window


class Case(NamedTuple):
    config: ModelConfig
    params: dict
    samples: list[Sample]
    expected: dict[str, Float[np.ndarray, "..."]]


def windows_of(grid_thw: list[list[int]], frames: int) -> list[int]:
    """The rule for windows, written independently of the package."""
    return [min(frames, t - i) * h * w for t, h, w in grid_thw for i in range(0, t, frames)]


def load_case(name: str) -> Case:
    folder = GOLDEN / name
    config, params = load_hf_params(folder / "hf", dtype="float32")
    inputs = load_file(folder / "inputs.safetensors")
    samples = []
    for s in range(len(json.loads((folder / "case.json").read_text())["samples"])):
        tokens, labels = inputs[f"{s}.input_ids"][0], inputs[f"{s}.labels"][0]
        targets = np.full(tokens.shape, IGNORE)
        targets[:-1] = np.where(labels[1:] >= 0, labels[1:], IGNORE)
        dim = config.vision.patch_dim
        samples.append(
            Sample(
                tokens,
                targets,
                inputs.get(f"{s}.pixel_values", np.zeros((0, dim), np.float32)),
                inputs.get(f"{s}.patch_positions", np.zeros((0, 3), np.int64)),
                windows_of(
                    inputs.get(f"{s}.image_grid_thw", np.zeros((0, 3), np.int64)).tolist(),
                    config.vision.frame_windows_size,
                ),
            )
        )
    expected = load_file(folder / "expected.safetensors")
    return Case(config, params, samples, _by_expert(expected))


def _by_expert(
    expected: dict[str, Float[np.ndarray, "..."]],
) -> dict[str, Float[np.ndarray, "..."]]:
    """Splits the fused gradients of experts into those of the checkpoint's keys.

    They are [E 2F D], gate rows first, and [E D F].
    """
    found = {}
    for name, value in expected.items():
        where, _, kind = name.rpartition(".")
        if not where.endswith("experts"):
            found[name] = value
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for expert, stacked in enumerate(value):
            for part, tensor in zip(parts, np.split(stacked, len(parts)), strict=True):
                found[f"{where}.{expert}.{part}.weight"] = tensor
    return found


def pack(
    config: ModelConfig,
    samples: list[Sample],
    order: tuple[int, ...],
    *,
    text_row: int | None = None,
    vision_row: int | None = None,
) -> Batch:
    """One pack: samples in `order`, text rows of `text_row` and vision rows of `vision_row`.

    By default everything shares one row of the exact length. Rows are filled in order, with whole
    windows.
    """
    samples = [samples[i] for i in order]
    length = text_row or sum(len(s.tokens) for s in samples)
    width = vision_row or max(config.vision.merge_unit, sum(sum(s.windows) for s in samples))
    text: list[list[Sample]] = [[]]
    for s in samples:
        if sum(len(x.tokens) for x in text[-1]) + len(s.tokens) > length:
            text.append([])
        text[-1].append(s)
    sizes = list(itertools.chain.from_iterable(s.windows for s in samples))
    places, row, used = [], 0, 0
    for size in sizes:
        if used + size > width:
            row, used = row + 1, 0
        places.append((row, used))
        used += size

    rows = Batch(*(np.zeros((1, len(text), length), np.int32) for _ in range(5)), ())
    rows.targets[:] = IGNORE
    rows.vision_index[:] = IGNORE
    vision = VisionRows(
        np.zeros((1, row + 1, width, config.vision.patch_dim), np.float32),
        np.zeros((1, row + 1, width, 3), np.int32),
        np.zeros((1, row + 1, width), np.int32),
    )
    placed = iter(places)
    window_number = itertools.count(1)
    for r, members in enumerate(text):
        start = 0
        for number, s in enumerate(members, 1):
            end = start + len(s.tokens)
            rows.tokens[0, r, start:end] = s.tokens
            rows.targets[0, r, start:end] = s.targets
            rows.positions[0, r, start:end] = np.arange(len(s.tokens))
            rows.segment_ids[0, r, start:end] = number
            index, first = [], 0
            for size in s.windows:
                v, at = next(placed)
                window = slice(at, at + size)
                vision.patches[0, v, window] = s.patches[first : first + size]
                vision.patch_positions[0, v, window] = s.positions[first : first + size]
                vision.segment_ids[0, v, window] = next(window_number)
                unit = config.vision.merge_unit
                index += range((v * width + at) // unit, (v * width + at + size) // unit)
                first += size
            pads = np.flatnonzero(s.tokens == config.image_token_id)
            rows.vision_index[0, r, start + pads] = index
            start = end
    return rows._replace(vision=(vision,) if sizes else ())


def hf_tensors(config: ModelConfig, tree: dict) -> dict[str, Float[np.ndarray, "..."]]:
    """Our tree (parameters or gradients) as Hugging Face tensors, by their keys."""
    tensors = {}
    for entry in key_table(config):
        leaf = tree
        for name in entry.path:
            leaf = leaf[name]
        leaf = np.asarray(leaf)[entry.lead][..., entry.last_axis]
        if entry.transform is not Transform.NONE:
            leaf = leaf.T
        tensors[entry.key] = leaf.reshape(entry.hf_shape)
    return tensors
