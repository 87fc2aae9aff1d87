"""Times a train step, and the public PyTorch reference's on the same samples.

    python -m benchmarks.train_step --case=benchmarks/cases/eight_samples.json [--reference=DIR]

A step is forward, backward and AdamW. Ours is the step that training runs, on the case's samples,
packed into the rows that a cost model finds cheapest. DIR is a checkout of the public reference. It
runs the same samples with the same weights, loss and optimizer, with SDPA attention, one by one or
as a padded batch, whichever is faster. Both sides have the case's `threads` cores and no others.
They alternate, so that a busy machine slows both. Seconds are medians. The first step's losses must
agree to 1e-4 (bfloat16: 1e-2), or the exit status is 1.

--device=gpu uses bfloat16, by default with the released 2B model (4B on a GPU of 139 GiB), and
reports MFU. Compiled programs are kept in --cache, so a second start compiles nothing.
"""

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import train_step_reference as reference
from benchmarks.train_step_case import Case, read_case
from benchmarks.train_step_rows import Rows, choose_rows
from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.optimizer import PARTS, OptimizerConfig
from ov2_jax.core.batch import Batch
from ov2_jax.core.errors import ConfigError
from ov2_jax.core.program import Given, run
from ov2_jax.data.packing.build import build_pack
from ov2_jax.model.attention import KERNELS, kernel_of, row_segments
from ov2_jax.quickstart import TOKENIZER
from ov2_jax.sharding.mesh import make_mesh
from ov2_jax.sharding.rules import parameter_shardings
from ov2_jax.training.hosts.host_memory import keep_freed_memory
from ov2_jax.training.monitoring.flops import batch_work, forward_flops, train_flops
from ov2_jax.training.program import abstract_batch, jit_train_step
from ov2_jax.training.start import random_params
from ov2_jax.training.state import init_state

SEED = 0
# A constant learning rate, so that both sides have the same without a schedule.
OPTIMIZER = OptimizerConfig(warmup_fraction=0.0, end_learning_rate=1e-5)
# Dense bfloat16 TFLOP/s, from the vendor's data sheets.
GPU_PEAK = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}
CASES = pathlib.Path(__file__).parent / "cases"
CACHE = pathlib.Path.home() / ".cache" / "ov2_jax" / "compilation_cache"


class Step(NamedTuple):
    """Our step, compiled."""

    run: Callable[[], float]  # one step; returns the loss
    lower_s: float
    compile_s: float
    cached: bool
    temporaries: int  # bytes


def use_cores(threads: int) -> None:
    """Binds this process, and those it starts, to `threads` cores; before JAX makes its threads.

    XLA's thread pool has one thread for each core that the process may use. Threads that imports
    have started already are bound too.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise ConfigError(
            f"The case has {threads} threads; it must have at most {len(cores)}, the cores that "
            "this process may use."
        )
    for task in pathlib.Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), cores[:threads])


def cores_in_use() -> int:
    """Cores that any thread of this process may run on."""
    tasks = pathlib.Path("/proc/self/task").iterdir()
    return len(set().union(*(os.sched_getaffinity(int(task.name)) for task in tasks)))


def our_step(case: Case, rows: Rows, params: dict[str, Any], batch: Batch, dtype: str) -> Step:
    """Compiles the train step for one device and puts its state and batch there."""
    experiment = Experiment(
        workdir="unused",
        model=case.model,
        data=DataConfig(sources=(SourceConfig("unused.jsonl"),)),
        tokenizer=str(TOKENIZER),
        pack=rows.pack,
        steps=1_000_000,
        global_rows=rows.pack.rows,
        optimizer=OPTIMIZER,
        compute=ComputeConfig(
            dtype=dtype,
            remat="none" if dtype == "float32" else "full",
        ),
    )
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    state = jax.eval_shape(lambda p: init_state(p, OPTIMIZER), params)
    shardings = parameter_shardings(state, mesh)
    state = jax.jit(lambda p: init_state(p, OPTIMIZER), out_shardings=shardings)(params)
    batch = jax.tree.map(
        lambda x, like: jax.device_put(x[None, None], like.sharding),
        batch,
        abstract_batch(experiment, mesh),
    )
    cached = False

    def note(event: str, **_: Any) -> None:
        nonlocal cached
        cached |= event == "/jax/compilation_cache/cache_hits"

    with jax.set_mesh(mesh):
        start = time.perf_counter()
        lowered = jit_train_step(experiment, state).lower(state, batch)
        between = time.perf_counter()
        jax.monitoring.register_event_listener(note)
        step = lowered.compile()
        end = time.perf_counter()
    now = [state]
    del state

    def run() -> float:
        new, metrics = step(now.pop(), batch)
        now.append(new)
        loss = float(metrics["loss"])
        jax.block_until_ready(new)
        return loss

    temporaries = step.memory_analysis().temp_size_in_bytes
    return Step(run, between - start, end - between, cached, temporaries)


def describe(case: Case, rows: Rows, batch: Batch) -> list[str]:
    """Sizes, FLOPs and utilisation of the rows, as lines."""
    kernel = kernel_of(ComputeConfig())

    def scores(ids: np.ndarray, *, causal: bool) -> int:
        segments = row_segments(jnp.asarray(ids[0]), causal=causal)
        return int(np.sum(KERNELS[kernel].computed_scores(segments)))

    batch = jax.tree.map(lambda x: x[None], batch)
    work = batch_work(batch)
    text = scores(batch.segment_ids, causal=True)
    vision = sum(scores(v.segment_ids, causal=False) for v in batch.vision)
    forward = forward_flops(case.model, work)
    parts = ", ".join(f"{part} {flops / 1e9:.1f}" for part, flops in forward.items())
    pack = rows.pack
    classes = ", ".join(f"{r} x {w}" for r, w in pack.vision_rows) or "none"
    lines = [
        f"samples {len(case.samples)}, tokens {work.tokens}, patches {work.patches}",
        f"text rows {pack.rows} x {pack.seq_len}: {work.tokens / pack.token_slots:.1%} filled; "
        f"vision rows {classes}: {work.patches / max(1, pack.patch_slots):.1%} filled",
        f"attention by {kernel}: text scores "
        f"{text / (work.squared_samples / 2):.2f} x half the squared samples",
        f"forward GFLOP: {parts}; step {train_flops(case.model, work, PARTS) / 1e9:.1f}",
    ]
    if work.squared_windows:
        lines[2] += f", vision scores {vision / work.squared_windows:.2f} x the squared windows"
    return lines


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and the loss that it returned."""
    start = time.perf_counter()
    loss = run()
    return time.perf_counter() - start, loss


class Theirs:
    """The reference's steps, in the faster of its ways to run them."""

    def __init__(self, folder: str, case: Case, setting: reference.Setting, samples, params, ways):
        reference.write_inputs(pathlib.Path(folder), case, samples, params)
        self._process = reference.Reference(pathlib.Path(folder), setting)
        self.seconds: list[float] = []
        try:
            first = self._process.step(ways[0])
            self.first_loss, self.threads = first.loss, first.threads
            tried = {}
            for way in ways:
                self._process.step(way)  # warm-up
                tried[way] = self._process.step(way).seconds
        except ConfigError:
            self.close()
            raise
        self.way = min(tried, key=tried.get)
        listed = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in tried.items())
        print(f"reference: {listed}; timed {self.way}, {self.threads} threads", flush=True)

    def step(self) -> None:
        self.seconds.append(self._process.step(self.way).seconds)

    def close(self) -> None:
        self._process.close()


def benchmark(
    case: Case, checkout: str | None, *, device: str, dtype: str, rounds: int, peak: float | None
) -> bool:
    """Prints everything; False if the losses differ. `peak`: the device's TFLOP/s, if known."""
    on_cpu = device == "cpu"
    # Kernels of a GPU need rows of whole blocks.
    rows = choose_rows(case.sizes(), case.model, multiple=1 if on_cpu else 128)
    samples = case.encoded(SEED)
    batch, _ = build_pack(samples, rows.placements, rows.pack, case.model)
    print(*describe(case, rows, batch), sep="\n", flush=True)
    params = jax.tree.map(np.asarray, random_params(case.model, SEED))
    theirs = None
    with tempfile.TemporaryDirectory() as folder:
        if checkout is not None:
            kind = "cpu" if on_cpu else "cuda"
            setting = reference.setting(checkout, case, OPTIMIZER, dtype=dtype, device=kind)
            # A padded batch of the released sizes would not fit into a GPU's memory.
            ways = reference.WAYS if on_cpu else reference.WAYS[:1]
            theirs = Theirs(folder, case, setting, samples, params, ways)
        try:
            if theirs and not on_cpu:  # the GPU's memory holds one side at a time
                for _ in range(rounds):
                    theirs.step()
                theirs.close()
            step = our_step(case, rows, params, batch, dtype)
            cores = f", {cores_in_use()} cores" if on_cpu else ""
            print(
                f"ours: traced in {step.lower_s:.1f} s, compiled in {step.compile_s:.1f} s "
                f"({'from' if step.cached else 'not in'} the compilation cache), "
                f"{step.temporaries / 2**20:.0f} MiB of temporaries{cores}",
                flush=True,
            )
            _, first_loss = timed(step.run)
            for _ in range(2):  # until its memory is allocated, too
                timed(step.run)
            ours = []
            for number in range(rounds):
                ours.append(timed(step.run)[0])
                line = f"round {number + 1}: ours {ours[-1]:.3f} s"
                if theirs and on_cpu:
                    theirs.step()
                if theirs:
                    line += f", reference {theirs.seconds[number]:.3f} s"
                print(line, flush=True)
        finally:
            if theirs:
                theirs.close()
    work = batch_work(jax.tree.map(lambda x: x[None], batch))
    flops = train_flops(case.model, work, PARTS)

    def report(name: str, seconds: list[float]) -> float:
        median = statistics.median(seconds)
        mfu = f", MFU {flops / median / peak / 1e12:.1%}" if peak else ""
        print(f"{name}: {median:.3f} s a step, {flops / median / 1e9:.1f} GFLOP/s{mfu}")
        return median

    median = report("ours", ours)
    if theirs is None:
        return True
    reference_median = report("reference", theirs.seconds)
    difference = abs(first_loss - theirs.first_loss) / abs(theirs.first_loss)
    print(f"first loss: ours {first_loss:.6f}, reference {theirs.first_loss:.6f}")
    if difference > (1e-4 if dtype == "float32" else 1e-2):
        print(f"The losses differ by {difference:.1e} of their size: the steps are not the same.")
        return False
    print(f"ratio {reference_median / median:.2f}")
    return True


def gpu_peak() -> tuple[str, float | None]:
    """The GPU's name and its bfloat16 TFLOP/s, if it is a known one; ConfigError without a GPU."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as e:
        raise ConfigError("--device=gpu needs a GPU, and JAX finds none here.") from e
    name = device.device_kind
    return name, next((peak for known, peak in GPU_PEAK.items() if known in name), None)


def gpu_case() -> str:
    """The case of the largest released model that fits the GPU's memory with its optimizer."""
    limit = jax.devices("gpu")[0].memory_stats()["bytes_limit"]
    return str(CASES / ("gpu_4b.json" if limit > 120 * 2**30 else "gpu_2b.json"))


def main(given: Given) -> int:
    if given.device == "cpu" and given.case is None:
        raise ConfigError("--case=FILE.json is missing; benchmarks/cases has some.")
    if given.rounds < 1:
        raise ConfigError(f"--rounds is {given.rounds}; it must be at least 1.")
    jax.config.update("jax_compilation_cache_dir", given.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if given.device == "gpu":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        name, peak = gpu_peak()
        case, dtype = read_case(given.case or gpu_case()), "bfloat16"
        print(f"{name}: peak {peak or 'unknown'} TFLOP/s in bfloat16")
    else:
        case, dtype, peak = read_case(given.case), "float32", None
        use_cores(case.threads)
        keep_freed_memory()  # as training does
        jax.config.update("jax_platforms", "cpu")
    options = {"device": given.device, "dtype": dtype, "rounds": given.rounds, "peak": peak}
    return 0 if benchmark(case, given.reference, **options) else 1


def _define_flags() -> None:
    flags.DEFINE_string("case", None, "JSON file; on a GPU there is a default.")
    flags.DEFINE_string("reference", None, "Checkout of the public PyTorch code.")
    flags.DEFINE_enum("device", "cpu", ("cpu", "gpu"), "Where the steps run.")
    flags.DEFINE_integer("rounds", 5, "Timed steps of each side.")
    flags.DEFINE_string("cache", str(CACHE), "Folder of compiled programs.")


if __name__ == "__main__":
    run(main, _define_flags)
