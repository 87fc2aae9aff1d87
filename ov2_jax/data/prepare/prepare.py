"""Validates a corpus, measures it, and plans its packs.

    python -m ov2_jax.data.prepare --config=configs/X.py --out=DIR
    python -m ov2_jax.train --config=configs/X.py --config.data.plan=DIR

The config is that of the run, overrides included. Started again it goes on where it was. What DIR
holds is said in prepared.py; it has the same bytes whoever did the work.
"""

import importlib.util
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ov2_jax.config.data import leaves
from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.core.files import read_json, write_file, write_json
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.packing.planning import Packs, plan_packs
from ov2_jax.data.plan.fingerprint import difference, encoding_inputs, file_inputs, mixture_inputs
from ov2_jax.data.plan.folder import (
    DONE,
    LENGTHS,
    MANIFEST,
    PLAN,
    Arrays,
    Plan,
    PlanInfo,
    digest_of,
    packed_file,
    packed_folder,
    write_arrays,
)
from ov2_jax.data.plan.lengths import (
    finished_shards,
    read_rejects,
    shard_file,
    usable_lengths,
    write_lines,
    write_table,
)
from ov2_jax.data.prepare.report import make_report, set_aside, to_markdown
from ov2_jax.data.prepare.work import Job, Runner, Worker, rejects_file
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.mixture import Mixture


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "-/s")


def prepare(
    job: Job, run: Runner, *, packed_shards: bool = False, console: Console
) -> dict[str, Any]:
    """Does what of the job is not yet done; returns the report. Raises ConfigError, DataError."""
    folder = job.folder
    mixture = Mixture(job.data.sources, seed=job.seed, shuffle=job.data.shuffle)
    tokenizer = load_tokenizer(job.tokenizer, job.model)
    inputs = encoding_inputs(job.data, job.model, job.pack, tokenizer, job.seed)
    _claim(job, inputs | file_inputs(mixture.records.files))
    worker = Worker(job, mixture.records)
    records = len(mixture.records)
    shards = -(-records // job.shard_size)
    there = finished_shards(folder)
    shard_file(folder, 0).parent.mkdir(exist_ok=True)
    missing = [i for i in range(shards) if i not in there]
    _run(run, worker, "measure", missing, (job.shard_size, records), console)
    plan = _current_plan(job)
    if plan is None:
        with console.status("planning"):
            plan = _make_plan(job, mixture, shards)
    if packed_shards:
        _pack(job, run, worker, plan, mixture.records, console)
    return read_json(folder / "report.json")


def _claim(job: Job, inputs: dict[str, Any]) -> None:
    """Makes the folder this configuration's, or raises DataError if it is another's."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / MANIFEST
    manifest = {"shard_size": job.shard_size, "inputs": inputs}
    if path.exists():
        then = read_json(path)
        found = difference({"--shard-size": then["shard_size"]}, {"--shard-size": job.shard_size})
        found = found or difference(then["inputs"], inputs)
        if found is not None:
            raise DataError(
                f"{job.out} was made with {found}; name another --out, or remove {job.out} to make "
                "it anew."
            )
        for pattern in (".*.part", "*/.*.part"):  # of a killed run
            for part in job.folder.glob(pattern):
                part.unlink()
    elif any(job.folder.iterdir()):
        raise DataError(f"{job.out} holds other files; name a new folder as --out.")
    else:
        write_json(path, manifest)


def _run(
    run: Runner,
    worker: Worker,
    unit: str,
    missing: list[int],
    sizes: tuple[int, int],
    console: Console,
) -> None:
    """Runs units with a progress bar; `sizes` are what one unit has, and all together."""
    of_unit, total = sizes

    def amount(number: int) -> int:
        return min(of_unit, total - number * of_unit)

    left = sum(map(amount, missing))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    names = {"measure": "measuring records", "pack": "writing packs"}
    with Progress(*columns, console=console, speed_estimate_period=300) as progress:
        # Rich takes its rate from what is done under its eyes, so kept units are not counted here.
        task = progress.add_task(names[unit], total=left)
        advance: Callable[[int], None] = lambda n: progress.advance(task, amount(n))  # noqa: E731
        run(worker, unit, missing, advance)


# --- plan -----------------------------------------------------------------------------------------


def _plan_inputs(job: Job) -> dict[str, Any]:
    return mixture_inputs(job.data) | {"seed": job.seed, "--epochs": job.epochs}


def _current_plan(job: Job) -> Plan | None:
    """The plan that is there, if it is of this mixture."""
    if not (job.folder / DONE).exists():
        return None
    plan = Plan(job.out)
    then = plan.info.inputs | {"seed": plan.info.seed, "--epochs": plan.info.planned_epochs}
    return plan if difference(then, _plan_inputs(job)) is None else None


def _make_plan(job: Job, mixture: Mixture, shards: int) -> Plan:
    folder = job.folder
    (folder / DONE).unlink(missing_ok=True)
    write_table(folder, shards)
    table = Arrays(folder / LENGTHS)
    lines = list(read_rejects(folder, shards))
    write_lines(folder / "rejected.jsonl", lines)
    rejects = set_aside(lines, _source_of(job, mixture.records))
    lengths, numbers = usable_lengths(table)
    if not len(numbers):
        reasons = ", ".join(f"{reason} {sum(n.values())}" for reason, n in rejects.items())
        raise DataError(
            f"None of the {len(mixture.records)} records can be used ({reasons}); each is in "
            f"{folder / 'rejected.jsonl'}."
        )
    compact = np.full(len(mixture.records), -1, np.int64)
    compact[numbers] = np.arange(len(numbers))
    members, ends, epochs = [], [], []
    for epoch in range(job.epochs):
        order = compact[mixture.epoch_records(epoch)]
        packs = plan_packs(lengths, order[order >= 0], job.pack)
        members.append(numbers[packs.members])
        ends.append(packs.ends + sum(len(m) for m in members[:-1]))
        epochs.append(len(packs.ends))
    packs = Packs(np.concatenate(members), np.concatenate(ends))
    write_arrays(folder / PLAN, packs._asdict())
    report = make_report(
        table,
        packs,
        epochs,
        job.pack,
        job.model.vision.merge_unit,
        mixture.names,
        mixture.records.sizes,
        rejects,
    )
    _write_report(job, report)
    info = PlanInfo(
        digest=digest_of(folder / LENGTHS, folder / PLAN),
        inputs=mixture_inputs(job.data),
        seed=job.seed,
        planned_epochs=job.epochs,
        epochs=tuple(n for n in epochs if n),
        samples=len(packs.members),
        packed_files=0,
        packs_per_file=0,
    )
    write_json(folder / DONE, info._asdict())
    return Plan(job.out)


def _source_of(job: Job, records: RecordSource) -> dict[str, str]:
    """The data set of every file."""
    return {
        file: source.title
        for source, files in zip(leaves(job.data.sources), records.files, strict=True)
        for file, _ in files
    }


def _write_report(job: Job, report: dict[str, Any]) -> None:
    write_json(job.folder / "report.json", report)
    write_file(job.folder / "report.md", to_markdown(report).encode())


# --- packed shards --------------------------------------------------------------------------------


def _pack(
    job: Job, run: Runner, worker: Worker, plan: Plan, records: RecordSource, console: Console
) -> None:
    """Writes the encoded packs, and adds to the plan that they are there."""
    size, digest = job.packs_per_file, plan.info.digest
    own = packed_folder(digest, size)
    (job.folder / own).mkdir(exist_ok=True)
    files = -(-plan.packs // size)
    paths = [packed_file(job.folder, digest, size, number) for number in range(files)]
    there = {p.name for p in (job.folder / own).iterdir()}
    missing = [i for i, path in enumerate(paths) if path.rpartition("/")[2] not in there]
    _run(run, worker, "pack", missing, (size, plan.packs), console)
    late = dict.fromkeys(  # a record may be in several packs
        line for path in paths for line in rejects_file(path).read_bytes().splitlines(keepends=True)
    )
    lines = [*read_rejects(job.folder, -(-len(records) // job.shard_size)), *late]
    write_lines(job.folder / "rejected.jsonl", lines)
    report = read_json(job.folder / "report.json")
    report["set_aside"] = set_aside(lines, _source_of(job, records))
    report["packed"] = {
        "files": files,
        "bytes": sum(epath.Path(path).stat().length for path in paths),
        "set_aside": len(late),
    }
    _write_report(job, report)
    info = plan.info._replace(packed_files=files, packs_per_file=size)
    write_json(job.folder / DONE, info._asdict())
    for folder in job.folder.glob("packed-*"):  # of an earlier plan
        if folder.name != own:
            folder.rmtree()


def beam_runner(args: str) -> Runner:
    """Raises ConfigError where Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise ConfigError("--beam needs Apache Beam; pip install 'ov2_jax[prepare]'.")
    from ov2_jax.data.prepare.beam import Pipelines

    return Pipelines(shlex.split(args))
