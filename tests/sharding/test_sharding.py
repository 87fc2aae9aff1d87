"""Every mesh axis, alone and in pairs, against one device; cuts of arrays; meshes that fail."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.experiment import check_mesh
from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.config.sizes import model_config
from ov2_jax.core.batch import IGNORE, Batch
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.sharding.mesh import AXES, MeshConfig, make_mesh
from ov2_jax.sharding.rules import parameter_axes, parameter_shardings, path_string, token_order
from ov2_jax.training.feed import make_feed, to_devices
from ov2_jax.training.start import random_params
from ov2_jax.training.state import init_state
from ov2_jax.training.step import Losses, loss_and_grads, make_train_step
from tests.golden_cases import Sample, pack
from tests.tiny import SHARDED, SHARDED_MOE

MODELS = {"dense": SHARDED, "moe": SHARDED_MOE}
# Forty programs are compiled, and each runs once.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


class Result(NamedTuple):
    losses: Losses
    grads: dict


@functools.cache
def global_batch() -> Batch:
    """8 packs of two text rows of 32 tokens and 8 vision rows of 12 patches."""
    rng = np.random.default_rng(0)
    packs = []
    for _ in range(8):
        samples = []
        for windows, words in (((8,), 9), ((4, 8, 12, 4), 12), ((), 14), ((12, 8, 12, 8), 7)):
            tokens = rng.integers(1, 60, words)
            tokens = np.concatenate([tokens[:2], np.full(sum(windows) // 4, 60), tokens[2:]])
            targets = np.where(rng.random(len(tokens)) < 0.4, rng.integers(1, 60), IGNORE)
            positions = [(0, i // 2 % 2, i % 2 + i // 4 * 2) for w in windows for i in range(w)]
            samples.append(
                Sample(
                    tokens,
                    targets,
                    rng.normal(size=(sum(windows), SHARDED.vision.patch_dim)).astype(np.float32),
                    np.array(positions, np.int64).reshape(-1, 3),
                    list(windows),
                )
            )
        made = pack(SHARDED, samples, (0, 1, 2, 3), text_row=32, vision_row=12)
        packs.append(made)
    batch = jax.tree.map(lambda *x: np.concatenate(x), *packs)
    assert batch.tokens.shape == (8, 2, 32) and batch.vision[0].patches.shape[:3] == (8, 8, 12)
    return batch


@functools.cache
def run(model: str, mesh_config: MeshConfig | None, remat: str = "full", accum: int = 1) -> Result:
    config = MODELS[model]
    compute = ComputeConfig(dtype="float32", loss_block=7, remat=remat)
    make = lambda: LlavaOnevision2(config, rngs=nnx.Rngs(0), compute=compute)  # noqa: E731
    graph = nnx.split(nnx.eval_shape(make))[0]
    params = random_params(config, 0)
    step = jax.jit(lambda p, b: loss_and_grads(graph, p, {}, b, "rows"), compiler_options=QUICK)
    if mesh_config is None:
        batch = jax.tree.map(lambda x: x.reshape(accum, -1, *x.shape[1:]), global_batch())
        return jax.tree.map(np.asarray, Result(*step(params, batch)))
    mesh = make_mesh(mesh_config)
    batch = to_devices(global_batch(), make_feed(mesh), accum)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(params, mesh))
        return jax.tree.map(np.asarray, Result(*step(placed, batch)))


def check_equal(got: Result, want: Result) -> None:
    for name, loss, wanted in zip(Losses._fields, got.losses, want.losses, strict=True):
        jax.tree.map(
            lambda a, b, n=name: np.testing.assert_allclose(a, b, rtol=2e-6, err_msg=n),
            loss,
            wanted,
        )

    def close(path, a, b):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 1e-5, f"{path_string(path)}: {error:.1e}"

    jax.tree_util.tree_map_with_path(close, got.grads, want.grads)


def alone(axis: str) -> MeshConfig:
    """An axis with all 8 devices, or with 4 if there are only 4 heads or experts."""
    size = 4 if axis in ("tensor", "expert") else 8
    return dataclasses.replace(MeshConfig(data=8 // size, fsdp=1), **{axis: size})


def pair(first: str, second: str) -> MeshConfig:
    return dataclasses.replace(MeshConfig(fsdp=1), **{first: 2, second: 4})


PAIRS = list(itertools.combinations(AXES, 2))


# Mixtures of experts in `make test-all`, as all pairs of axes.
SOME = ["dense", pytest.param("moe", marks=pytest.mark.long)]


@pytest.mark.parametrize("model", SOME)
@pytest.mark.parametrize("axis", AXES)
def test_an_axis_alone_equals_one_device(model, axis):
    check_equal(run(model, alone(axis)), run(model, None))


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("axes", PAIRS, ids="-".join)
def test_two_axes_equal_one_device(model, axes):
    check_equal(run(model, pair(*axes)), run(model, None))


def test_three_axes_and_micro_steps():
    want = run("moe", None, accum=2)
    check_equal(run("moe", MeshConfig(fsdp=2, context=2, tensor=2), accum=2), want)
    check_equal(run("moe", MeshConfig(data=2, fsdp=1, expert=2, context=2), accum=2), want)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", "attention", "up", "projections", "offload"])
def test_remat_policies_change_nothing(remat):
    check_equal(run("dense", pair("fsdp", "tensor"), remat), run("dense", None))


@pytest.mark.long
def test_a_whole_step_on_every_axis():
    """Also update and metrics; parameters and moments keep their shardings."""
    config = OptimizerConfig(learning_rate=1e-2, eps=1e-3, weight_decay=0.1)
    compute = ComputeConfig(dtype="float32")
    make = lambda: LlavaOnevision2(SHARDED_MOE, rngs=nnx.Rngs(0), compute=compute)  # noqa: E731
    step = jax.jit(
        make_train_step(nnx.split(nnx.eval_shape(make))[0], config, steps=10, reduction="tokens")
    )
    state = init_state(random_params(SHARDED_MOE, 0), config)
    batch = jax.tree.map(lambda x: x[None], global_batch())
    alone, want = step(state, batch)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    shardings = parameter_shardings(state, mesh)
    with jax.set_mesh(mesh):
        spread, got = step(
            jax.device_put(state, shardings), to_devices(global_batch(), make_feed(mesh), 1)
        )
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), alone.params, spread.params
    )
    kernel = spread.params["decoder"]["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    moments = spread.opt_state[1].mu["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert moments.addressable_shards[0].data.size * 8 == moments.size


@pytest.mark.parametrize("size", ["8b", "30b-a3b"])
def test_every_matrix_of_a_model_is_cut(size):
    params = jax.eval_shape(lambda: random_params(model_config(size), 0))
    whole = {
        path_string(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if parameter_axes(path_string(path)) is None
    }
    assert all(name.endswith(("scale", "bias")) for name in whole)
    largest = max(np.prod(shape) for shape in whole.values())
    assert largest <= 48 * 4096  # norms of all layers


@pytest.mark.parametrize("context", [1, 2, 4])
def test_context_pieces_have_the_same_causal_work(context):
    order = token_order(32, context).reshape(context, -1)
    assert sorted(order.flat) == list(range(32))
    work = (order + 1).sum(1)  # keys that each query sees
    assert len(set(work.tolist())) == 1


def test_packs_of_a_context_group_are_read_once():
    """The batch on the devices is the host's batch, with tokens in the order of token_order."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    feed = make_feed(mesh)
    assert (feed.index, feed.count, feed.shards) == (0, 1, (0, 1))
    batch = global_batch()
    placed = to_devices(batch, feed, 2)
    order = token_order(32, 4)
    want = batch.tokens.reshape(2, 4, 2, 32)[..., order]
    np.testing.assert_array_equal(placed.tokens, want)
    assert placed.tokens.addressable_shards[0].data.shape == (2, 2, 2, 8)
    assert placed.vision[0].patches.addressable_shards[0].data.shape[:3] == (2, 2, 2)


PACK = PackConfig(rows=1, seq_len=4096, vision_rows=((4, 4096), (2, 8192)))


@pytest.mark.parametrize(
    "model, mesh, message",
    [
        ("8b", MeshConfig(fsdp=3), "mesh.fsdp is 3, which does not divide model.text.hidden_size"),
        ("8b", MeshConfig(fsdp=1, tensor=16), "mesh.tensor is 16, .*num_key_value_heads 8"),
        ("8b", MeshConfig(fsdp=1, expert=2), "mesh.expert is 2, but a dense decoder"),
        ("30b-a3b", MeshConfig(fsdp=1, expert=3), "does not divide"),
        ("8b", MeshConfig(fsdp=1, context=4), r"rows of pack.vision_rows\[1\] 2"),
        ("8b", MeshConfig(fsdp=1, tensor=2, context=2), r"mesh.context x mesh.tensor is 4"),
    ],
)
def test_a_mesh_that_does_not_divide_is_one_sentence(model, mesh, message):
    devices = int(np.prod(list(dataclasses.asdict(mesh).values())))
    with pytest.raises(ConfigError, match=message) as error:
        check_mesh(mesh.sizes(devices), model_config(model), PACK)
    assert "\n" not in str(error.value)


def test_a_row_that_does_not_cut_into_pieces_is_one_sentence():
    pack_config = dataclasses.replace(PACK, seq_len=4098, vision_rows=())
    with pytest.raises(ConfigError, match="seq_len 4098 does not divide into 4 pieces"):
        check_mesh(MeshConfig(fsdp=1, context=2).sizes(2), model_config("8b"), pack_config)


def test_frequent_tokens_lose_nothing_in_bfloat16():
    """4096 equal gradients of 1 add up to 4096; in bfloat16 they would stop at 256."""
    from ov2_jax.model.decoder import _rows_of

    table = jnp.zeros((4, 2), jnp.bfloat16)
    index = jnp.zeros((1, 4096), jnp.int32)
    grad = jax.grad(lambda t: _rows_of(t, index).sum().astype(jnp.float32))(table)
    assert grad[0].tolist() == [4096, 4096] and not grad[1:].any()
