"""Sizes of the released models, normalisation, the encoder's positions, configs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ov2_jax.config.hf import load_config, model_config_from_hf, model_config_to_hf
from ov2_jax.config.model import ModelConfig, TextConfig
from ov2_jax.config.sizes import model_config
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.model.normalize import normalize_patches
from tests.golden_cases import GOLDEN

# Sum over the Hugging Face keys of each size, p14m2, untied (docs/design.md has the arithmetic):
# encoder 302_913_536 without merger; e.g. 8b: 36 layers of 192_946_432, 2 x 151936 x 4096 + 4096.
PARAMETERS = {
    "2b": 2_359_827_456,
    "4b": 4_741_609_472,
    "8b": 8_527_213_568,
    "14b": 15_108_980_736,
    "32b": 33_102_796_800,
    "30b-a3b": 30_860_210_176,
}


def key_table_count(config: ModelConfig) -> int:
    """The number of parameters, counted from the list of Hugging Face keys."""
    v, t = config.vision, config.text
    d, f = v.hidden_size, v.intermediate_size
    block = d * v.spatial_merge_size**2
    encoder = d * 3 * v.patch_size**2 + 2 * d
    encoder += v.num_hidden_layers * (4 * d + (3 * d * d + 3 * d) + (d * d + d) + 2 * d * f + f + d)
    merger = 2 * d + block * block + block + block * t.hidden_size + t.hidden_size
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = 2 * t.hidden_size + 2 * t.hidden_size * (q + kv) + 2 * t.head_dim
    if t.num_experts:
        layer += t.num_experts * t.hidden_size * (1 + 3 * t.moe_intermediate_size)
    else:
        layer += 3 * t.hidden_size * t.intermediate_size
    decoder = t.num_hidden_layers * layer + t.hidden_size
    decoder += (1 if config.tie_word_embeddings else 2) * t.vocab_size * t.hidden_size
    return encoder + merger + decoder


def count(config: ModelConfig) -> int:
    shapes = nnx.eval_shape(lambda: LlavaOnevision2(config, rngs=nnx.Rngs(0)))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_count_at_full_size(size):
    config = model_config(size)
    assert count(config) == key_table_count(config) == PARAMETERS[size]


@pytest.mark.parametrize("patch, merge", [(14, 3), (16, 2), (16, 3)])
def test_patch_and_merge_variants(patch, merge):
    config = model_config("4b", patch_size=patch, merge_size=merge)
    assert count(config) == key_table_count(config)


def test_normalisation_equals_the_processors_floats():
    """Equal to float64 arithmetic, for every pixel value and channel."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    values = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 3, 4)).reshape(256, 12)
    want = (np.arange(256)[:, None] / 255 - np.array(mean)) / np.array(std)
    got = np.asarray(jax.jit(normalize_patches)(values)).reshape(256, 3, 4)
    assert got.dtype == np.float32
    assert np.abs(got - want[:, :, None]).max() < 1e-6
    floats = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    np.testing.assert_array_equal(normalize_patches(floats), floats)
    with pytest.raises(TypeError, match="int32"):
        normalize_patches(jnp.zeros((2, 12), jnp.int32))


def test_config_reads_both_transformers_forms():
    raw = json.loads((GOLDEN / "dense_p14m2/hf/config.json").read_text())
    five = model_config_from_hf(raw)
    text = dict(raw["text_config"])
    theta = text.pop("rope_parameters")["rope_theta"]
    four = model_config_from_hf({**raw, "text_config": {**text, "rope_theta": theta}})
    assert four == five and five.text.rope_theta == 1e6
    # eps, theta and merge size come from the file, not from defaults.
    changed = json.loads(json.dumps(raw))
    changed["vision_config"]["layer_norm_eps"] = 1e-5
    changed["vision_config"]["rope_theta"] = 5e3
    del changed["vision_config"]["spatial_merge_size"]
    vision = model_config_from_hf(changed).vision
    assert (vision.layer_norm_eps, vision.rope_theta, vision.spatial_merge_size) == (1e-5, 5e3, 3)


def test_config_written_is_config_read():
    config = dataclasses.replace(model_config("8b"), tie_word_embeddings=True)
    assert model_config_from_hf(model_config_to_hf(config)) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl'"),
        ({"text_config.attention_bias": True}, "attention_bias is True"),
        ({"text_config.rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'yarn'"),
        ({"vision_config.temporal_patch_size": 2}, "temporal_patch_size is 2"),
        ({"vision_config.layer_norm_type": "batch_norm"}, "layer_norm_type is 'batch_norm'"),
        ({"vision_config.num_attention_heads": 4}, "multiple of 32"),
        ({"vision_config.out_hidden_size": 7}, "out_hidden_size 7"),
        ({"text_config.num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"image_token_id": 999}, "image_token_id 999"),
        ({"text_config.hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_config_that_cannot_work_is_refused(change, message):
    raw = json.loads((GOLDEN / "dense_p14m2/hf/config.json").read_text())
    for path, value in change.items():
        *parents, name = path.split(".")
        target = raw
        for parent in parents:
            target = target[parent]
        target[name] = value
    with pytest.raises(ConfigError, match=message):
        model_config_from_hf(raw)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="The model size is '7b'"):
        model_config("7b")
    with pytest.raises(ConfigError, match=r"text_config\.vocab_size is 0; it must be positive"):
        TextConfig(0, 1, 1, 1, 1, 1)
