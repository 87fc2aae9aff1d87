"""The key table against real checkpoints and against the model's own parameters."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from conversion.formats.safetensors_io import SafetensorsFolder
from conversion.keys import as_ours, key_table, leaves, parameter_count
from ov2_jax.config.hf import load_config
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.sizes import model_config
from ov2_jax.model.encoder import VisionEncoder
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from tests.golden_cases import GOLDEN
from tests.tiny import SMALL, SMALL_MOE


@pytest.mark.parametrize(
    "case", ["dense_p14m2", "dense_p16m3_tied", "codec_positions", "moe", "encoder"]
)
def test_table_has_the_keys_and_shapes_of_the_reference(case):
    stored = SafetensorsFolder(GOLDEN / case / "hf").tensors
    table = key_table(load_config(GOLDEN / case / "hf"))
    assert {e.key: e.hf_shape for e in table} == {k: t.shape for k, t in stored.items()}


def test_the_released_sizes_have_696_keys():
    # The number in the released 4B and 8B index files.
    assert len(key_table(model_config("4b"))) == len(key_table(model_config("8b"))) == 696


def _variants():
    yield "plain", SMALL
    yield "experts", SMALL_MOE
    yield "tied", dataclasses.replace(SMALL, tie_word_embeddings=True)
    for change in ({"layer_norm_type": "rms_norm"}, {"use_head": True}, {"spatial_merge_size": 3}):
        name = next(iter(change))
        yield name, dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, **change))
        yield f"encoder {name}", dataclasses.replace(SMALL.vision, **change)


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in _variants()])
def test_our_side_is_the_models_parameter_tree(config):
    full = isinstance(config, ModelConfig)
    make = LlavaOnevision2 if full else VisionEncoder
    state = nnx.state(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))
    shapes = {path: value.shape for path, value in nnx.to_flat_state(state)}
    if not full:
        shapes = {("encoder", *path): shape for path, shape in shapes.items()}
    assert {path: leaf.shape for path, leaf in leaves(config).items()} == shapes
    assert parameter_count(config) == sum(leaf.size for leaf in leaves(config).values())


def test_every_number_of_a_leaf_comes_from_exactly_one_key():
    encoder = dataclasses.replace(SMALL.vision, use_head=True)
    for leaf in (*leaves(encoder).values(), *leaves(SMALL_MOE).values()):
        hits = np.zeros(leaf.shape, int)
        for entry in leaf.entries:
            part = hits[entry.lead]
            part[..., entry.last_axis] += 1
        assert (hits == 1).all(), leaf.name


def test_the_patch_embedding_keeps_channel_row_column_order():
    config = dataclasses.replace(SMALL.vision, patch_size=2)
    entry = next(e for e in key_table(config) if "patch_embedding" in e.key)
    weight = np.random.default_rng(0).standard_normal(entry.hf_shape)  # D C p p
    patch = np.random.default_rng(1).standard_normal(entry.hf_shape[1:])  # C p p
    assert np.allclose(patch.reshape(-1) @ as_ours(entry, weight), (weight * patch).sum((1, 2, 3)))


def test_as_ours_is_a_view_both_ways():
    entry = next(e for e in key_table(SMALL) if e.key.endswith("qkv.weight"))
    weight = np.zeros(entry.hf_shape)
    as_ours(entry, weight)[3, 5] = 7
    assert weight[5, 3] == 7 and weight.sum() == 7
