"""The GPU kernels of attention: their results in interpret mode, their Triton code for CUDA."""

import functools
import importlib.util

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from ov2_jax.model.attention import triton
from ov2_jax.model.attention.blocks import Segments, row_segments, visible
from ov2_jax.model.attention.plain import masked_attention

FLOAT32 = 1e-5  # largest error; values and gradients are of order 1
BFLOAT16 = 1e-2  # of a value, or of 1 if it is smaller: 2.6 times bfloat16's rounding, 2**-8


def packed(*lengths: int, total: int, ids: tuple[int, ...] | None = None) -> jax.Array:
    """One row of segment ids [1 total], padding at the end."""
    ids = ids or tuple(range(1, len(lengths) + 1))
    row = np.repeat(ids, lengths)
    return jnp.asarray(np.pad(row, (0, total - len(row)))[None], jnp.int32)


def arrays(segments: Segments, heads: int, groups: int, size: int, dtype=jnp.float32):
    """q, k, v and a gradient of the output."""
    random = np.random.default_rng(0)
    batch, n_q = segments.q_ids.shape
    n_k = segments.k_ids.shape[1]
    shapes = [(n_q, heads), (n_k, groups), (n_k, groups), (n_q, heads)]
    return [jnp.asarray(random.normal(size=(batch, *s, size)), dtype) for s in shapes]


def ours(q, k, v, segments: Segments) -> jax.Array:
    return triton.attention(q, k, v, segments, interpret=True)


def plain(q, k, v, segments: Segments) -> jax.Array:
    mask = visible(segments)
    return jnp.where(mask.any(-1)[..., None, None], masked_attention(q, k, v, mask), 0)


def value_and_gradients(attend, segments, q, k, v, d_out) -> list[np.ndarray]:
    """Output and gradients of q, k and v."""
    return [np.asarray(x, np.float32) for x in _run(attend, segments, q, k, v, d_out)]


@functools.partial(jax.jit, static_argnums=0)
def _run(attend, segments, q, k, v, d_out):
    out, pull = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
    return out, *pull(d_out)


def errors(got, want) -> list[float]:
    return [float(np.abs(g - w).max()) for g, w in zip(got, want, strict=True)]


ROWS = {
    "windows": row_segments(packed(37, 150, 16, 129, total=401), causal=False),
    "one window": row_segments(packed(401, total=401), causal=False),
    "ids that come back": row_segments(
        packed(140, 130, 100, total=401, ids=(2, 1, 2)), causal=False
    ),
    "samples": row_segments(packed(5, 200, 90, total=401), causal=True),
    "one sample": row_segments(packed(401, total=401), causal=True),
    "two rows": row_segments(
        jnp.concatenate([packed(260, total=260), packed(3, 100, total=260)]), causal=True
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("name", ROWS)
def test_as_plain_attention(name, size):
    heads, groups = {64: (2, 2), 80: (1, 1), 128: (6, 2)}[size]
    inputs = arrays(ROWS[name], heads, groups, size)
    got = value_and_gradients(ours, ROWS[name], *inputs)
    want = value_and_gradients(plain, ROWS[name], *inputs)
    assert max(errors(got, want)) < FLOAT32


@pytest.mark.parametrize("ranks", [(0, 7), (2, 5), (6, 1)])
def test_queries_of_some_places_against_all_keys(ranks):
    """As under context parallelism: two chunks of eight, and no sample starts in either."""
    k_ids = packed(150, 700, 170, total=1040)
    chunk = 1040 // 8
    index = jnp.concatenate([jnp.arange(r * chunk, (r + 1) * chunk) for r in ranks])
    index = index.astype(jnp.int32)
    segments = Segments(k_ids[:, index], k_ids, index)
    inputs = arrays(segments, 2, 1, 64)
    got = value_and_gradients(ours, segments, *inputs)
    assert max(errors(got, value_and_gradients(plain, segments, *inputs))) < FLOAT32


def test_queries_in_any_order():
    k_ids = packed(90, 200, total=300)
    index = jnp.asarray(np.random.default_rng(1).permutation(300), jnp.int32)
    segments = Segments(k_ids[:, index], k_ids, index)
    inputs = arrays(segments, 2, 2, 64)
    got = value_and_gradients(ours, segments, *inputs)
    assert max(errors(got, value_and_gradients(plain, segments, *inputs))) < FLOAT32


@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_unpacked(causal):
    lengths = (70, 129, 201, 1)
    together = row_segments(packed(*lengths, total=401), causal=causal)
    inputs = arrays(together, 2, 1, 64)
    got = value_and_gradients(ours, together, *inputs)
    start = 0
    for n in lengths:
        alone = row_segments(packed(n, total=401), causal=causal)
        own = [jnp.roll(x, -start, 1) for x in inputs]  # in a row alone, from its start
        want = value_and_gradients(ours, alone, *own)
        assert max(errors([x[:, start : start + n] for x in got], [x[:, :n] for x in want])) < (
            FLOAT32
        )
        start += n


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_zero(causal):
    ids = jnp.concatenate([packed(100, total=300), packed(total=300)])
    segments = row_segments(ids, causal=causal)
    for x in value_and_gradients(ours, segments, *arrays(segments, 2, 1, 64)):
        assert np.isfinite(x).all()
        assert np.abs(x[0, :100]).max() > 0
        assert np.abs(x[0, 100:]).max() == 0
        assert np.abs(x[1]).max() == 0


@pytest.mark.parametrize(("size", "causal"), [(64, False), (128, True)])
def test_bfloat16(size, causal):
    """Queries 187 to 255 share a block with keys that they do not see."""
    segments = row_segments(packed(37, 150, 100, total=300), causal=causal)
    inputs = arrays(segments, 4, 2, size, jnp.bfloat16)
    got = triton.attention(*inputs[:3], segments, interpret=True)
    assert got.dtype == jnp.bfloat16
    got = value_and_gradients(ours, segments, *inputs)
    inputs = [x.astype(jnp.float32) for x in inputs]
    want = value_and_gradients(plain, segments, *inputs)
    for g, w in zip(got, want, strict=True):
        assert (np.abs(g - w) <= BFLOAT16 * np.maximum(1, np.abs(w))).all()


def test_blocks_of_other_segments_are_not_touched():
    """A kernel multiplies every block that it visits, and 0 x NaN is NaN."""
    segments = row_segments(packed(256, 256, 256, total=768), causal=False)
    q, k, v, d_out = arrays(segments, 1, 1, 64)
    spoiled = [x.at[:, 512:].set(jnp.nan) for x in (q, k, v, d_out)]
    for got, want in zip(
        value_and_gradients(ours, segments, *spoiled),
        value_and_gradients(ours, segments, q, k, v, d_out),
        strict=True,
    ):
        np.testing.assert_array_equal(got[:, :512], want[:, :512])
        assert np.isnan(got[:, 512:]).all()


def test_many_windows_cost_their_sum():
    windows = [256] * 8 + [1024] + [3136] + [1952]
    row = row_segments(packed(*windows, total=8192), causal=False)
    true = sum(n * n for n in windows)
    for entries in triton.computed_scores(row, 64, jnp.dtype("bfloat16")).values():
        assert true <= entries < 1.15 * true
    samples = row_segments(packed(*windows, total=8192), causal=True)
    for entries in triton.computed_scores(samples, 128, jnp.dtype("bfloat16")).values():
        assert true / 2 < entries < 1.15 * true / 2


def test_remat_can_keep_the_result(capsys):
    """Output and logsumexp are kept by name, so the backward pass needs no forward kernel."""
    segments = row_segments(packed(128, total=128), causal=True)
    q, k, v, _ = arrays(segments, 2, 1, 64)
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    attend = jax.checkpoint(lambda *x: (ours(*x, segments) ** 2).sum(), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(attend, q, k, v)
    kept = [x for x in capsys.readouterr().out.splitlines() if "attention" in x]
    assert [x.split()[0] for x in kept] == ["f32[1,128,2,64]", "f32[1,2,128]"]


def test_head_sizes_and_head_counts_that_are_refused():
    segments = row_segments(packed(16, total=16), causal=False)
    q, k, v, _ = arrays(segments, 2, 2, 256)
    with pytest.raises(ValueError, match="head size 256 is more than the Triton kernels' 128"):
        triton.attention(q, k, v, segments)
    q, k, v, _ = arrays(segments, 3, 2, 64)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key/value heads"):
        triton.attention(q, k, v, segments)


@pytest.mark.skipif(
    jaxlib.version.__version_info__ > (0, 10, 2)
    and not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="from jaxlib 0.10.3 on, lowering compiles the kernels with the CUDA plugin's Triton",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("size", "causal"), [(64, False), (128, True), (72, True)])
def test_lowers_for_cuda(size, causal, dtype):
    """Every operation of the kernels has a Triton form; no GPU is needed to check that."""

    def run(q, k, v, ids):
        segments = row_segments(ids, causal=causal)
        out, pull = jax.vjp(lambda *x: triton.attention(*x, segments), q, k, v)
        return out, pull(out)

    q = jax.ShapeDtypeStruct((2, 1000, 4, size), dtype)
    k = jax.ShapeDtypeStruct((2, 1000, 2, size), dtype)
    ids = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    program = jax.jit(run).trace(q, k, k, ids).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("forward", "dq", "dkv"):
        assert f'name = "segment_attention_{name}"' in program
