"""Validates a corpus, measures it, and plans its packs.

    python -m ov2_jax.data.prepare --config=configs/X.py --out=DIR
    python -m ov2_jax.train --config=configs/X.py --config.data.plan=DIR

The config is that of the run, overrides included. Started again, prepare goes on where it was.
data/plan/folder.py lists the files of DIR. They have the same bytes whoever did the work.
"""

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64
from rich.console import Console

from ov2_jax.config.data import leaves
from ov2_jax.core.errors import DataError
from ov2_jax.core.files import read_json, size, write_file, write_json
from ov2_jax.core.progress import progress_bar
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.packing.planning import Lengths, Packs, plan_packs
from ov2_jax.data.plan.fingerprint import difference, encoding_inputs, file_inputs, mixture_inputs
from ov2_jax.data.plan.folder import (
    DONE,
    MANIFEST,
    PLAN,
    REJECTED,
    TABLE,
    PackPlan,
    PlanInfo,
    digest_of,
    packed_file,
    packed_folder,
    table_files,
    write_table,
)
from ov2_jax.data.plan.lengths import (
    RecordLengths,
    finished_shards,
    join_shards,
    read_rejected,
    shard_file,
    usable_lengths,
)
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.report import (
    count_rejected,
    plan_totals,
    record_totals,
    source_totals,
    to_markdown,
    vision_rows,
)
from ov2_jax.data.prepare.runners import Runner, Unit
from ov2_jax.data.prepare.worker import Worker, packed_rejects_file
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.mixture import Mixture


def prepare(
    job: PrepareJob, runner: Runner, *, packed_shards: bool = False, console: Console
) -> dict[str, Any]:
    """Does the parts of the job that are not done yet; returns the report.

    Raises ConfigError and DataError.
    """
    mixture = Mixture(job.data.sources, seed=job.seed, shuffle=job.data.shuffle)
    tokenizer = load_tokenizer(job.tokenizer, job.model)
    inputs = encoding_inputs(job.data, job.model, job.pack, tokenizer, job.seed)
    _claim(job, inputs | file_inputs(mixture.records.files))
    plan = _current_plan(job)
    worker = Worker(job, mixture.records)
    shard_file(job.folder, 0).parent.mkdir(exist_ok=True)
    missing = _missing(len(mixture.records), job.shard_size, finished_shards(job.folder))
    _run(runner, worker, "measure", missing, console)
    if plan is None:
        with console.status("planning"):
            plan = _make_plan(job, mixture)
    if packed_shards:
        _write_packed_shards(worker, plan, runner, console)
    return read_json(job.folder / "report.json")


def _claim(job: PrepareJob, inputs: dict[str, Any]) -> None:
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


def _missing(total: int, unit_size: int, done: Container[int]) -> dict[int, int]:
    """The units that are not done, by number: how many of `total` records or packs each has."""
    numbers = range(-(-total // unit_size))
    return {i: min(unit_size, total - i * unit_size) for i in numbers if i not in done}


def _run(
    runner: Runner, worker: Worker, unit: Unit, missing: Mapping[int, int], console: Console
) -> None:
    """Runs units with a progress bar."""
    title = {"measure": "measuring records", "pack": "writing packs"}[unit]
    # Kept units are not counted here: the bar takes its rate from the units that it sees finished.
    with progress_bar(title, sum(missing.values()), console=console) as advance:
        runner(worker, unit, list(missing), lambda number: advance(missing[number]))


# --- plan -----------------------------------------------------------------------------------------


def _plan_inputs(job: PrepareJob) -> dict[str, Any]:
    return mixture_inputs(job.data) | {"seed": job.seed, "--epochs": job.epochs}


def _current_plan(job: PrepareJob) -> PackPlan | None:
    """The plan of the folder, if it has one of this mixture."""
    if not (job.folder / DONE).exists():
        return None
    plan = PackPlan(job.out)
    then = plan.info.inputs | {"seed": plan.info.seed, "--epochs": plan.info.planned_epochs}
    return plan if difference(then, _plan_inputs(job)) is None else None


def _make_plan(job: PrepareJob, mixture: Mixture) -> PackPlan:
    folder, records = job.folder, mixture.records
    (folder / DONE).unlink(missing_ok=True)
    shards = -(-len(records) // job.shard_size)
    table = join_shards(folder, shards)
    lines = list(read_rejected(folder, shards))
    write_file(folder / REJECTED, b"".join(lines))
    rejected = count_rejected(lines, _source_of_file(job, records))
    lengths, numbers = usable_lengths(table)
    if not len(numbers):
        reasons = ", ".join(f"{reason} {sum(n.values())}" for reason, n in rejected.items())
        raise DataError(
            f"None of the {len(records)} records can be used ({reasons}); each is in "
            f"{folder / REJECTED}."
        )
    packs, epochs = _plan_epochs(job, mixture, lengths, numbers)
    write_table(folder / PLAN, packs)
    report = {
        **record_totals(table),
        "sources": source_totals(table, mixture.names, records.sizes),
        "rejected": rejected,
        "plan": plan_totals(table, packs, epochs, job.pack),
        "vision_rows": vision_rows(lengths, job.pack, unit=job.model.vision.merge_unit),
    }
    _write_report(folder, report)
    files = [*table_files(folder / TABLE, RecordLengths), *table_files(folder / PLAN, Packs)]
    info = PlanInfo(
        digest=digest_of(*files),
        inputs=mixture_inputs(job.data),
        seed=job.seed,
        planned_epochs=job.epochs,
        epochs=tuple(n for n in epochs if n),
        samples=len(packs.members),
        packed_files=0,
        packs_per_file=0,
    )
    write_json(folder / DONE, info._asdict())
    return PackPlan(job.out)


def _plan_epochs(
    job: PrepareJob, mixture: Mixture, lengths: Lengths, numbers: Int64[np.ndarray, " usable"]
) -> tuple[Packs, list[int]]:
    """Packs of all epochs, one epoch after the other, and how many packs each has.

    `lengths` are those of the records `numbers`.
    """
    compact = np.full(len(mixture.records), -1, np.int64)
    compact[numbers] = np.arange(len(numbers))
    members, ends, epochs = [], [], []
    for epoch in range(job.epochs):
        order = compact[mixture.epoch_records(epoch)]
        packs = plan_packs(lengths, order[order >= 0], job.pack)
        ends.append(packs.ends + sum(map(len, members)))
        members.append(numbers[packs.members])
        epochs.append(len(packs.ends))
    return Packs(np.concatenate(members), np.concatenate(ends)), epochs


def _source_of_file(job: PrepareJob, records: RecordSource) -> dict[str, str]:
    """The data set of every file."""
    return {
        file: source.title
        for source, files in zip(leaves(job.data.sources), records.files, strict=True)
        for file, _ in files
    }


def _write_report(folder: epath.Path, report: dict[str, Any]) -> None:
    write_json(folder / "report.json", report)
    write_file(folder / "report.md", to_markdown(report).encode())


# --- packed shards --------------------------------------------------------------------------------


def _write_packed_shards(worker: Worker, plan: PackPlan, runner: Runner, console: Console) -> None:
    """Writes the encoded packs, and adds to the plan that they are there."""
    job, folder, records = worker.job, worker.job.folder, worker.records
    digest, files = plan.info.digest, -(-plan.packs // job.packs_per_file)
    own = packed_folder(digest, job.packs_per_file)
    (folder / own).mkdir(exist_ok=True)
    paths = [
        epath.Path(packed_file(folder, digest, job.packs_per_file, number))
        for number in range(files)
    ]
    there = {path.name for path in (folder / own).iterdir()}
    done = {number for number, path in enumerate(paths) if path.name in there}
    _run(runner, worker, "pack", _missing(plan.packs, job.packs_per_file, done), console)
    late = dict.fromkeys(  # a record may be in several packs
        line
        for path in paths
        for line in packed_rejects_file(path).read_bytes().splitlines(keepends=True)
    )
    lines = [*read_rejected(folder, -(-len(records) // job.shard_size)), *late]
    write_file(folder / REJECTED, b"".join(lines))
    report = read_json(folder / "report.json")
    report["rejected"] = count_rejected(lines, _source_of_file(job, records))
    report["packed"] = {
        "files": files,
        "bytes": sum(map(size, paths)),
        "rejected": len(late),
    }
    _write_report(folder, report)
    info = plan.info._replace(packed_files=files, packs_per_file=job.packs_per_file)
    write_json(folder / DONE, info._asdict())
    for other in folder.glob("packed-*"):  # of an earlier plan
        if other.name != own:
            other.rmtree()
