"""Attention backends side by side, forward and backward, on packed rows.

    python -m benchmarks.attention [--shape=encoder,decoder] [--backends=triton,xla] [--turns=10]

Runs on the present device every backend that can run there; shapes without --shape: those for a GPU
or TPU (bfloat16), or on a CPU the small ones (float32). One line a backend and shape:

- seconds of the forward pass, and of forward and backward together, the median of --turns calls;
- TFLOP/s by true windows: 4 D multiplications and additions for each visible pair and head
  forward, 14 D forward and backward (two and seven matmuls, FlashAttention-2's count);
- scores computed over those that are visible, forward and backward: what packing costs a kernel;
- the largest difference from the first backend that ran, output and gradients, as a share of the
  largest value. Above the tolerance the program ends with an error.

`mha` is JAX's own Triton kernel, with keys and values repeated for grouped queries; it computes all
blocks of a row. `plain` holds all scores at once and is left out where they take over 16 GiB.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention as pallas_mha

from ov2_jax.model.attention import plain, splash, triton, xla
from ov2_jax.model.attention.blocks import Segments, row_segments, visible, visited_blocks

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
PLAIN_BYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of samples or windows, by length; what is left of a row is padding."""

    length: int
    rows: tuple[tuple[int, ...], ...]
    heads: int
    groups: int
    size: int
    causal: bool
    dtype: str

    def segments(self) -> Segments:
        ids = np.zeros((len(self.rows), self.length), np.int32)
        for row, windows in zip(ids, self.rows, strict=True):
            row[: sum(windows)] = np.repeat(np.arange(1, len(windows) + 1), windows)
        return row_segments(jnp.asarray(ids), causal=self.causal)

    def visible(self) -> int:
        """Pairs of a head that see each other."""
        windows = [n for row in self.rows for n in row]
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in windows)


# Four frames of 392 px are 3136 patches, a picture of 224 px 256, a page up to 4096.
_MIX = (
    (3136, 256, 256, 196, 144, 100),
    (4032,),
    (256,) * 16,
    (2116, 1024, 576, 256, 100),
    (3136, 784, 156),
    (1600, 1296, 900, 256),
    (784,) * 5,
    (576, 400, 324, 256, 196, 144) * 2,
)
SHAPES = {
    "encoder": Shape(4096, _MIX, 16, 16, 64, False, "bfloat16"),
    "decoder": Shape(
        8192, ((3000, 1700, 1200, 900, 700, 400, 192, 80),), 32, 8, 128, True, "bfloat16"
    ),
    "decoder_long": Shape(
        32768, ((12000, 8000, 5000, 3000, 2000, 1500, 800, 400),), 32, 8, 128, True, "bfloat16"
    ),
    "encoder_small": Shape(
        1024, ((784, 196, 36), (256, 256, 256, 196), (1008,)), 4, 4, 64, False, "float32"
    ),
    "decoder_small": Shape(1024, ((400, 300, 150, 100, 50),), 4, 2, 128, True, "float32"),
}


@dataclasses.dataclass(frozen=True)
class Backend:
    attention: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    computed: Callable[[Segments, Shape], tuple[int, int]]  # scores of a head: forward, backward


def _mha(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, 2) for x in (k, v))
    causal = segments.q_index is not None
    out = pallas_mha.mha(q, k, v, segments.q_ids, sm_scale=q.shape[-1] ** -0.5, causal=causal)
    return jnp.where(segments.q_ids[..., None, None] > 0, out, 0)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    out = plain.masked_attention(q, k, v, visible(segments))
    return jnp.where(segments.q_ids[..., None, None] > 0, out, 0)


def _computed_triton(segments: Segments, shape: Shape) -> tuple[int, int]:
    """The backward pass as its seven matmuls go: three in dq, four in dkv."""
    counts = triton.computed_scores(segments, shape.size, shape.dtype)
    return counts["forward"], (3 * counts["dq"] + 4 * counts["dkv"]) // 7


def _computed_splash(segments: Segments, shape: Shape) -> tuple[int, int]:
    block = splash.block_size(shape.length)
    blocks = int(np.asarray(visited_blocks(segments, block, block)).sum(dtype=np.int64))
    return blocks * block**2, blocks * block**2


def _computed_xla(segments: Segments, shape: Shape) -> tuple[int, int]:
    scores = int(np.asarray(xla.computed_scores(segments)).sum(dtype=np.int64))
    return scores, scores


def _computed_mha(segments: Segments, shape: Shape) -> tuple[int, int]:
    """Blocks of 128 forward and 32 backward; up to the diagonal where attention is causal."""

    def scores(block: int) -> int:
        blocks = shape.length // block
        each = blocks * (blocks + 1) // 2 if shape.causal else blocks**2
        return len(shape.rows) * each * block**2

    return scores(128), scores(32)


def _computed_plain(segments: Segments, shape: Shape) -> tuple[int, int]:
    scores = len(shape.rows) * shape.length**2
    return scores, scores


BACKENDS = {
    "splash": Backend(splash.attention, ("tpu",), _computed_splash),
    "triton": Backend(triton.attention, ("gpu",), _computed_triton),
    "mha": Backend(_mha, ("gpu",), _computed_mha),
    "xla": Backend(xla.attention, ("tpu", "gpu", "cpu"), _computed_xla),
    "plain": Backend(_plain, ("tpu", "gpu", "cpu"), _computed_plain),
}


def inputs(shape: Shape) -> tuple[jax.Array, ...]:
    """q, k, v and the output's gradient."""
    random = np.random.default_rng(0)
    counts = (shape.heads, shape.groups, shape.groups, shape.heads)
    sizes = ((len(shape.rows), shape.length, n, shape.size) for n in counts)
    return tuple(jnp.asarray(random.standard_normal(s, np.float32), shape.dtype) for s in sizes)


def seconds(run: Callable, args: tuple, turns: int) -> float:
    """Median of calls, each waited for; the first two, with compilation, apart."""
    taken = []
    for _ in range(turns + 2):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def measure(name: str, shape: Shape, turns: int) -> tuple[str, list[np.ndarray]]:
    """One line of figures, and (output, gradients of q, k, v)."""
    backend, segments = BACKENDS[name], shape.segments()

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
        return backend.attention(q, k, v, segments)

    def both(
        q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, segments: Segments
    ) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *x: backend.attention(*x, segments), q, k, v)
        return out, *pull(d_out)

    forward, both = jax.jit(forward), jax.jit(both)
    q, k, v, d_out = inputs(shape)
    start = time.perf_counter()
    results = jax.block_until_ready(both(q, k, v, d_out, segments))
    compiled = time.perf_counter() - start
    one = seconds(forward, (q, k, v, segments), turns)
    all_ = seconds(both, (q, k, v, d_out, segments), turns)
    flops = shape.visible() * shape.heads * shape.size
    ahead, back = (n / shape.visible() for n in backend.computed(segments, shape))
    line = (
        f"forward {one:.5f} s {4e-12 * flops / one:7.2f} TFLOP/s   "
        f"with backward {all_:.5f} s {14e-12 * flops / all_:7.2f} TFLOP/s   "
        f"computed/visible {ahead:.2f} {back:.2f}   first call {compiled:.1f} s"
    )
    return line, [np.asarray(x, np.float32) for x in results]


def difference(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """Largest error of output and gradients, each as a share of its largest value."""
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


def run_shape(name: str, backends: list[str], turns: int) -> bool:
    """Prints the shape's lines; whether all agree."""
    shape, platform = SHAPES[name], jax.default_backend()
    print(f"{name}: {len(shape.rows)} x {shape.length}, {shape.visible() / 1e6:.1f} M pairs a head")
    first, agree = None, True
    for backend in backends:
        if platform not in BACKENDS[backend].platforms:
            print(f"  {backend:7} does not run on a {platform}")
            continue
        held = 4 * len(shape.rows) * shape.heads * shape.length**2
        if backend == "plain" and held > PLAIN_BYTES:
            print(f"  {backend:7} left out: its scores take {held / 2**30:.0f} GiB")
            continue
        line, results = measure(backend, shape, turns)
        print(f"  {backend:7} {line}", end="", flush=True)
        if first is None:
            first = backend, results
            print()
            continue
        off = difference(results, first[1])
        agree &= off <= TOLERANCE[shape.dtype]
        verdict = "agrees with" if off <= TOLERANCE[shape.dtype] else "DIFFERS from"
        print(f"   {verdict} {first[0]} ({off:.1e})", flush=True)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    small = jax.default_backend() == "cpu"
    parser.add_argument(
        "--shape", default=",".join(n for n in SHAPES if n.endswith("_small") == small)
    )
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    shapes, backends = args.shape.split(","), args.backends.split(",")
    for given, known, what in ((shapes, SHAPES, "shape"), (backends, BACKENDS, "backends")):
        if unknown := set(given) - set(known):
            parser.error(f"--{what}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    print(jax.devices()[0].device_kind)
    if not all([run_shape(name, backends, args.turns) for name in shapes]):
        sys.exit("backends differ by more than the tolerance")


if __name__ == "__main__":
    main()
