"""Runs the public PyTorch reference on the samples of a case, in a process of its own.

In one process, either side's threads would spin while the other is timed. The process gets a folder
with the weights and samples that both sides share (`write_inputs`), and answers through a pipe.
"""

import multiprocessing
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.train_step_case import Case
from conversion.keys import Transform, key_table
from ov2_jax.config.hf import model_config_to_hf
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.sample import EncodedSample
from ov2_jax.model.normalize import IMAGE_MEAN, IMAGE_STD

# How the samples of a step go through it; the fastest is compared.
WAYS = ("one by one", "padded batch")


class Setting(NamedTuple):
    """What the reference needs in addition to the inputs."""

    checkout: str
    model: dict[str, Any]  # the config.json
    optimizer: OptimizerConfig
    threads: int
    dtype: str  # of the matmuls; weights and moments are float32
    device: str


class Answer(NamedTuple):
    """Of one step."""

    seconds: float
    loss: float
    threads: int


def hf_tensors(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters with the reference's names and layouts."""
    tensors = {}
    for entry in key_table(config):
        leaf: Any = params
        for name in entry.path:
            leaf = leaf[name]
        leaf = np.asarray(leaf)[entry.lead][..., entry.last_axis]
        if entry.transform is not Transform.NONE:
            leaf = leaf.T
        tensors[entry.key] = np.ascontiguousarray(leaf.reshape(entry.hf_shape))
    return tensors


def sample_inputs(case: Case, samples: list[EncodedSample]) -> dict[str, np.ndarray]:
    """The inputs of the reference's forward pass for each sample, named `NUMBER.NAME`."""
    area = case.model.vision.patch_size**2
    mean, std = (np.repeat(np.float32(x), area) for x in (IMAGE_MEAN, IMAGE_STD))
    inputs = {}
    for number, (sample, (grids, _)) in enumerate(zip(samples, case.samples, strict=True)):
        tokens = sample.tokens.astype(np.int64)
        inputs[f"{number}.input_ids"] = tokens[None]
        inputs[f"{number}.labels"] = np.where(sample.loss_mask, tokens, -100)[None]
        if grids:
            pixels = (sample.patches.astype(np.float32) / 255 - mean) / std
            inputs[f"{number}.pixel_values"] = pixels
            inputs[f"{number}.image_grid_thw"] = np.asarray(grids, np.int64)
            inputs[f"{number}.patch_positions"] = sample.patch_positions.astype(np.int64)
    return inputs


def write_inputs(
    folder: pathlib.Path, case: Case, samples: list[EncodedSample], params: dict[str, Any]
) -> None:
    """Weights and samples for the other process."""
    save_file(hf_tensors(case.model, params), folder / "weights.safetensors")
    save_file(sample_inputs(case, samples), folder / "samples.safetensors")


class Reference:
    """The process; `step` runs one optimizer step in it."""

    def __init__(self, folder: pathlib.Path, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        # Before torch is imported there; otherwise its thread pool has a thread for each core.
        os.environ["OMP_NUM_THREADS"] = str(setting.threads)
        self._process = context.Process(target=_serve, args=(str(folder), setting, other))
        self._process.start()
        other.close()

    def step(self, way: str) -> Answer:
        self._pipe.send(way)
        try:
            answer = self._pipe.recv()
        except EOFError as e:
            raise ConfigError("The reference's process died; its output has the reason.") from e
        if isinstance(answer, str):
            raise ConfigError(f"The reference failed: {answer}")
        return answer

    def close(self) -> None:
        """Ends the process; may be called again."""
        self._pipe.close()
        self._process.join()


def _serve(folder: str, setting: Setting, pipe: Connection) -> None:
    """Answers every way that the pipe brings with the Answer of a step, or with an error."""
    run: Callable[[str], Answer] | None = None
    while True:
        try:
            way = pipe.recv()
        except EOFError:
            return
        try:
            run = run or _load(pathlib.Path(folder), setting)
            pipe.send(run(way))
        except Exception as e:
            traceback.print_exc()
            pipe.send(f"{type(e).__name__}: {e}")


def _load(folder: pathlib.Path, setting: Setting) -> Callable[[str], Answer]:
    import torch

    torch.set_num_threads(setting.threads)
    torch.set_num_interop_threads(1)
    sys.path.insert(0, str(pathlib.Path(setting.checkout) / "transformers_impl"))
    import llavaonevision2 as reference

    config = reference.LlavaOnevision2Config(**setting.model, attn_implementation="sdpa")
    model = reference.LlavaOnevision2ForConditionalGeneration(config).to(setting.device)
    weights = load_file(folder / "weights.safetensors")
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    model.load_state_dict(state, strict=True)
    model.train()
    samples: list[dict[str, torch.Tensor]] = []
    for key, value in load_file(folder / "samples.safetensors").items():
        number, name = key.split(".")
        samples += [{} for _ in range(int(number) + 1 - len(samples))]
        samples[int(number)][name] = torch.from_numpy(value).to(setting.device)
    batches = {"one by one": samples, "padded batch": [_padded(samples)]}
    supervised = sum(int((s["labels"][:, 1:] >= 0).sum()) for s in samples)

    rules = setting.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=rules.learning_rate,
        betas=(rules.beta1, rules.beta2),
        eps=rules.eps,
        weight_decay=rules.weight_decay,
        fused=True,
    )
    mixed = torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16")

    def step(way: str) -> Answer:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches[way]:
            # The mean over all supervised tokens of the step, as in ours.
            share = int((batch["labels"][:, 1:] >= 0).sum()) / supervised
            with mixed:
                loss = model(**batch, use_cache=False).loss * share
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rules.clip_norm)
        optimizer.step()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        return Answer(time.perf_counter() - start, total, torch.get_num_threads())

    return step


def _padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """All samples as one batch, padded at the end."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def rows(name: str, value: int) -> torch.Tensor:
        return pad_sequence([s[name][0] for s in samples], batch_first=True, padding_value=value)

    ones = [torch.ones_like(s["input_ids"][0]) for s in samples]
    batch = {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", -100),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }
    for name in ("pixel_values", "image_grid_thw", "patch_positions"):
        if found := [s[name] for s in samples if name in s]:
            batch[name] = torch.cat(found)
    return batch


def setting(
    checkout: str, case: Case, optimizer: OptimizerConfig, *, dtype: str, device: str
) -> Setting:
    """Raises ConfigError if there is no reference to run."""
    if not (pathlib.Path(checkout) / "transformers_impl" / "llavaonevision2").is_dir():
        raise ConfigError(
            f"{checkout} is not a checkout of the reference: it has no "
            "transformers_impl/llavaonevision2."
        )
    if case.model.text.num_experts:
        raise ConfigError("The side-by-side reference is the dense model; leave num_experts out.")
    config = model_config_to_hf(case.model, dtype="float32")
    return Setting(checkout, config, optimizer, case.threads, dtype, device)
