"""Mixture of experts: grouped matmuls, routing, balance, meshes, steps, configs, bad input."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion import from_hf, to_hf
from conversion.errors import ConversionError
from conversion.formats import orbax_io, regions
from conversion.formats.safetensors_io import SafetensorsFolder
from conversion.keys import key_table, leaves
from ov2_jax.config.build import experiment_from
from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.hf import load_config, model_config_from_hf, model_config_to_hf
from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.config.sizes import model_config
from ov2_jax.config.start import with_checkpoint_model
from ov2_jax.core.batch import Batch
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.decoder import KVCache
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.model.moe import grouped
from ov2_jax.model.moe.mixture import (
    MixtureOfExperts,
    RouterLoad,
    load_balancing_loss,
    load_metrics,
)
from ov2_jax.sharding.mesh import MeshConfig, make_mesh
from ov2_jax.sharding.rules import batch_shardings, parameter_shardings
from ov2_jax.training.monitoring.flops import Work, forward_flops
from ov2_jax.training.start import random_params
from ov2_jax.training.state import init_state
from ov2_jax.training.step import make_train_step
from tests.conversion.folders import make_folder, same_tensors, write_weights
from tests.golden_cases import GOLDEN, Sample, pack
from tests.tiny import SMALL_MOE, TRAINED_MOE, config_of, run

RAW = json.loads((GOLDEN / "moe/hf/config.json").read_text())
TEXT = TRAINED_MOE.text
MODEL = dataclasses.replace(TRAINED_MOE, vision=model_config_from_hf(RAW).vision)

# --- grouped matmul -------------------------------------------------------------------------------

SIZES = {
    "empty groups": (0, 7, 0, 1, 16, 0),
    "one group": (0, 0, 0, 0, 0, 24),
    "even": (4,) * 6,
    "odd, many blocks": (3, 500, 0, 98),
}


@pytest.mark.parametrize("name", SIZES)
def test_grouped_matmul_and_both_gradients(name):
    """Equal to one matmul for each group in float64."""
    sizes = SIZES[name]
    dtype, tolerance = (jnp.bfloat16, 2e-2) if name == "even" else (jnp.float32, 1e-5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes), 16)).astype(dtype)
    kernels = rng.normal(size=(len(sizes), 16, 8)).astype(dtype)
    up = rng.normal(size=(sum(sizes), 8)).astype(dtype)
    size_array = jnp.array(sizes, jnp.int32)

    def forward(x, kernels):
        return grouped.grouped_matmul(x, kernels, size_array)

    out, pull = jax.jit(lambda *a: jax.vjp(forward, *a))(x, kernels)
    dx, dkernels = pull(jnp.asarray(up))
    outer = grouped.outer_by_megablox(jnp.asarray(x), jnp.asarray(up), size_array, interpret=True)
    assert {y.dtype for y in (out, dx, dkernels, outer)} == {jnp.dtype(dtype)}
    x, kernels, up = (np.asarray(a, np.float64) for a in (x, kernels, up))
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(start, end)
        want = x[rows].T @ up[rows]
        for got, expected in (
            (out[rows], x[rows] @ kernels[group]),
            (dx[rows], up[rows] @ kernels[group].T),
            (dkernels[group], want),
            (outer[group], want),
        ):
            scale = max(1, np.abs(expected).max(initial=0))
            np.testing.assert_allclose(
                np.asarray(got, np.float64), expected, atol=tolerance * scale
            )


# --- the layer ------------------------------------------------------------------------------------


def layer(**changes) -> MixtureOfExperts:
    return MixtureOfExperts(dataclasses.replace(TEXT, **changes), nnx.Rngs(0))


@pytest.mark.parametrize("normalise", [True, False])
def test_every_token_gets_its_experts_however_uneven_the_load(normalise):
    """Equal to NumPy, token by token, also if the router sends every token to two experts."""
    moe = layer(norm_topk_prob=normalise)
    gate = np.asarray(moe.gate.kernel[...]).copy()
    x = np.random.default_rng(1).normal(size=(2, 9, 32)).astype(np.float32)
    x[..., 0] = 1
    for bias in (0, 50):
        gate[0] = (bias, bias, 0, 0)
        moe.gate.kernel[...] = jnp.asarray(gate)
        real = np.ones((2, 9), bool)
        real[1, 5:] = False
        got, load = moe(jnp.asarray(x), jnp.asarray(real))
        logits = x.astype(np.float64) @ gate
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        want, assigned = np.zeros_like(x), np.zeros(4)
        for b, n in np.ndindex(2, 9):
            top = np.argsort(-p[b, n])[:2]
            weights = p[b, n, top] / (p[b, n, top].sum() if normalise else 1)
            assigned[top] += real[b, n]
            for e, w in zip(top, weights, strict=True):
                g, u, d = (
                    np.asarray(getattr(moe.experts, k).kernel[e])
                    for k in ("gate_proj", "up_proj", "down_proj")
                )
                h = x[b, n] @ g
                want[b, n] += w * ((h / (1 + np.exp(-h)) * (x[b, n] @ u)) @ d)
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_array_equal(load.assigned, assigned)
        np.testing.assert_allclose(load.probability, p[real].sum(0), rtol=1e-5)
        assert float(load.tokens) == real.sum() == 14
    assert assigned.tolist() == [14, 14, 0, 0]


def test_the_router_is_float32_in_a_bfloat16_model():
    """The logits of two experts differ by less than bfloat16 resolves."""
    moe = layer(num_experts_per_tok=1)
    gate = np.zeros((32, 4), np.float32)
    gate[0] = (1, 1.001, 0, 0)
    moe.gate.kernel[...] = jnp.asarray(gate)
    _, load = moe(jnp.ones((1, 3, 32), jnp.bfloat16), jnp.ones((1, 3), bool))
    assert load.assigned.tolist() == [0, 3, 0, 0]


def test_load_balancing_loss_is_the_formula_over_all_layers_and_real_tokens():
    rng = np.random.default_rng(2)
    layers, tokens, experts, k = 3, 20, 4, 2
    p = rng.dirichlet(np.ones(experts), (layers, tokens))
    chosen = np.argsort(-p, -1)[..., :k]
    hits = (chosen[..., None] == np.arange(experts)).sum(-2)
    load = RouterLoad(
        jnp.array(hits.sum(1), jnp.float32),
        jnp.array(p.sum(1), jnp.float32),
        jnp.full(layers, tokens, jnp.float32),
    )
    f, mean = hits.reshape(-1, experts).mean(0), p.reshape(-1, experts).mean(0)
    assert float(load_balancing_loss(load)) == pytest.approx(experts * (f * mean).sum(), rel=1e-6)
    even = RouterLoad(jnp.full((2, 4), 10.0), jnp.full((2, 4), 5.0), jnp.full(2, 20.0))
    assert float(load_balancing_loss(even)) == pytest.approx(2)
    nothing = jax.tree.map(jnp.zeros_like, even)
    assert float(load_balancing_loss(nothing)) == 0
    uneven = even._replace(assigned=jnp.array([[40.0, 0, 0, 0], [10, 10, 10, 10]]))
    metrics = load_metrics(uneven)
    assert float(metrics["moe/max_load"]) == 4 and int(metrics["moe/dead_experts"]) == 3


# --- the step -------------------------------------------------------------------------------------


@functools.cache
def batch() -> Batch:
    """8 packs of a text row of three samples and padding."""
    rng = np.random.default_rng(0)
    none = np.zeros((0, MODEL.vision.patch_dim), np.float32), np.zeros((0, 3), np.int64), []
    packs = []
    for _ in range(8):
        samples = []
        for words in (5, 9, 7):
            tokens = rng.integers(1, 60, words)
            samples.append(Sample(tokens, np.append(tokens[1:], -1), *none))
        packs.append(pack(MODEL, samples, (0, 1, 2), text_row=24))
    return jax.tree.map(lambda *x: np.concatenate(x), *packs)


@functools.cache
def params() -> dict:
    return random_params(MODEL, 0)


def cut(accum: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(accum, -1, *x.shape[1:]), batch())


@functools.cache
def train_step(config: OptimizerConfig, model=MODEL):
    compute = ComputeConfig(dtype="float32")
    make = lambda: LlavaOnevision2(model, rngs=nnx.Rngs(0), compute=compute)  # noqa: E731
    graph = nnx.split(nnx.eval_shape(make))[0]
    return jax.jit(make_train_step(graph, config, steps=100, reduction="tokens"))


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-3, train=("decoder",))


@pytest.mark.long
def test_eight_devices_equal_one():
    """Each device routes its own tokens; the balance is over the tokens of all devices."""
    state = init_state(params(), OPTIMIZER)
    alone, want = train_step(OPTIMIZER)(state, cut(1))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placed = jax.device_put(state, parameter_shardings(state, mesh))
    kernel = placed.params["decoder"]["layers"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] == kernel.size
    with jax.set_mesh(mesh):
        placed_batch = jax.device_put(cut(1), batch_shardings(mesh, 0))
        spread, got = train_step(OPTIMIZER)(placed, placed_batch)
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), alone.params, spread.params
    )


def test_the_balance_moves_the_router_and_is_reported_apart_from_the_loss():
    state = init_state(params(), OPTIMIZER)
    without = dataclasses.replace(MODEL, router_aux_loss_coef=0.0)
    balanced, metrics = train_step(OPTIMIZER)(state, cut(1))
    plain, alone = train_step(OPTIMIZER, without)(state, cut(1))
    for name in ("loss", "moe/aux_loss", "moe/max_load", "moe/dead_experts"):
        assert float(metrics[name]) == pytest.approx(float(alone[name])), name
    assert 2 <= float(metrics["moe/aux_loss"]) <= 4 and float(metrics["moe/max_load"]) >= 1
    gate = [s.params["decoder"]["layers"]["mlp"]["gate"]["kernel"] for s in (balanced, plain)]
    assert np.abs(gate[0] - gate[1]).max() > 1e-4


@pytest.mark.long
def test_micro_steps_add_their_mean_balance():
    state = init_state(params(), OPTIMIZER)
    _, whole = train_step(OPTIMIZER)(state, cut(1))
    _, parts = train_step(OPTIMIZER)(state, cut(4))
    single = []
    for micro in range(4):
        one = jax.tree.map(lambda x, m=micro: x[m : m + 1], cut(4))
        single.append(float(train_step(OPTIMIZER)(state, one)[1]["moe/aux_loss"]))
    assert float(parts["moe/aux_loss"]) == pytest.approx(np.mean(single), rel=1e-6)
    assert float(parts["moe/aux_loss"]) != pytest.approx(float(whole["moe/aux_loss"]), rel=1e-4)
    for name in ("loss", "moe/max_load", "moe/dead_experts"):  # these add up over tokens
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-6), name


def test_a_frozen_decoder_stays():
    config = dataclasses.replace(OPTIMIZER, train=("merger",), weight_decay=0.1)
    state = init_state(params(), config)
    new, metrics = train_step(config)(state, cut(1))
    jax.tree.map(np.testing.assert_array_equal, new.params["decoder"], state.params["decoder"])
    assert "moe/aux_loss" in metrics


def test_flops_count_active_experts_only():
    model = model_config("30b-a3b")
    work = Work(tokens=1000, patches=0, squared_samples=0, squared_windows=0)
    attention = 2048 * (2 * 4096 + 2 * 512)
    layer_parameters = attention + 8 * 3 * 2048 * 768 + 2048 * 128
    active = 48 * layer_parameters + 2048 * 151936
    assert forward_flops(model, work)["decoder"] == 2 * 1000 * active
    assert 3.0e9 < active + 2048 * 151936 < 3.4e9  # "A3B", with the embedding


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_trains_reports_the_balance_and_exports(tmp_path, data):
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    changes = {f"model.text.{name}": value for name, value in experts.items()}
    changes["model.router_aux_loss_coef"] = 0.01
    assert run(tmp_path / "run", data, steps=2, **changes) == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert 2 <= line["moe/aux_loss"] < 4 and 1 <= line["moe/max_load"] <= 2
        assert 0 <= line["moe/dead_experts"] <= 2
    to_hf.convert(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    exported = load_config(tmp_path / "hf")
    assert exported.text.num_experts == 4 and exported.router_aux_loss_coef == 0.01
    from_hf.convert(tmp_path / "hf", tmp_path / "start")

    # The next run's coefficient is its own; its sizes must be the checkpoint's.
    changes |= {"init_from": str(tmp_path / "start"), "model.router_aux_loss_coef": 0.5}
    next_run = experiment_from(config_of(tmp_path / "next", data, **changes))
    found, notes = with_checkpoint_model(next_run, resuming=False)
    assert found.model.router_aux_loss_coef == 0.5 and notes == []
    changes["model.text.num_experts"] = 8
    wrong = experiment_from(config_of(tmp_path / "next", data, **changes))
    with pytest.raises(ConfigError, match="model.text.num_experts is 8, the checkpoint's 4"):
        with_checkpoint_model(wrong, resuming=False)


# --- generation -----------------------------------------------------------------------------------


def test_decoding_with_the_cache_equals_whole_passes():
    compute = ComputeConfig(dtype="float32", remat="none")
    model = nnx.merge(
        nnx.split(
            nnx.eval_shape(lambda: LlavaOnevision2(MODEL, rngs=nnx.Rngs(0), compute=compute))
        )[0],
        params(),
    )
    tokens = np.random.default_rng(5).integers(1, 60, (2, 7)).astype(np.int32)
    zeros = np.zeros((1, 2, 7), np.int32)
    rows = Batch(
        tokens[None], zeros, zeros + np.arange(7, dtype=np.int32), zeros + 1, zeros - 1, ()
    )

    @jax.jit
    def both(rows):
        hidden, _ = model(rows)
        prompt = jax.tree.map(lambda x: x[..., :4], rows)
        _, collected = model(prompt, collect_cache=True)
        room = [(0, 0), (0, 0), (0, 3), (0, 0), (0, 0)]
        cache = KVCache(*(jnp.pad(c, room) for c in collected.cache))
        steps = []
        for at in range(4, 7):
            logits, cache = model.decoder.decode(rows.tokens[0, :, at], jnp.full(2, at), cache)
            steps.append(logits)
        return model.decoder.logits(hidden)[:, 4:], jnp.stack(steps, 1)

    whole, cached = both(rows)
    np.testing.assert_allclose(cached, whole, atol=2e-5)


# --- configs --------------------------------------------------------------------------------------


def test_config_reads_both_transformers_forms_and_what_it_writes():
    five = model_config_from_hf(RAW)
    text = dict(RAW["text_config"])
    text["num_experts"] = text.pop("num_local_experts")
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    assert model_config_from_hf({**RAW, "text_config": text}) == five
    assert (five.text.num_experts, five.text.num_experts_per_tok) == (6, 2)
    assert five.text.norm_topk_prob and five.router_aux_loss_coef == 0.01
    # The reference adds no such loss unless the top level asks for it, and has no other default.
    assert model_config_from_hf(RAW | {"output_router_logits": False}).router_aux_loss_coef == 0
    del text["norm_topk_prob"], text["head_dim"]
    older = model_config_from_hf({**RAW, "text_config": text}).text
    assert not older.norm_topk_prob and older.head_dim == 16
    for config in (five, SMALL_MOE, model_config("30b-a3b")):
        assert model_config_from_hf(model_config_to_hf(config)) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_config.decoder_sparse_step": 2}, "decoder_sparse_step is 2, which is not supp"),
        ({"text_config.mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], which is not supported"),
        ({"text_config.num_local_experts": None}, "neither num_experts nor num_local_experts"),
        ({"text_config.num_experts": 8}, "needs one number of experts"),
        ({"text_config.num_local_experts": 0}, "num_experts is 0; it must be positive"),
        ({"text_config.num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_exp"),
        ({"text_config.num_experts_per_tok": None}, "lacks num_experts_per_tok"),
        (
            {"text_config.moe_intermediate_size": -1},
            "moe_intermediate_size is -1; it must be posit",
        ),
        ({"text_config.model_type": "qwen3"}, "text_config.model_type is 'qwen3'"),
        ({"model_type": "llava_onevision2"}, "text_config.model_type is 'qwen3_moe'"),
        ({"router_aux_loss_coef": -0.1}, "must not be negative"),
    ],
)
def test_config_that_cannot_work_is_refused(change, message):
    raw = json.loads(json.dumps(RAW))
    for path, value in change.items():
        *parents, name = path.split(".")
        target = raw
        for parent in parents:
            target = target[parent]
        target[name] = value
    with pytest.raises(ConfigError, match=message):
        model_config_from_hf(raw)


def test_a_dense_decoder_has_no_router_to_balance():
    with pytest.raises(ConfigError, match="a dense decoder has no router"):
        dataclasses.replace(model_config("8b"), router_aux_loss_coef=0.01)


# --- conversion -----------------------------------------------------------------------------------


def test_the_released_size_has_a_key_for_every_expert():
    """Of 48 layers: 8 tensors of attention and norms, a router, 3 of each of 128 experts."""
    table = key_table(model_config("30b-a3b"))
    decoder = [e for e in table if e.path[0] == "decoder"]
    assert len(decoder) == 48 * (8 + 1 + 3 * 128) + 3
    shape = leaves(model_config("30b-a3b"))[
        ("decoder", "layers", "mlp", "experts", "down_proj", "kernel")
    ].shape
    assert shape == (48, 128, 768, 2048)


@pytest.mark.parametrize(
    "chunk_bytes, chunk", [(1000, (1, 1)), (20_000, (1, 2)), (60_000, (1, 6)), (200_000, (2, 6))]
)
def test_stacked_experts_are_written_in_parts_of_equal_size(
    chunk_bytes, chunk, tmp_path, monkeypatch
):
    """An expert's matrix takes 48 * 40 * 4 = 7680 bytes."""
    monkeypatch.setattr(regions, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(regions, "BLOCK_BYTES", 1)
    hf = make_folder(tmp_path / "hf", SMALL_MOE)
    from_hf.convert(hf, tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    same_tensors(hf, tmp_path / "back")
    path = ("decoder", "layers", "mlp", "experts", "up_proj", "kernel")
    stored = orbax_io.open_params(tmp_path / "orbax" / "params", leaves(SMALL_MOE))[path]
    assert stored.chunk_layout.read_chunk.shape[:2] == chunk
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    modules = {reference.split("--")[-1].split(".")[0] for reference in config["auto_map"].values()}
    assert modules == {"configuration_llava_onevision2_moe", "modeling_llava_onevision2_moe"}


def test_every_bad_expert_key_is_listed(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL_MOE)
    weights = SafetensorsFolder(hf)
    tensors = {name: np.array(weights.array(name)) for name in weights.tensors}
    where = "model.language_model.layers.1.mlp."
    tensors[f"{where}experts.6.up_proj.weight"] = tensors[f"{where}experts.5.up_proj.weight"]
    tensors[f"{where}up_proj.weight"] = np.zeros((80, 48), np.float32)
    del tensors[f"{where}experts.3.gate_proj.weight"]
    tensors[f"{where}gate.weight"] = tensors[f"{where}gate.weight"][:5]
    (hf / "model.safetensors").unlink()
    write_weights(hf, tensors)
    with pytest.raises(ConversionError) as error:
        from_hf.convert(hf, tmp_path / "orbax")
    for part in (
        f"does not have (2):\n  {where}experts.6.up_proj.weight\n  {where}up_proj.weight",
        f"Keys that are missing (1):\n  {where}experts.3.gate_proj.weight",
        f"{where}gate.weight: is [5, 48], must be [6, 48]",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "orbax").exists()
