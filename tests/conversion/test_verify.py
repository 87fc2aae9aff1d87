"""conversion.verify passes the golden cases and fails whatever differs from them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.errors import ConversionError
from conversion.verify import compare, raster_patches, verify, window_ids
from tests.golden_cases import GOLDEN


@pytest.mark.parametrize("case", ["dense_p16m3_tied", "moe", "encoder"])
def test_golden_case_passes_and_every_tensor_is_compared(case):
    results = list(verify(GOLDEN / case / "hf", GOLDEN / case))
    assert {r.name for r in results} == set(load_file(GOLDEN / case / "expected.safetensors"))
    assert all(r.passed for r in results), [str(r) for r in results if not r.passed]


@pytest.fixture
def case(tmp_path):
    """A copy of a golden case that a test may change: one sample, no gradients."""
    shutil.copytree(GOLDEN / "codec_positions", tmp_path / "case", copy_function=shutil.copyfile)
    edit(
        tmp_path / "case" / "expected.safetensors",
        lambda t: [t.pop(k) for k in list(t) if ".grad." in k],
    )
    return tmp_path / "case"


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def failed(case):
    return {r.name: r for r in verify(case / "hf", case) if not r.passed}


def test_a_changed_weight_fails_what_it_touches(case):
    def change(tensors):
        tensors["lm_head.weight"][3] += 1e-3

    edit(case / "hf" / "model.safetensors", change)
    assert "0.logits" in failed(case)
    assert not {"0.vision_last", "0.vision_merged"} & failed(case).keys()


def test_a_changed_window_size_fails(case):
    config = case / "hf" / "config.json"
    raw = json.loads(config.read_text())
    raw["vision_config"]["frame_windows_size"] = 3
    config.write_text(json.dumps(raw))
    assert {"0.vision_layer0", "0.vision_merged", "0.logits"} <= failed(case).keys()


def test_unknown_misshapen_and_not_a_number_fail(case):
    def change(tensors):
        tensors["0.vision_layer9"] = tensors["0.vision_layer0"]
        tensors["0.grad.no.such.weight"] = np.zeros(3, np.float32)
        tensors["1.logits"] = tensors["0.logits"]
        tensors["0.vision_last"] = tensors["0.vision_last"][:-1]
        tensors["0.loss"] = np.full(1, np.nan, np.float32)

    edit(case / "expected.safetensors", change)
    found = failed(case)
    names = {"0.vision_layer9", "0.grad.no.such.weight", "1.logits", "0.vision_last", "0.loss"}
    assert found.keys() == names
    assert "not made by this model" in str(found["0.vision_layer9"])
    assert "no such sample" in str(found["1.logits"])
    assert "ours has shape [64, 64]" in str(found["0.vision_last"])


def test_inputs_that_do_not_fit_are_refused(case):
    edit(case / "inputs.safetensors", lambda t: t.pop("0.patch_positions"))
    with pytest.raises(ConversionError, match="0.patch_positions is missing"):
        failed(case)
    with pytest.raises(ConversionError, match="is not a case"):
        failed_in = case / "hf"
        list(verify(failed_in, failed_in))


def test_placeholders_must_match_the_pictures(case):
    def change(tensors):
        tensors["0.input_ids"][tensors["0.input_ids"] == 124] = 125

    edit(case / "inputs.safetensors", change)
    with pytest.raises(ConversionError, match="0 image tokens for 16 merged"):
        failed(case)


def test_bounds_are_those_of_the_tensors_kind():
    one = np.ones(4, np.float32)
    assert compare("0.logits", one, one + 1.9e-5).passed
    assert not compare("0.logits", one, one + 2.2e-5).passed
    assert not compare("0.loss", one, one + 3e-6).passed
    assert compare("0.grad.x", 1e-3 * one, 1.00009e-3 * one).passed
    assert not compare("0.grad.x", 1e-3 * one, 1.0002e-3 * one).passed
    assert not compare("0.grad.x", 0 * one, 1e-9 * one).passed


def test_windows_restart_with_every_grid_row():
    grid = np.array([[5, 1, 2], [1, 2, 1], [2, 1, 1]])
    expected = [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2 + [5] * 2
    assert window_ids(grid, 2).tolist() == expected


def test_raster_patches_are_channel_row_column():
    pixels = np.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6)
    patches, h, w = raster_patches(pixels, 2)
    assert (patches.shape, h, w) == ((2, 12, 12), 2, 3)
    t, y, x = 1, 1, 2
    patch = pixels[0, :, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
    assert np.array_equal(patches[0, (t * h + y) * w + x], patch.reshape(-1))


def test_exit_status_and_lines(case):
    edit(case / "expected.safetensors", lambda t: t["0.logits"].__setitem__((0, 0, 0), 9))
    command = [sys.executable, "-m", "conversion.verify", f"--hf={case / 'hf'}", f"--case={case}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("FAIL")] == [["FAIL", "0.logits"]]
    assert lines[-1] == "4 of 5 tensors pass."
