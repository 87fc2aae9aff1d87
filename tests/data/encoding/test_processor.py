"""The prompt side against golden `processor`: what the reference HF processor makes of the same."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.video import Clip
from ov2_jax.model.normalize import normalize_patches
from tests.tiny import PROCESSOR, data_config, tiny_model, tokenizer

SAMPLES = json.loads((PROCESSOR / "case.json").read_text())["samples"]
INPUTS = load_file(PROCESSOR / "inputs.safetensors")
EXPECTED = load_file(PROCESSOR / "expected.safetensors")


def encode(sample: dict, *, frame_form: str = "training", whole_text: bool = False):
    key, settings = sample["key"], sample["settings"]
    encoder = SampleEncoder(
        data_config(
            min_pixels=settings["min_pixels"],
            max_pixels=settings["max_pixels"],
            frame_form=frame_form,
        ),
        tiny_model(settings["patch"], settings["merge"]),
        tokenizer(),
    )
    messages = [
        {
            "role": m["role"],
            "content": m["content"]
            if isinstance(m["content"], str)
            else "".join(c.get("text", f"<{c['type']}>") for c in m["content"]),
        }
        for m in sample["messages"]
    ]
    images = [INPUTS[name] for name in sorted(INPUTS) if name.startswith(f"{key}.image")]
    clips = []
    if sample["frames"]:
        n = sample["frames"]
        clips = [Clip(tuple(INPUTS[f"{key}.frames"]), tuple(range(n)), tuple(map(float, range(n))))]
    return encoder.encode_prompt(messages, images, clips, whole_text=whole_text)


@pytest.mark.parametrize("sample", SAMPLES, ids=[s["key"] for s in SAMPLES])
def test_hf_form_equals_the_hf_processor(sample):
    key = sample["key"]
    ours = encode(sample, frame_form="hf", whole_text=True)
    np.testing.assert_array_equal(ours.tokens, EXPECTED[f"{key}.input_ids"][0])
    assert not ours.loss_mask.any()
    if f"{key}.pixel_values" not in EXPECTED:
        assert len(ours.patches) == len(ours.windows) == 0
        return
    assert ours.patches.dtype == np.uint8
    pixels = np.asarray(normalize_patches(ours.patches))
    np.testing.assert_allclose(pixels, EXPECTED[f"{key}.pixel_values"], rtol=0, atol=1e-5)
    grids = EXPECTED[f"{key}.image_grid_thw"]
    np.testing.assert_array_equal(ours.windows, grids.prod(axis=1))
    np.testing.assert_array_equal(ours.patch_positions, EXPECTED[f"{key}.patch_positions"])


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s["frames"]], ids=lambda s: s["key"])
def test_training_form_joins_frames_and_ends_each_with_a_newline(sample):
    hf, ours = encode(sample, frame_form="hf", whole_text=True), encode(sample)
    np.testing.assert_array_equal(ours.patches, hf.patches)
    np.testing.assert_array_equal(ours.patch_positions, hf.patch_positions)
    area = hf.windows[0]
    assert ours.windows.tolist() == [4 * area, area]  # 5 frames: a window of 4 and the remainder
    text = tokenizer().decode(ours.tokens.tolist())
    without = text.replace("<|vision_end|>\n", "<|vision_end|>")
    assert text.count("<|vision_end|>\n") == 5
    assert without == tokenizer().decode(hf.tokens.tolist())
