"""Compiles the train step for a topology and counts what it costs, in a process of its own:

    python -m launch.planner.measure --config=... --topology=v5p:4x4x8 --result=FILE

launch.plan starts it with the right environment, because a compiler that fails ends its process.
The result is JSON: the counts, or {"error": {"kind": class, "message": sentence}}.
"""

import json
import math
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import flags, logging
from jax.experimental import topologies

from launch.accelerators import Tpu, parse_accelerator
from launch.errors import LaunchError
from launch.planner import collectives, flops, hlo, loops, memory, traffic, work
from launch.planner.chips import CHIPS
from launch.planner.experiment import experiment_to_plan
from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import UserError
from ov2_jax.core.program import Given, run
from ov2_jax.sharding.mesh import make_mesh
from ov2_jax.training.feed import make_feed
from ov2_jax.training.program import abstract_batch, lower_train_step
from ov2_jax.training.start import abstract_train_state

_ROWS = 24  # length of each list of the costliest


class Compiled(NamedTuple):
    """A program as the compiler left it."""

    text: str
    stats: Any  # the compiler's memory analysis; None if the program does not fit
    reason: str | None  # why it does not fit
    seconds: float


def compile_program(lowered: jax.stages.Lowered, folder: pathlib.Path) -> Compiled:
    """Compiles with a dump in `folder`, which is all there is of a program that does not fit."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    start = time.perf_counter()
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        reason = str(e).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        text = _dumped(folder, "after_optimizations.txt").read_text()
        return Compiled(text, None, reason, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Compiled(program.as_text(), program.memory_analysis(), None, seconds)


def _dumped(folder: pathlib.Path, end: str) -> pathlib.Path:
    found = sorted(folder.glob(f"*.{end}"), key=lambda path: path.stat().st_size)
    if not found:
        raise LaunchError(f"the compiler wrote no {end}; this version of libtpu is not supported.")
    return found[-1]  # the largest: small helper programs have dumps of their own


def count_program(experiment: Experiment, tpu: Tpu, **filling: int | None) -> dict[str, Any]:
    """Compiles the train step for a slice; returns its memory and all counts as plain data."""
    start = time.perf_counter()
    name = f"{tpu.version}:{tpu.topology}"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = make_mesh(experiment.mesh, list(devices))
    experiment.check_mesh(mesh.shape, make_feed(mesh).count)
    lowered = lower_train_step(experiment, mesh)
    traced = time.perf_counter() - start
    state = abstract_train_state(experiment, mesh)
    batch = abstract_batch(experiment, mesh)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        compiled = compile_program(lowered, pathlib.Path(folder))
        module = hlo.parse(compiled.text)
        layers = {
            experiment.model.vision.num_hidden_layers,
            experiment.model.text.num_hidden_layers,
        }
        buffers = _dumped(pathlib.Path(folder), "after_optimizations-buffer-assignment.txt")
        held = memory.allocations(buffers, module, state.params, layers)
    return {
        "topology": name,
        "trace_seconds": traced,
        "compile_seconds": compiled.seconds,
        "memory": memory_of(compiled, held, state, batch, CHIPS[tpu.version].usable_bytes),
        **count_module(experiment, module, dict(mesh.shape), state.params, **filling),
    }


def count_module(
    experiment: Experiment,
    module: hlo.Module,
    mesh: Mapping[str, int],
    params: Any,
    **filling: int | None,
) -> dict[str, Any]:
    """What a compiled program does in a step, and what the experiment needs."""
    runs = loops.runs(module)
    return {
        "chips": math.prod(mesh.values()),
        "mesh": dict(mesh),
        "remat": experiment.compute.remat,
        "flops": _flops(module, runs),
        "hbm_bytes": traffic.hbm_bytes(module, runs),
        "collectives": _collectives(module, runs, mesh),
        "least": work.least_weight_bytes(experiment, params, mesh),
        "work": _work(experiment, **filling),
        "notes": runs.notes,
    }


def memory_of(
    compiled: Compiled, held: memory.Allocations, state: Any, batch: Any, usable: float
) -> dict[str, Any]:
    """HBM by kind. The whole is the compiler's figure; parts follow from shapes and its buffers."""
    stats = compiled.stats
    buffers = held.arguments + held.temporaries + held.other
    if stats is None:
        parts = held.arguments, held.temporaries, held.other
    else:
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        code = stats.generated_code_size_in_bytes
        parts = stats.argument_size_in_bytes, stats.temp_size_in_bytes, results + code
    arguments = {
        "parameters": memory.local_bytes(state.params),
        "moments": memory.local_bytes(state.opt_state),
        "batch": memory.local_bytes(batch),
    }
    heap = dict.fromkeys(("gradients", "kept by layers"), 0)
    for buffer in held.heap:
        if buffer.kind in heap:
            heap[buffer.kind] += buffer.bytes
    return {
        "fits": compiled.reason is None,
        "reason": compiled.reason,
        "usable": usable,
        "total": sum(parts),
        "buffers": buffers,
        "arguments": parts[0],
        "temporaries": parts[1],
        "results_and_code": parts[2],
        "kinds": {
            **arguments,
            "tile padding": max(0, parts[0] - sum(arguments.values())),
            **heap,
            "other temporaries": max(0, held.temporaries - sum(heap.values())),
            "reserved beside buffers": max(0, parts[1] - held.temporaries),
            "results and code": parts[2],
        },
        "largest": [b._asdict() for b in held.heap[:_ROWS]],
    }


def _flops(module: hlo.Module, runs: loops.Runs) -> dict[str, Any]:
    rows = flops.matmuls(module, runs)
    matmuls = [r for r in rows if not r.attention and not r.kernel]
    kernels = [r for r in rows if r.kernel]
    phases = dict.fromkeys(("forward", "recomputed", "backward"), 0.0)
    for row in matmuls + [k for k in kernels if not k.attention]:
        phases[row.phase] += row.flops
    return {
        "matmuls": sum(phases.values()),
        "phases": phases,
        "attention": sum(r.flops for r in rows if r.attention and not r.kernel),
        "kernels": [r._asdict() | {"attention": r.attention} for r in kernels],
        "largest": [r._asdict() for r in matmuls[:_ROWS]],
    }


def _collectives(module: hlo.Module, runs: loops.Runs, mesh: Mapping[str, int]) -> dict[str, Any]:
    rows = collectives.collectives(module, runs, mesh)
    parts = collectives.split(rows)
    return {
        "total": sum(r.bytes for r in rows),
        "parts": {
            part: [
                {"kind": kind, "axes": axes, "bytes": n}
                for (kind, axes), n in collectives.by_kind_and_axes(those).items()
            ]
            for part, those in parts.items()
        },
        "largest": [r._asdict() for r in rows[:_ROWS]],
    }


def _work(experiment: Experiment, **given: int | None) -> dict[str, Any]:
    fill = work.filling(experiment, **given)
    step = work.step_work(experiment, fill)
    model = work.model_flops(experiment, step)
    return {
        "filling": {"sample": fill.sample, "window": fill.window, "clip": fill.clip},
        "step": step._asdict(),
        "matmuls": model.matmuls,
        "attention": model.attention,
        "kernels": work.attention_kernel_flops(experiment, fill),
        "steps": experiment.steps,
    }


def _define_flags() -> None:
    flags.DEFINE_string("topology", None, "As v5p:4x4x8.")
    flags.DEFINE_string("result", None, "The file to write.")
    flags.DEFINE_integer("sample", None, "Tokens of a sample.", lower_bound=1)
    flags.DEFINE_integer("window", None, "Patches of an attention window.", lower_bound=1)
    flags.mark_flags_as_required(["topology", "result"])


def main(given: Given) -> None:
    try:
        tpu = parse_accelerator(given.topology)
        result = count_program(
            experiment_to_plan(given.config), tpu, sample=given.sample, window=given.window
        )
    except UserError as e:  # launch.plan raises it again
        result = {"error": {"kind": type(e).__name__, "message": str(e)}}
    pathlib.Path(given.result).write_text(json.dumps(result))


if __name__ == "__main__":
    run(main, _define_flags, config=True, verbosity=logging.ERROR)
