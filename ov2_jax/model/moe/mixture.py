"""Mixture of experts as in Qwen3-MoE: a float32 router, and experts as grouped matmuls.

`tokens` are the tokens of an expert group: B*L of a device, times the devices of the group. A slot
is a token and one of its experts: S = tokens * X.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from ov2_jax.config.model import TextConfig
from ov2_jax.model.layers.linear import Linear
from ov2_jax.model.moe.grouped import grouped_matmul
from ov2_jax.sharding.exchange import axis_index, gather, scatter_sum


class RouterLoad(NamedTuple):
    """How a router spread the real tokens over experts; sums, so layers and devices add up.

    Of one layer, or with leading axes such as N for all layers.
    """

    assigned: Float32[Array, "*any E"]  # tokens that went to each expert
    probability: Float32[Array, "*any E"]  # sum of its softmax over tokens
    tokens: Float32[Array, "*any"]


def load_balancing_loss(load: RouterLoad) -> Float32[Array, ""]:
    """E * sum over experts of f_e P_e; it is X if the load is even.

    f_e: assignments to expert e / tokens, P_e: mean probability of e, both over the real tokens of
    all layers together, as in transformers' `load_balancing_loss_func` (the load-balancing loss of
    the Switch Transformer, https://arxiv.org/abs/2101.03961).
    """
    experts = load.assigned.shape[-1]
    assigned, probability = (x.reshape(-1, experts).sum(0) for x in load[:2])
    tokens = jnp.maximum(load.tokens.sum(), 1)
    return experts * jnp.sum(assigned * probability) / tokens**2


def load_metrics(load: RouterLoad) -> dict[str, Shaped[Array, ""]]:
    """How evenly layers use their experts: fullest over mean, and how many got no token."""
    mean = load.assigned.mean(-1, keepdims=True)
    return {
        "moe/max_load": jnp.max(load.assigned / jnp.maximum(mean, 1e-9)),
        "moe/dead_experts": jnp.sum(load.assigned == 0),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(
    x: Float[Array, "tokens D"], order: Int[Array, " S"], inverse: Int[Array, " S"], n: int
) -> Float[Array, "S D"]:
    """Rows of x, each of them n times, in `order`, a permutation of S = tokens * n.

    The gradient is a gather by the inverse permutation and a sum over n. JAX's own would be a
    scatter-add, slow on a TPU and, in bfloat16, rounded at each of its additions.
    """
    del inverse
    return x[order // n]


def _take_forward(
    x: Float[Array, "tokens D"], order: Int[Array, " S"], inverse: Int[Array, " S"], n: int
) -> tuple[Float[Array, "S D"], Int[Array, " S"]]:
    return _take(x, order, inverse, n), inverse


def _take_backward(
    n: int, inverse: Int[Array, " S"], gradient: Float[Array, "S D"]
) -> tuple[Float[Array, "tokens D"], None, None]:
    return gradient[inverse].reshape(-1, n, gradient.shape[-1]).sum(1), None, None


_take.defvjp(_take_forward, _take_backward)


class ExpertLinear(nnx.Module):
    """One kernel for each expert: [E I O]."""

    def __init__(self, experts: int, n_in: int, n_out: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (experts, n_in, n_out)))


class Experts(nnx.Module):
    """SwiGLU MLPs, side by side."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs) -> None:
        linear = functools.partial(
            ExpertLinear, config.num_experts, std=config.initializer_range, rngs=rngs
        )
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = linear(width, hidden)
        self.up_proj = linear(width, hidden)
        self.down_proj = linear(hidden, width)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        chosen: Int[Array, "B L X"],
        weights: Float32[Array, "B L X"],
    ) -> Float[Array, "B L D"]:
        """The weighted sum of each token's chosen experts.

        Over the expert and tensor axes a device has a part of the experts, or of their hidden
        units. It takes the tokens of its whole group and gives back summands. For up to X devices
        that moves fewer bytes than sending each token to its X experts, and needs no memory for a
        load that is not known beforehand: no token is ever dropped.
        """
        kernels = {
            name: getattr(self, name).kernel[...].astype(x.dtype)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tokens, group = x.shape[:2], ("expert", "tensor")
        x, chosen, weights = (
            gather(y.reshape(-1, y.shape[-1]), group, 0) for y in (x, chosen, weights)
        )
        chosen = chosen - axis_index("expert") * len(kernels["gate_proj"])
        return scatter_sum(mixture(x, chosen, weights, **kernels), group, 0).reshape(*tokens, -1)


def mixture(
    x: Float[Array, "tokens D"],
    chosen: Int[Array, "tokens X"],
    weights: Float32[Array, "tokens X"],
    *,
    gate_proj: Float[Array, "E D F"],
    up_proj: Float[Array, "E D F"],
    down_proj: Float[Array, "E F D"],
) -> Float[Array, "tokens D"]:
    """Weighted sum, in x's dtype, over each token's chosen experts, of those that this device has.

    `chosen` counts from this device's first expert; a number outside 0 to E - 1 is an expert of
    another device. Slots are sorted by expert, so each expert's tokens are a run of rows and the
    three matmuls are grouped ones over runs of any length: every token gets all its experts under
    any load.
    """
    experts = len(gate_proj)
    here = (chosen >= 0) & (chosen < experts)
    chosen = jnp.where(here, chosen, experts).reshape(-1)  # the others come last
    order = jnp.argsort(chosen, stable=True)  # S
    inverse = jnp.argsort(order)
    sizes = jnp.sum(chosen[:, None] == jnp.arange(experts), 0, dtype=jnp.int32)
    # Rows behind the last group hold arbitrary values, here and in the gradient.
    ours = (jnp.arange(len(order)) < sizes.sum())[:, None]
    rows = jnp.where(ours, _take(x, order, inverse, weights.shape[-1]), 0)  # S D
    hidden = jax.nn.silu(grouped_matmul(rows, gate_proj, sizes))
    hidden = jnp.where(ours, hidden * grouped_matmul(rows, up_proj, sizes), 0)  # S F
    out = jnp.where(ours, grouped_matmul(hidden, down_proj, sizes), 0)
    out = (
        _take(out, inverse, order, 1).reshape(*weights.shape, -1).astype(jnp.float32)
    )  # tokens X D
    return jnp.sum(out * weights[..., None], -2).astype(x.dtype)


class MixtureOfExperts(nnx.Module):
    """Replaces a dense MLP: the router (`gate`) sends every token to X of E experts."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs) -> None:
        self.per_token = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.gate = Linear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            std=config.initializer_range,
            rngs=rngs,
        )
        self.experts = Experts(config, rngs)

    def __call__(
        self, x: Float[Array, "B L D"], real: Bool[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], RouterLoad]:
        """The experts' output for every token, and the load of the `real` ones.

        The router is float32 for every dtype of x: near a tie bfloat16 would choose other experts.
        """
        with jax.default_matmul_precision("highest"):
            probabilities = jax.nn.softmax(self.gate(x.astype(jnp.float32)))  # B L E
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), self.per_token)
        hits = chosen[..., None] == jnp.arange(probabilities.shape[-1])  # B L X E
        # Not top_k's own values: their gradient is a scatter.
        weights = jnp.sum(jnp.where(hits, probabilities[..., None, :], 0), -1)  # B L X
        if self.normalise:
            weights = weights / weights.sum(-1, keepdims=True)
        counted = real.astype(jnp.float32)[..., None]  # B L 1
        load = RouterLoad(
            jnp.sum(counted * hits.sum(-2), (0, 1)),
            jnp.sum(counted * probabilities, (0, 1)),
            counted.sum(),
        )
        return self.experts(x, chosen, weights), load
