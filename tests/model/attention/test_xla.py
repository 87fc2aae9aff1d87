"""The blockwise XLA attention against plain softmax attention under the whole mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov2_jax.model.attention import Segments, masked_attention, row_segments, visible, xla
from ov2_jax.model.attention.xla import attention, computed_scores

FORWARD, BACKWARD = 2e-6, 2e-5


def segments_of(lengths: list[list[int]], total: int) -> jnp.ndarray:
    """Rows of segments of these lengths, then padding."""
    ids = np.zeros((len(lengths), total), np.int32)
    for row, wanted in zip(ids, lengths, strict=True):
        row[: sum(wanted)] = np.repeat(np.arange(1, len(wanted) + 1), wanted)
    return jnp.asarray(ids)


def inputs(b: int, n_q: int, n_k: int, heads: int, groups: int, size: int = 16) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (b, n_q, heads, size), (b, n_k, groups, size), (b, n_k, groups, size)
    shapes += ((b, n_q, heads, size),)
    return [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]


def with_gradients(f, q, k, v, d_out) -> tuple:
    """Output, and gradients of q, k and v for the given gradient of the output."""

    @jax.jit
    def run(*qkv):
        out, pull = jax.vjp(f, *qkv)
        return out, *pull(d_out.astype(out.dtype))

    return run(q, k, v)


def plain(segments: Segments):
    """masked_attention; queries that see nothing give zeros."""
    mask = visible(segments)

    def run(q, k, v):
        return jnp.where(mask.any(-1)[..., None, None], masked_attention(q, k, v, mask), 0)

    return run


def check(segments: Segments, heads: int, groups: int, block_q: int, block_k: int) -> None:
    (b, n_q), n_k = segments.q_ids.shape, segments.k_ids.shape[1]
    arrays = inputs(b, n_q, n_k, heads, groups)
    ours = functools.partial(attention, segments=segments, block_q=block_q, block_k=block_k)
    found = with_gradients(ours, *arrays)
    expected = with_gradients(plain(segments), *arrays)
    for x, y, tolerance in zip(found, expected, (FORWARD, *[BACKWARD] * 3), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)
    padding = np.asarray(segments.q_ids) == 0
    assert not np.asarray(found[0])[padding].any() and not np.asarray(found[1])[padding].any()


@pytest.mark.long
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("block_q, block_k", [(512, 512), (32, 64), (64, 32)])
def test_equals_plain_attention(causal: bool, groups: int, block_q: int, block_k: int) -> None:
    # 149 tokens: no block divides them; the last row is all padding.
    ids = segments_of([[40, 3, 70], [149], [64, 64], []], 149)
    check(row_segments(ids, causal=causal), 4, groups, block_q, block_k)


@pytest.mark.long
def test_ids_in_any_order() -> None:
    ids = jax.random.randint(jax.random.key(3), (2, 130), 0, 5)
    check(row_segments(ids, causal=False), 2, 2, 32, 32)
    check(row_segments(ids, causal=True), 2, 1, 32, 32)


@pytest.mark.long
def test_queries_anywhere_among_more_keys() -> None:
    k_ids = segments_of([[90, 30], [20, 100]], 130)
    # The queries of a context shard (the first and the last eighth of a row), and random ones.
    for index in (
        np.r_[0:16, 114:130],
        np.random.default_rng(0).permutation(130)[:45],
    ):
        check(Segments(k_ids[:, index], k_ids, jnp.asarray(index, jnp.int32)), 4, 2, 32, 32)
    check(Segments(k_ids[:, :33], k_ids, None), 4, 2, 32, 64)


def test_packed_equals_unpacked() -> None:
    lengths = [37, 64, 20]
    q, k, v, d_out = inputs(1, 130, 130, 4, 2)
    for causal in (False, True):
        f = functools.partial(attention, block_q=32, block_k=32)
        packed = functools.partial(
            f, segments=row_segments(segments_of([lengths], 130), causal=causal)
        )
        found = with_gradients(packed, q, k, v, d_out)
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            alone = functools.partial(
                f, segments=row_segments(jnp.ones((1, n), jnp.int32), causal=causal)
            )
            expected = with_gradients(alone, *(x[:, part] for x in (q, k, v, d_out)))
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_allclose(x[:, part], y, rtol=0, atol=BACKWARD)
            start += n


@pytest.mark.long
def test_bfloat16_is_as_close_as_plain_bfloat16() -> None:
    segments = row_segments(segments_of([[90, 30]], 128), causal=True)
    arrays = inputs(1, 128, 128, 4, 2)
    exact = with_gradients(plain(segments), *arrays)
    arrays = [x.astype(jnp.bfloat16) for x in arrays]
    blockwise = functools.partial(attention, segments=segments, block_q=64, block_k=64)
    ours, theirs = (with_gradients(f, *arrays) for f in (blockwise, plain(segments)))
    for x, y, z in zip(exact, ours, theirs, strict=True):
        assert y.dtype == jnp.bfloat16
        error, bound = (float(jnp.abs(x - w.astype(jnp.float32)).max()) for w in (y, z))
        assert error <= 1.5 * bound + 1e-3


@pytest.mark.long
def test_under_scan_checkpoint_and_shard_map() -> None:
    segments = row_segments(segments_of([[40, 30], [70]], 80), causal=True)
    q, k, v, d_out = inputs(2, 80, 80, 4, 2)
    saved = jax.checkpoint_policies.save_only_these_names("attention")

    def layers(attend):
        @functools.partial(jax.checkpoint, policy=saved)
        def layer(x, _):
            return x + attend(x, k, v, segments), None

        return lambda q, k, v: jax.lax.scan(layer, q, None, length=2)[0]

    attend = functools.partial(attention, block_q=32, block_k=32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    index = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(rows, rows, rows, Segments(rows, rows, index)),
        out_specs=rows,
        check_vma=False,
    )
    expected = with_gradients(layers(lambda q, k, v, s: plain(s)(q, k, v)), q, k, v, d_out)
    for f in (attend, mapped):
        for x, y in zip(with_gradients(layers(f), q, k, v, d_out), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-5)


def test_remat_policy_saves_the_output_and_runs_no_second_forward() -> None:
    segments = row_segments(jnp.ones((1, 64), jnp.int32), causal=False)
    q, k, v, _ = inputs(1, 64, 64, 2, 2)

    def exponentials(policy) -> int:
        f = jax.checkpoint(lambda q: attention(q, k, v, segments).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(f))(q)).count(" exp ")

    # Forward 2 (weights, rescaling), backward 1; again in the backward pass without the policy.
    assert exponentials(None) == 5
    assert exponentials(jax.checkpoint_policies.save_only_these_names("attention")) == 3


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_without_a_pair_are_skipped(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not show which blocks are skipped, so the values there are NaN: a block that
    is not skipped spoils the result, because NaN times a weight of 0 is NaN."""
    ids = segments_of([[128, 128, 64]], 384)  # 6 blocks of 64, the last one padding
    segments = row_segments(ids, causal=causal)
    blocks = 3 + 3 + 1 if causal else 4 + 4 + 1
    scores = computed_scores(segments, block_q=64, block_k=64)
    assert scores.tolist() == [blocks * 64 * 64]

    q, k, v, d_out = inputs(1, 384, 384, 2, 1)
    v = v.at[:, 128:].set(jnp.nan)
    f = functools.partial(attention, segments=segments, block_q=64, block_k=64)
    out, dq, dk, _ = (x[:, :128] for x in with_gradients(f, q, k, v, d_out.at[:, 128:].set(0)))
    assert all(np.isfinite(x).all() for x in (out, dq, dk))

    everything = lambda s, block_q, block_k: jnp.ones(  # noqa: E731
        (1, s.q_ids.shape[1] // block_q, s.k_ids.shape[1] // block_k), bool
    )
    monkeypatch.setattr(xla, "visited_blocks", everything)
    out = f(q, k, v)[:, :128]
    assert np.isnan(out).any()  # so the check above can fail


def test_cost_of_a_mixed_batch_of_windows() -> None:
    """Small pictures, a document, video windows: at most twice the sum of squared windows."""
    windows = [[3136, 960], [256, 256, 384, 240, 1200, 576, 1024], [3136, 784], [2304, 1600]]
    segments = row_segments(segments_of(windows, 4096), causal=False)
    needed = sum(w * w for row in windows for w in row)
    assert needed <= int(computed_scores(segments).sum()) <= 2 * needed


def test_memory_is_linear_in_length() -> None:
    def temporaries(length: int) -> int:
        array = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, ids):
            out = attention(q, k, v, row_segments(ids, causal=True), block_q=128, block_k=128)
            return out.sum()

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        compiled = step.lower(array, array, array, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, four = temporaries(4096), temporaries(16384)
    assert four < 4.5 * one
