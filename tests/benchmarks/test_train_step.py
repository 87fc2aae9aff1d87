"""The benchmark of a train step, on a case that is small enough for a test."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.train_step_case import read_case
from benchmarks.train_step_reference import hf_tensors, sample_inputs
from benchmarks.train_step_rows import choose_rows
from conversion.keys import key_table
from ov2_jax.core.errors import ConfigError
from ov2_jax.training.start import random_params
from tests.programs import PATIENCE, REPOSITORY

TINY = {
    "vocab": 64,
    "threads": 1,
    "text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "patch_size": 4,
        "out_hidden_size": 32,
    },
    "samples": [[[[1, 4, 6]], 5], [[], 9], [[[6, 2, 4], [1, 2, 2]], 7]],
}


def write(folder: pathlib.Path, case: object) -> str:
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    return str(path)


def run_program(*arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    command = [sys.executable, "-m", "benchmarks.train_step", *arguments]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=REPOSITORY, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_runs_end_to_end(tmp_path: pathlib.Path) -> None:
    """As a program, for it binds its process to the case's cores."""
    case = write(tmp_path, TINY)
    status, printed, error = run_program(
        f"--case={case}", "--rounds=2", f"--cache={tmp_path / 'cache'}"
    )
    assert status == 0, error
    assert "samples 3, tokens 40, patches 76" in printed
    assert "not in the compilation cache" in printed and "1 cores" in printed
    assert "round 2: ours" in printed and "GFLOP/s" in printed
    assert "ratio" not in printed
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.long
def test_gpu_settings_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16, remat, and MFU of a pretended peak; only the GPU is missing."""
    case = read_case(write(tmp_path, TINY))
    assert train_step.benchmark(case, None, device="gpu", dtype="bfloat16", rounds=1, peak=1.0)
    printed = capsys.readouterr().out
    assert "MFU" in printed and "1 x 128" in printed


def test_released_cases_are_read() -> None:
    for path in sorted((REPOSITORY / "benchmarks" / "cases").glob("*.json")):
        case = read_case(str(path))
        placed = choose_rows(case.sizes(), case.model).placements
        assert sorted(p.sample for p in placed) == [*range(len(case.samples))], path


def test_sizes_are_those_of_the_samples(tmp_path: pathlib.Path) -> None:
    case = read_case(write(tmp_path, TINY))
    for size, sample in zip(case.sizes(), case.encoded(0), strict=True):
        assert size.tokens == len(sample.tokens)
        assert size.windows == tuple(sample.windows)
        assert sum(size.windows) == len(sample.patches) == len(sample.patch_positions)
    assert case.sizes()[2].windows == (32, 16, 4)  # 6 frames of 8 patches: 4 and 2; a picture


def test_reference_gets_every_weight_and_the_same_samples(tmp_path: pathlib.Path) -> None:
    case = read_case(write(tmp_path, TINY))
    params = random_params(case.model, 0)
    tensors = hf_tensors(case.model, params)
    assert {k: v.shape for k, v in tensors.items()} == {
        e.key: e.hf_shape for e in key_table(case.model)
    }
    kernel = np.asarray(params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"])
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(tensors[key], kernel[0].T)

    samples = case.encoded(0)
    inputs = sample_inputs(case, samples)
    assert "1.pixel_values" not in inputs  # text only
    for number, sample in enumerate(samples):
        assert inputs[f"{number}.input_ids"].shape == inputs[f"{number}.labels"].shape
        supervised = inputs[f"{number}.labels"][0] >= 0
        np.testing.assert_array_equal(supervised, sample.loss_mask)
    assert inputs["2.pixel_values"].shape == (52, 3 * 4 * 4)
    assert inputs["2.image_grid_thw"].tolist() == [[6, 2, 4], [1, 2, 2]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"threads": 0}, "threads is 0"),
        ({"vocab": 4}, "vocab is 4"),
        ({"samples": []}, "at least one sample"),
        ({"samples": [[[], 0]]}, "at least one token"),
        ({"samples": [[[[1, 3, 4]], 5]]}, "multiples of the merge 2"),
        ({"samples": [[[[1, 4]], 5]]}, r"\[frames, rows, columns\]"),
        ({"text": {"hidden_size": 32}}, "text lacks head|text lacks intermediate_size"),
        ({"text": {**TINY["text"], "width": 3}}, "no field width"),
        ({"extra": 1}, "must have the fields"),
    ],
)
def test_bad_cases_are_one_sentence(tmp_path: pathlib.Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_case(write(tmp_path, {**TINY, **change}))


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case=missing.json"], "cannot be read"),
        ([], "--case=FILE.json is missing"),
        (["--device=gpu"], "needs a GPU"),
        (["--case=missing.json", "--rounds=0"], "--rounds is 0"),
    ],
)
def test_bad_commands_are_one_sentence(
    arguments: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    status, error = run_program(*arguments, f"--cache={tmp_path}")[::2]
    assert status == 1 and message in error
    assert error.startswith("ConfigError: ") and error.count("\n") == 1


def test_a_folder_that_is_no_reference(tmp_path: pathlib.Path) -> None:
    case = read_case(write(tmp_path, TINY))
    with pytest.raises(ConfigError, match="not a checkout of the reference"):
        train_step.reference.setting(
            str(tmp_path), case, train_step.OPTIMIZER, dtype="float32", device="cpu"
        )
