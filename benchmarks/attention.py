"""Attention kernels compared, forward and backward, on packed rows.

    python -m benchmarks.attention [--shape=encoder,decoder] [--backends=triton,xla] [--turns=10]

Runs every kernel that the present device supports. Default shapes: those for a GPU or TPU
(bfloat16), or the small ones on a CPU (float32). Prints one line per kernel and shape:

- seconds of the forward pass, and of forward and backward together, the median of --turns calls;
- TFLOP/s by true windows: 4 K multiplications and additions for each visible pair and head
  forward, 14 K forward and backward (two and seven matmuls, FlashAttention-2's count);
- computed scores over visible ones, forward and backward: the cost of packing for this kernel;
- the largest difference from the first kernel that ran, output and gradients, as a share of the
  largest value. If it exceeds the tolerance, the program ends with status 1.

`mha` is JAX's own Triton kernel, with keys and values repeated for grouped queries; it computes all
blocks of a row. `plain` holds all scores at once and is left out if they take over 16 GiB.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.pallas.ops.gpu import attention as pallas_mha
from jaxtyping import Array, Float, Float32

from ov2_jax.core.errors import ConfigError
from ov2_jax.core.program import Given, run
from ov2_jax.model.attention import plain, splash, triton, xla
from ov2_jax.model.attention.blocks import Segments, row_segments, visible, visited_blocks

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
PLAIN_BYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """A benchmark's input: rows packed with samples or windows; the rest of a row is padding."""

    length: int  # of a row
    rows: tuple[tuple[int, ...], ...]  # lengths of the samples or windows of each row
    heads: int
    kv_heads: int
    head_size: int
    causal: bool
    dtype: str

    def segments(self) -> Segments:
        ids = np.zeros((len(self.rows), self.length), np.int32)
        for row, windows in zip(ids, self.rows, strict=True):
            row[: sum(windows)] = np.repeat(np.arange(1, len(windows) + 1), windows)
        return row_segments(jnp.asarray(ids), causal=self.causal)

    def visible(self) -> int:
        """Pairs of a query and a key that it sees, for one head."""
        windows = [n for row in self.rows for n in row]
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in windows)


# Four frames of 392 px are 3136 patches, a picture of 224 px is 256, a page up to 4096.
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
class Kernel:
    attention: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    computed: Callable[[Segments, Shape], tuple[int, int]]  # scores of a head, forward and backward


def _mha(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
) -> Float[Array, "B Q H K"]:
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, 2) for x in (k, v))
    causal = segments.q_index is not None
    out = pallas_mha.mha(q, k, v, segments.q_ids, sm_scale=q.shape[-1] ** -0.5, causal=causal)
    return jnp.where(segments.q_ids[..., None, None] > 0, out, 0)


def _plain(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J K"],
    segments: Segments,
) -> Float[Array, "B Q H K"]:
    out = plain.masked_attention(q, k, v, visible(segments))
    return jnp.where(segments.q_ids[..., None, None] > 0, out, 0)


def _computed_triton(segments: Segments, shape: Shape) -> tuple[int, int]:
    """The backward pass weighted by its seven matmuls: three in dq, four in dkv."""
    counts = triton.computed_scores(segments, shape.head_size, jnp.dtype(shape.dtype))
    return counts["forward"], (3 * counts["dq"] + 4 * counts["dkv"]) // 7


def _computed_splash(segments: Segments, shape: Shape) -> tuple[int, int]:
    block = splash.block_size(shape.length)
    blocks = int(np.asarray(visited_blocks(segments, block, block)).sum(dtype=np.int64))
    return blocks * block**2, blocks * block**2


def _computed_xla(segments: Segments, shape: Shape) -> tuple[int, int]:
    scores = int(np.asarray(xla.computed_scores(segments)).sum(dtype=np.int64))
    return scores, scores


def _computed_mha(segments: Segments, shape: Shape) -> tuple[int, int]:
    """Blocks of 128 forward and 32 backward; if attention is causal, up to the diagonal."""

    def scores(block: int) -> int:
        blocks = shape.length // block
        each = blocks * (blocks + 1) // 2 if shape.causal else blocks**2
        return len(shape.rows) * each * block**2

    return scores(128), scores(32)


def _computed_plain(segments: Segments, shape: Shape) -> tuple[int, int]:
    scores = len(shape.rows) * shape.length**2
    return scores, scores


KERNELS = {
    "splash": Kernel(splash.attention, ("tpu",), _computed_splash),
    "triton": Kernel(triton.attention, ("gpu",), _computed_triton),
    "mha": Kernel(_mha, ("gpu",), _computed_mha),
    "xla": Kernel(xla.attention, ("tpu", "gpu", "cpu"), _computed_xla),
    "plain": Kernel(_plain, ("tpu", "gpu", "cpu"), _computed_plain),
}


def inputs(
    shape: Shape,
) -> tuple[
    Float[Array, "B Q H K"],
    Float[Array, "B T J K"],
    Float[Array, "B T J K"],
    Float[Array, "B Q H K"],
]:
    """Random q, k, v and gradient of the output."""
    random = np.random.default_rng(0)
    counts = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = ((len(shape.rows), shape.length, n, shape.head_size) for n in counts)
    return tuple(jnp.asarray(random.standard_normal(s, np.float32), shape.dtype) for s in sizes)


def seconds(call: Callable, args: tuple, turns: int) -> float:
    """Median of `turns` calls, each waited for, after two calls to compile and warm up."""
    taken = []
    for _ in range(turns + 2):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def measure(
    kernel: Kernel, shape: Shape, turns: int
) -> tuple[str, list[Float32[np.ndarray, "B L _ K"]]]:
    """One line of figures, and (output, gradients of q, k, v)."""
    segments = shape.segments()

    @jax.jit
    def both(
        q: Float[Array, "B Q H K"],
        k: Float[Array, "B T J K"],
        v: Float[Array, "B T J K"],
        d_out: Float[Array, "B Q H K"],
        segments: Segments,
    ) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *x: kernel.attention(*x, segments), q, k, v)
        return out, *pull(d_out)

    forward = jax.jit(kernel.attention)
    q, k, v, d_out = inputs(shape)
    start = time.perf_counter()
    results = jax.block_until_ready(both(q, k, v, d_out, segments))
    compiled = time.perf_counter() - start
    one = seconds(forward, (q, k, v, segments), turns)
    all_ = seconds(both, (q, k, v, d_out, segments), turns)
    flops = shape.visible() * shape.heads * shape.head_size
    ahead, back = (n / shape.visible() for n in kernel.computed(segments, shape))
    line = (
        f"forward {one:.5f} s {4e-12 * flops / one:7.2f} TFLOP/s   "
        f"with backward {all_:.5f} s {14e-12 * flops / all_:7.2f} TFLOP/s   "
        f"computed/visible {ahead:.2f} {back:.2f}   first call {compiled:.1f} s"
    )
    return line, [np.asarray(x, np.float32) for x in results]


def difference(
    got: list[Float32[np.ndarray, "B L _ K"]], want: list[Float32[np.ndarray, "B L heads K"]]
) -> float:
    """Largest error of output and gradients, each as a share of the largest value of `want`."""
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


def run_shape(name: str, kernels: list[str], turns: int) -> bool:
    """Prints the lines of one shape; returns whether all kernels agree."""
    shape, platform = SHAPES[name], jax.default_backend()
    pairs = shape.visible() / 1e6
    print(f"{name}: {len(shape.rows)} x {shape.length}, {pairs:.1f} M pairs per head")
    first, agree = None, True
    for kernel in kernels:
        if platform not in KERNELS[kernel].platforms:
            print(f"  {kernel:7} does not run on a {platform}")
            continue
        held = 4 * len(shape.rows) * shape.heads * shape.length**2
        if kernel == "plain" and held > PLAIN_BYTES:
            print(f"  {kernel:7} left out: its scores take {held / 2**30:.0f} GiB")
            continue
        line, results = measure(KERNELS[kernel], shape, turns)
        print(f"  {kernel:7} {line}", end="", flush=True)
        if first is None:
            first = kernel, results
            print()
            continue
        off = difference(results, first[1])
        agree &= off <= TOLERANCE[shape.dtype]
        verdict = "agrees with" if off <= TOLERANCE[shape.dtype] else "DIFFERS from"
        print(f"   {verdict} {first[0]} ({off:.1e})", flush=True)
    return agree


def define_flags() -> None:
    flags.DEFINE_list("shape", None, f"Of {', '.join(SHAPES)}.")
    flags.DEFINE_list("backends", list(KERNELS), "The attention kernels to run.")
    flags.DEFINE_integer("turns", 10, "Calls of which the median is taken.", lower_bound=1)


def main(given: Given) -> int:
    small = jax.default_backend() == "cpu"
    shapes = given.shape or [name for name in SHAPES if name.endswith("_small") == small]
    for flag, names, known in (("shape", shapes, SHAPES), ("backends", given.backends, KERNELS)):
        if unknown := set(names) - set(known):
            raise ConfigError(
                f"--{flag} has {', '.join(sorted(unknown))}, which is none of {', '.join(known)}."
            )
    print(jax.devices()[0].device_kind)
    if not all([run_shape(name, given.backends, given.turns) for name in shapes]):
        print("kernels differ by more than the tolerance", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main, define_flags)
