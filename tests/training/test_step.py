"""The optimizer step: losses, accumulation, meshes, freezing, skipping, against plain formulas."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.core.batch import IGNORE, Batch
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding.mesh import MeshConfig, make_mesh
from ov2_jax.sharding.rules import batch_shardings, parameter_shardings
from ov2_jax.training.loss import loss_weights, weighted_cross_entropy
from ov2_jax.training.monitoring.flops import batch_work, forward_flops, train_flops
from ov2_jax.training.optimizer import learning_rate_schedule, split_trainable
from ov2_jax.training.start import random_params
from ov2_jax.training.state import init_state
from ov2_jax.training.step import make_train_step
from tests.golden_cases import Sample, pack
from tests.tiny import TRAINED

MODEL = dataclasses.replace(TRAINED, vision=dataclasses.replace(TRAINED.vision, use_head=True))
STEPS = 100


def sample(rng: np.random.Generator, windows: tuple[int, ...], words: int) -> Sample:
    """Random tokens around random pictures of 4-patch-high grids."""
    tokens = rng.integers(1, 60, words)
    supervised = rng.random(words) < 0.5
    pads = sum(windows) // 4
    tokens = np.concatenate([tokens[:2], np.full(pads, 60), tokens[2:]])
    targets = np.full(len(tokens), IGNORE)
    for i in range(pads + 2, len(tokens)):
        if supervised[i - pads]:
            targets[i - 1] = tokens[i]
    positions = [(0, i // 2 % 2, i % 2 + i // 4 * 2) for w in windows for i in range(w)]
    patches = rng.normal(size=(sum(windows), MODEL.vision.patch_dim)).astype(np.float32)
    return Sample(
        tokens, targets, patches, np.array(positions, np.int64).reshape(-1, 3), list(windows)
    )


@functools.cache
def global_batch() -> Batch:
    """8 packs of two text rows; one row of one pack has nothing supervised."""
    rng = np.random.default_rng(0)
    packs = []
    for _ in range(8):
        samples = [sample(rng, (8,), 9), sample(rng, (4, 8), 12), sample(rng, (), 14)]
        packs.append(pack(MODEL, samples, (0, 1, 2), text_row=20, vision_row=12))
    packs[3].targets[0, 1] = IGNORE
    return jax.tree.map(lambda *x: np.concatenate(x), *packs)


def cut(batch: Batch, accum: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accum, -1, *x.shape[1:]), batch)


def graph() -> nnx.GraphDef:
    compute = ComputeConfig(dtype="float32", loss_block=7)
    make = lambda: LlavaOnevision2(MODEL, rngs=nnx.Rngs(0), compute=compute)  # noqa: E731
    return nnx.split(nnx.eval_shape(make))[0]


@functools.cache
def train_step(config: OptimizerConfig, reduction: str = "tokens"):
    return jax.jit(make_train_step(graph(), config, steps=STEPS, reduction=reduction))


def plain_losses(params, batch: Batch) -> np.ndarray:
    """-log p of every target [G*B L], from whole logits; 0 where nothing is supervised."""
    model = nnx.merge(graph(), params)
    hidden, _ = model(jax.tree.map(jnp.asarray, batch))
    log_p = jax.nn.log_softmax(model.decoder.logits(hidden))
    targets = batch.targets.reshape(log_p.shape[:2])
    picked = jnp.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.where(targets != IGNORE, -np.asarray(picked), 0)


@pytest.mark.parametrize("reduction", ["tokens", "rows"])
@pytest.mark.parametrize("accum", [1, 4])
def test_loss_is_the_formulas_whatever_the_accumulation(reduction, accum):
    batch, params = global_batch(), random_params(MODEL, 0)
    losses = plain_losses(params, batch)
    supervised = (batch.targets != IGNORE).reshape(losses.shape)
    if reduction == "tokens":
        want = losses.sum() / supervised.sum()
    else:
        per_row = supervised.sum(-1)
        rows = per_row > 0
        assert not rows.all()
        want = (losses.sum(-1)[rows] / per_row[rows]).mean()
    config = OptimizerConfig()
    _, metrics = train_step(config, reduction)(init_state(params, config), cut(batch, accum))
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-6)


@pytest.mark.long
def test_accumulation_gives_the_same_update():
    config = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    state = init_state(random_params(MODEL, 0), config)
    whole, _ = train_step(config)(state, cut(global_batch(), 1))
    parts, _ = train_step(config)(state, cut(global_batch(), 8))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, whole.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, parts.params
    )


@pytest.mark.long
@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(2, 4), MeshConfig(-1, 1)])
def test_eight_devices_equal_one(mesh_config):
    """Parameters, moments and packs are spread; loss and update stay the same."""
    assert len(jax.devices()) == 8
    config = OptimizerConfig(learning_rate=1e-2, eps=1e-3, weight_decay=0.1)
    state = init_state(random_params(MODEL, 0), config)
    alone, want = train_step(config)(state, cut(global_batch(), 1))

    mesh = make_mesh(mesh_config)
    shardings = parameter_shardings(state, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, shardings)
        batch = jax.device_put(cut(global_batch(), 1), batch_shardings(mesh, 1))
        spread, got = train_step(config)(placed, batch)
    assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-6)
    assert float(got["grad_norm"]) == pytest.approx(float(want["grad_norm"]), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), alone.params, spread.params
    )
    kernel = placed.opt_state[1].mu["decoder"]["layers"]["mlp"]["gate_proj"]["kernel"]
    share = kernel.addressable_shards[0].data.size / kernel.size
    assert share == 1 / mesh.shape["fsdp"]


def test_mesh_that_cannot_work_is_one_sentence():
    with pytest.raises(ConfigError, match="does not use the 8 devices"):
        MeshConfig(3, 2).sizes(8)
    with pytest.raises(ConfigError, match="at most one -1"):
        MeshConfig(-1, -1).sizes(8)


def test_adamw_equals_optax_with_decay_mask_and_schedule():
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, beta2=0.95, warmup_fraction=0.02)
    params = random_params(MODEL, 0)
    step = train_step(config)
    state = init_state(params, config)

    trainable, _ = split_trainable(params, config)
    flat = traverse_util.flatten_dict(trainable)
    mask = traverse_util.unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})
    schedule = [1.5e-3, 3e-3, 3e-3 - (3e-3 - 1e-6) * 0.5 * (1 - np.cos(np.pi / 98))]
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda n: jnp.array(schedule)[n], 0.9, 0.95, 1e-5, weight_decay=0.1, mask=mask),
    )
    opt_state = reference.init(trainable)

    def loss(trainable, batch):
        full = {**params, **trainable, "encoder": {**params["encoder"], **trainable["encoder"]}}
        model = nnx.merge(graph(), full)
        hidden, _ = model(batch)
        weights = loss_weights(batch.targets[None], "tokens")[0].reshape(hidden.shape[:2])
        targets = batch.targets.reshape(hidden.shape[:2])
        head = model.decoder.head()
        return weighted_cross_entropy(hidden, head, targets, weights, block=1000)

    for _ in range(3):
        state, _ = step(state, cut(global_batch(), 1))
        grads = jax.jit(jax.grad(loss))(trainable, global_batch())
        updates, opt_state = reference.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    got, _ = split_trainable(state.params, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), got, trainable)


def test_learning_rate_warms_up_and_ends_where_it_should():
    config = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1, encoder_learning_rate=1e-4)
    rates = learning_rate_schedule(config, "decoder", 100)(jnp.arange(100))
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 1e-4, rtol=1e-5)
    assert rates[-1] == pytest.approx(1e-6) and max(rates) == pytest.approx(1e-3)
    encoder = learning_rate_schedule(config, "encoder", 100)
    assert float(encoder(jnp.int32(9))) == pytest.approx(1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 100, 1600, 70313])
@pytest.mark.parametrize("fraction", [0.0, 0.002, 0.05, 0.9])
def test_learning_rate_is_the_formulas_at_every_step(steps, fraction):
    """Also without a warm-up, with no step after it, and with an end above the peak."""
    config = OptimizerConfig(
        learning_rate=1e-3, warmup_fraction=fraction, merger_learning_rate=1e-7
    )
    warmup = max(1, math.ceil(fraction * steps))
    step = np.unique(np.r_[np.arange(min(steps, 300)), warmup - 1, warmup, steps // 2, steps - 1])
    step = step[step < steps]
    progress = np.clip((step - warmup + 1) / max(1, steps - warmup), 0, 1)
    for part, peak, end in (("decoder", 1e-3, 1e-6), ("merger", 1e-7, 1e-7)):
        cosine = end + (peak - end) * 0.5 * (1 + np.cos(np.pi * progress))
        want = np.where(step < warmup, peak * (step + 1) / warmup, cosine)
        got = jax.vmap(learning_rate_schedule(config, part, steps))(jnp.asarray(step))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-7 * peak)


def test_frozen_parts_do_not_move_and_cost_no_moments():
    config = OptimizerConfig(train=("merger",), learning_rate=1e-2, weight_decay=0.1)
    params = random_params(MODEL, 0)
    state = init_state(params, config)
    assert set(state.opt_state[1].mu) == {"merger"}
    new, metrics = train_step(config)(state, cut(global_batch(), 1))
    for part in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, new.params[part], params[part])
    assert not np.array_equal(
        new.params["merger"]["fc1"]["kernel"], params["merger"]["fc1"]["kernel"]
    )
    assert "grad_norm/merger" in metrics and "grad_norm/decoder" not in metrics


def test_the_unused_pooling_head_is_never_decayed():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5)
    params = random_params(MODEL, 0)
    new, _ = train_step(config)(init_state(params, config), cut(global_batch(), 1))
    jax.tree.map(
        np.testing.assert_array_equal, new.params["encoder"]["head"], params["encoder"]["head"]
    )


def test_a_non_finite_step_changes_nothing_but_the_counts():
    config = OptimizerConfig(learning_rate=1e-2)
    step = train_step(config)
    state, _ = step(init_state(random_params(MODEL, 0), config), cut(global_batch(), 1))
    bad = global_batch()
    patches = bad.vision[0].patches.copy()
    patches[0, 0, 0, 0] = np.inf
    bad = bad._replace(vision=(bad.vision[0]._replace(patches=patches),))
    after, metrics = step(state, cut(bad, 1))
    assert not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped_in_a_row"]) == 1 and int(after.step) == 2
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))
    again, metrics = step(after, cut(global_batch(), 1))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)
    assert not np.array_equal(
        again.params["decoder"]["norm"]["scale"], after.params["decoder"]["norm"]["scale"]
    )


def test_nothing_supervised_is_a_loss_of_zero_and_no_nan():
    targets = jnp.full((1, 2, 1, 5), IGNORE)
    for reduction in ("tokens", "rows"):
        assert float(loss_weights(targets, reduction).sum()) == 0


@pytest.mark.parametrize("block", [3, 8, 100])
def test_cross_entropy_in_blocks_equals_whole(block):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 8, 16)).astype(np.float32))
    head = jnp.asarray(rng.normal(size=(16, 50)).astype(np.float32))
    targets = jnp.asarray(rng.integers(-1, 50, (2, 8)))
    weights = (targets >= 0) * rng.random((2, 8)).astype(np.float32)

    def whole(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head)
        picked = jnp.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
        return -(weights * picked).sum()

    def blocks(hidden, head):
        return weighted_cross_entropy(hidden, head, targets, weights, block=block)

    want, want_grads = jax.value_and_grad(whole, argnums=(0, 1))(hidden, head)
    got, grads = jax.value_and_grad(blocks, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": ()}, "at least one of"),
        ({"train": ("vision",)}, "at least one of"),
        ({"encoder_learning_rate": 0.0}, "leave it out of optimizer.train"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_optimizer_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(OptimizerConfig(), **change)


def test_model_flops_count_real_tokens_and_true_windows():
    batch = global_batch()
    work = batch_work(batch)
    # Each pack: windows 8, 4, 8; samples of 9 + 2, 12 + 3 and 14 tokens.
    assert work.patches == 8 * 20 and work.squared_windows == 8 * (64 + 16 + 64)
    assert work.tokens == 8 * 40 and work.squared_samples == 8 * (11**2 + 15**2 + 14**2)
    parts = forward_flops(MODEL, work)
    # XLA counts the same matmuls of a dense, unpacked batch: one window, one sample, no padding.
    one = pack(MODEL, [sample(np.random.default_rng(1), (16,), 12)], (0,))

    def forward(params, batch):
        model = nnx.merge(nnx.split(nnx.eval_shape(plain))[0], params)
        return model.decoder.logits(model(batch)[0])

    def plain():
        compute = ComputeConfig(dtype="float32", remat="none")
        return LlavaOnevision2(MODEL, rngs=nnx.Rngs(0), compute=compute)

    big = forward_flops(MODEL, batch_work(one))
    assert set(big) == {"encoder", "merger", "decoder"}
    everything = train_flops(MODEL, work, ("encoder", "merger", "decoder"))
    assert everything == pytest.approx(3 * sum(parts.values()))
    merger_only = train_flops(MODEL, work, ("merger",))
    assert merger_only == pytest.approx(
        parts["encoder"] + 3 * parts["merger"] + 2 * parts["decoder"]
    )
