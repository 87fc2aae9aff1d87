"""The TPU's kernels in interpret mode, packed against unpacked, and the choice among kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.model.attention import (
    KERNELS,
    Segments,
    choose,
    first_working,
    plain,
    row_segments,
    splash,
    visited_blocks,
)


def inputs(rows: int, q: int, k: int, heads: int, kv_heads: int, size: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (rows, q, heads, size), (rows, k, kv_heads, size), (rows, k, kv_heads, size)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def ids(lengths: list[int], total: int) -> np.ndarray:
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(row, (0, total - len(row)))[None].astype(np.int32)


def check(qkv: list[jax.Array], segments: Segments) -> None:
    """Output and gradients equal those of the whole score matrix; padding gives zeros."""
    weights = jnp.cos(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)

    def run(attention, *qkv):
        out = attention(*qkv, segments)
        return jnp.sum(out * weights), out

    def both(attention):
        grad = jax.value_and_grad(run, argnums=(1, 2, 3), has_aux=True)
        (_, out), grads = grad(attention, *qkv)
        return [out, *grads]

    got = both(lambda *x: splash.attention(*x, interpret=True))
    padding = np.asarray(segments.q_ids) == 0
    assert not np.asarray(got[0])[padding].any()
    for a, b in zip(got, both(plain.attention), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_samples_and_padding_equal_the_whole_matrix(causal):
    """A row of three samples, one of a single sample, and one that is all padding."""
    rows = np.concatenate([ids([100, 130, 60], 384), ids([384], 384), ids([], 384)])
    check(inputs(3, 384, 384, 4, 2, 64), row_segments(jnp.asarray(rows), causal=causal))


def test_lengths_that_no_lane_divides():
    check(
        inputs(1, 150, 150, 2, 2, 128), row_segments(jnp.asarray(ids([70, 60], 150)), causal=True)
    )


@pytest.mark.long
def test_queries_of_a_context_shard():
    """Pieces 1 and 6 of 8, as a device of four has them, against the keys of the whole row."""
    places = np.concatenate([np.arange(128, 256), np.arange(768, 896)])
    row = ids([100, 500, 300], 1024)
    segments = Segments(jnp.asarray(row[:, places]), jnp.asarray(row), jnp.asarray(places))
    check(inputs(1, 256, 1024, 4, 2, 64), segments)


def test_packed_equals_each_sample_alone():
    lengths = [100, 130, 60]
    qkv = inputs(1, 384, 384, 4, 2, 64)
    packed = splash.attention(
        *qkv, row_segments(jnp.asarray(ids(lengths, 384)), causal=True), interpret=True
    )
    start = 0
    for n in lengths:
        one = [x[:, start : start + n] for x in qkv]
        alone = splash.attention(
            *one, row_segments(jnp.ones((1, n), jnp.int32), causal=True), interpret=True
        )
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=2e-6)
        start += n


def test_only_blocks_with_a_pair_are_visited():
    segments = row_segments(jnp.asarray(ids([512, 512, 700], 2048)), causal=False)
    visited = np.asarray(visited_blocks(segments, 512, 512))[0]
    want = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    np.testing.assert_array_equal(visited, want)
    causal = visited_blocks(row_segments(segments.k_ids, causal=True), 512, 512)[0]
    np.testing.assert_array_equal(causal, np.tril(want))


def mixed_rows() -> np.ndarray:
    """Vision rows of 4096: thumbnails, pictures of several sizes, documents, windows of clips."""
    rows = [[3136, 900], [3136, 256, 256, 256], [3996], [1024] * 4, [576] * 7, [2204, 1876]]
    rows += [[256] * 16, [144] * 28, [3136, 720], [1600, 1600, 768]]
    return np.concatenate([ids(row, 4096) for row in rows])


def rows_of_pictures() -> np.ndarray:
    """Rows of 4096 that hold only pictures, of 8x8 to 22x22 patches."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(8):
        sizes = []
        while sum(sizes) + 484 <= 4096:
            sizes.append(int(rng.integers(4, 12)) ** 2 * 4)
        rows.append(ids(sizes, 4096))
    return np.concatenate(rows)


def costs(rows: np.ndarray) -> dict[str, float]:
    """Scores that each kernel computes for an encoder's rows, over the sum of squared windows."""
    segments = row_segments(jnp.asarray(rows), causal=False)
    windows = sum(int((np.bincount(row)[1:].astype(np.int64) ** 2).sum()) for row in rows)
    cost = {
        "splash": int(KERNELS["splash"].computed_scores(segments).sum()),
        "triton": max(
            KERNELS["triton"].computed_scores(segments, 64, jnp.dtype("bfloat16")).values()
        ),
        "xla": int(KERNELS["xla"].computed_scores(segments).sum()),
        "whole rows": rows.shape[0] * rows.shape[1] ** 2,
    }
    ratios = {name: round(scores / windows, 2) for name, scores in cost.items()}
    print(ratios)
    return ratios


def test_encoder_attention_costs_at_most_twice_the_windows():
    ratios = costs(mixed_rows())
    assert ratios.pop("whole rows") > 2.4
    assert all(1 <= ratio <= 2 for ratio in ratios.values())


def test_rows_of_pictures_alone_cost_a_part_of_their_square():
    """Blocks of 512 are large for such windows: Splash computes more than twice their squares."""
    ratios = costs(rows_of_pictures())
    assert ratios["whole rows"] > 10
    assert ratios["triton"] < 2 and ratios["xla"] < 3 and ratios["splash"] < 5


def test_the_first_kernel_that_runs_is_chosen():
    order = tuple(KERNELS)
    assert [choose(order, p) for p in ("tpu", "gpu", "cpu")] == ["splash", "triton", "xla"]
    assert choose(("xla", "splash"), "tpu") == "xla"
    with pytest.raises(ConfigError, match=r"\('splash',\) has nothing that runs on a cpu"):
        choose(("splash",), "cpu")
    with pytest.raises(ConfigError, match="must list some of splash, triton, xla"):
        ComputeConfig(attention=("flash",))


def test_a_kernel_that_fails_or_is_wrong_is_passed_over(monkeypatch):
    """A GPU kernel of another stack once ignored segments."""

    def leaking(q, k, v, segments):
        whole = row_segments(jnp.ones_like(segments.k_ids), causal=True)
        return plain.attention(q, k, v, whole)

    def broken(q, k, v, segments):
        raise NotImplementedError("no such instruction")

    for name, attention in (("splash", leaking), ("triton", broken)):
        kernel = KERNELS[name]._replace(attention=attention, platforms=("cpu",))
        monkeypatch.setitem(KERNELS, name, kernel)
    name, notes = first_working(("splash", "triton", "xla"))
    assert name == "xla" and len(notes) == 2
    assert "splash is not used: its results are off" in notes[0]
    assert "triton is not used: NotImplementedError: no such instruction" in notes[1]
