"""The annotations are checked when tests run: a call with a wrong shape or dtype is an error."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from ov2_jax.config.model import VisionConfig
from ov2_jax.model.attention import attention, row_segments
from ov2_jax.model.encoder import VisionEncoder
from ov2_jax.model.layers.linear import Linear
from ov2_jax.model.layers.rope import rotate_half, text_rope


def test_a_kernel_takes_keys_and_values_of_one_length_and_head_size():
    segments = row_segments(jnp.ones((1, 8), jnp.int32), causal=True)
    q, k = jnp.ones((1, 8, 4, 16)), jnp.ones((1, 8, 2, 16))
    assert attention(q, k, k, segments, kernel="xla").shape == q.shape
    for v in (k[:, :7], k[..., :8], k[:, :, :1], k[0]):
        with pytest.raises(TypeCheckError, match="parameter 'v'"):
            attention(q, k, v, segments, kernel="xla")


def test_a_rotation_belongs_to_its_tokens():
    x = jnp.ones((2, 6, 4, 16))
    rope = text_rope(jnp.zeros((2, 5), jnp.int32), head_dim=16, theta=1e6)
    with pytest.raises(TypeCheckError, match="parameter 'rope'"):
        rotate_half(x, rope)


def test_the_encoder_takes_one_position_for_each_patch():
    config = VisionConfig(64, 48, 1, 2, out_hidden_size=64)
    encoder = nnx.eval_shape(lambda: VisionEncoder(config, rngs=nnx.Rngs(0)))
    patches, positions = jnp.zeros((8, config.patch_dim)), jnp.zeros((8, 3), jnp.int32)
    segments = [jnp.ones((2, 4), jnp.int32)]
    for wrong in (positions[:7], positions[:, :2], positions.astype(jnp.float32)):
        with pytest.raises(TypeCheckError, match="parameter 'patch_positions'"):
            encoder(patches, wrong, segments)


def test_layers_take_floats_on_a_device():
    linear = Linear(4, 2, bias=True, std=1.0, rngs=nnx.Rngs(0))
    assert linear(jnp.ones((3, 4))).shape == (3, 2)
    for wrong in (jnp.ones((3, 4), jnp.int32), np.ones((3, 4), np.float32)):
        with pytest.raises(TypeCheckError, match="parameter 'x'"):
            linear(wrong)
