"""The model against the public reference, alone and packed: logits, loss, every gradient."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.training.loss import loss_weights
from ov2_jax.training.step import batch_loss
from tests.golden_cases import MODELS, Case, hf_tensors, load_case, pack

LOGITS, LOSS, GRADIENT = 2e-5, 2e-6, 1e-4


@pytest.fixture(scope="module", params=MODELS)
def case(request) -> Case:
    return load_case(request.param)


def graph_of(case: Case, **compute) -> nnx.GraphDef:
    compute = ComputeConfig(dtype="float32", **compute)
    make = lambda: LlavaOnevision2(case.config, rngs=nnx.Rngs(0), compute=compute)  # noqa: E731
    return nnx.split(nnx.eval_shape(make))[0]


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, batch, weights):
    """Logits [B L V], the weighted loss and its gradients."""

    def loss(params):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        loss, _ = batch_loss(graph, params, batch, weights, micro_steps=1)
        return loss, model.decoder.logits(hidden)

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, value, grads


def expected_gradients(case: Case, s: int) -> dict[str, np.ndarray]:
    prefix = f"{s}.grad."
    return {k[len(prefix) :]: v for k, v in case.expected.items() if k.startswith(prefix)}


def check_gradients(grads: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert expected
    for name, want in expected.items():
        error, norm = np.linalg.norm(grads[name] - want), np.linalg.norm(want)
        assert error <= GRADIENT * norm, f"{name}: error {error:.1e} of {norm:.1e}"


FULL = pytest.param({"remat": "full"}, marks=pytest.mark.long)


@pytest.mark.parametrize("compute", [{"remat": "none"}, FULL])
def test_each_sample_alone(case: Case, compute: dict):
    graph = graph_of(case, loss_block=5, **compute)
    for s in range(len(case.samples)):
        batch = pack(case.config, case.samples, (s,))
        weights = loss_weights(jnp.asarray(batch.targets[None]), "tokens")[0]
        logits, loss, grads = run(graph, case.params, batch, weights)
        assert np.abs(logits[0] - case.expected[f"{s}.logits"][0]).max() < LOGITS
        assert abs(loss - case.expected[f"{s}.loss"][0]) < LOSS
        check_gradients(hf_tensors(case.config, grads), expected_gradients(case, s))


def without_balance(case: Case) -> Case:
    """The case without the router's loss, which is not linear in tokens: ours, one by one."""
    case = case._replace(config=dataclasses.replace(case.config, router_aux_loss_coef=0.0))
    expected = {k: v for k, v in case.expected.items() if k.endswith("logits")}
    for s in range(len(case.samples)):
        batch = pack(case.config, case.samples, (s,))
        weights = loss_weights(jnp.asarray(batch.targets[None]), "tokens")[0]
        _, loss, grads = run(graph_of(case, remat="none"), case.params, batch, weights)
        expected[f"{s}.loss"] = np.array([loss])
        expected |= {f"{s}.grad.{k}": g for k, g in hf_tensors(case.config, grads).items()}
    return case._replace(expected=expected)


@pytest.mark.long
def test_packed_rows_equal_single_samples_in_every_order(case: Case):
    """Samples share text rows and windows share vision rows; nothing may leak or move."""
    if case.config.router_aux_loss_coef:
        case = without_balance(case)
    graph = graph_of(case, remat="none")
    n = len(case.samples)
    longest = max(len(s.tokens) for s in case.samples)
    shapes = [{}, {"text_row": longest + 9, "vision_row": 52 if n > 1 else None}]
    mean_loss = np.mean([case.expected[f"{s}.loss"][0] for s in range(n)])
    mean_gradients: dict[str, np.ndarray] = {}
    for s in range(n):
        for name, g in expected_gradients(case, s).items():
            mean_gradients[name] = mean_gradients.get(name, 0) + g / n

    for order, shape in itertools.product(itertools.permutations(range(n)), shapes):
        if shape and shape["vision_row"] and case.config.vision.spatial_merge_size == 3:
            shape = {**shape, "vision_row": 54}
        batch = pack(case.config, case.samples, order, **shape)
        # Each sample's token mean, averaged over samples: the expected losses' own mean.
        weights = np.zeros(batch.targets.shape, np.float32)
        places = {}
        number = iter(order)
        for r in range(batch.tokens.shape[1]):
            for segment in range(1, batch.segment_ids[0, r].max() + 1):
                where = np.flatnonzero(batch.segment_ids[0, r] == segment)
                places[next(number)] = (r, where)
                supervised = where[batch.targets[0, r, where] >= 0]
                weights[0, r, supervised] = 1 / len(supervised) / n
        logits, loss, grads = run(graph, case.params, batch, weights)
        for s, (r, where) in places.items():
            error = np.abs(logits[r, where] - case.expected[f"{s}.logits"][0]).max()
            assert error < LOGITS, f"order {order}, sample {s}: {error:.1e}"
        assert abs(loss - mean_loss) < LOSS
        check_gradients(hf_tensors(case.config, grads), mean_gradients)


def test_a_leak_would_show(case: Case):
    """The packed test can fail: a shared segment changes logits by far more than its bound.

    The segment joins the samples, or the two windows if there is only one sample.
    """
    n = len(case.samples)
    batch = pack(case.config, case.samples, tuple(range(n)))
    leaking = batch.segment_ids if n > 1 else batch.vision[0].segment_ids
    assert leaking.max() > 1
    leaking[leaking > 0] = 1
    weights = loss_weights(jnp.asarray(batch.targets[None]), "tokens")[0]
    logits, _, _ = run(graph_of(case, remat="none"), case.params, batch, weights)
    last = case.expected[f"{n - 1}.logits"][0]
    assert np.abs(logits[0, -len(last) :] - last).max() > 100 * LOGITS


@pytest.mark.long
def test_bfloat16_stays_near_float32(case: Case):
    """A coarse check that the bfloat16 path computes the same thing."""
    graph = nnx.split(nnx.eval_shape(lambda: LlavaOnevision2(case.config, rngs=nnx.Rngs(0))))[0]
    batch = pack(case.config, case.samples, (0,))
    weights = loss_weights(jnp.asarray(batch.targets[None]), "tokens")[0]
    _, loss, _ = run(graph, case.params, batch, weights)
    assert abs(loss - case.expected["0.loss"][0]) < 0.05
