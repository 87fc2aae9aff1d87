"""prepare: true lengths, the same bytes whoever works, restarts, and folders of other configs."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from ov2_jax.config.build import experiment_from
from ov2_jax.config.codec import CodecConfig
from ov2_jax.config.data import SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.packing.planning import Lengths
from ov2_jax.data.plan.folder import PackPlan
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.report import some_lengths
from ov2_jax.data.prepare.run import prepare
from ov2_jax.data.prepare.runners import ProcessRunner, beam_runner
from ov2_jax.data.prepare.worker import Worker
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sources.index import RecordSource
from tests.data.files import chat, write_jsonl
from tests.data.loader.test_loader import write_data
from tests.data.prepare.folders import CONFIG, PACK, content, job_of, prepared
from tests.programs import REPOSITORY
from tests.tiny import PROCESSOR, config_of, data_config, tiny_model, tokenizer

# Fields that tests.runs makes smaller, as the quickstart's config has them.
QUICKSTART = {"pack.rows": 8, "pack.vision_rows": ((13, 64),)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(data) -> Path:
    """Prepared in one process, without a break; with packed shards."""
    out = data.parent / "plan"
    prepared(data, out, packed=True, packs_per_file=3)
    return out


def test_lengths_are_those_of_encoding_and_the_plan_has_every_sample_once(data, folder):
    config = data_config(data, **CONFIG)
    records = RecordSource(config.sources)
    encoder = SampleEncoder(config, tiny_model(), tokenizer(), PACK, seed=7)
    plan = PackPlan(folder)
    planned = [int(r) for pack in range(plan.packs) for r in plan.members(pack)]
    usable = []
    for i in range(len(records)):
        sample = encoder(records[i])
        # A picture that breaks in the middle is found when it is decoded.
        if isinstance(sample, Rejected) and sample.reason != "bad_image":
            assert plan.size(i) == (0, ())
            continue
        usable.append(i)
        if not isinstance(sample, Rejected):
            assert plan.size(i) == (len(sample.tokens), tuple(sample.windows.tolist()))
    assert sorted(planned) == usable and plan.info.samples == len(usable) == 41


def test_the_report_has_the_rejected_samples_and_how_full_packs_are(data, folder):
    report = json.loads((folder / "report.json").read_text())
    assert (report["records"], report["usable"]) == (44, 41)
    assert report["rejected"] == {
        reason: {"train": 1}
        for reason in ("bad_image", "bad_json", "missing_file", "placeholder_mismatch")
    }
    entries = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [(e["id"], e["line"]) for e in entries] == [
        ("no-file", 4),
        ("no-mark", 21),
        ("train:31", 31),
        ("cut-jpeg", 12),  # found when packs were written
    ]
    plan = PackPlan(folder)
    sizes = [plan.size(int(r)) for pack in range(plan.packs) for r in plan.members(pack)]
    tokens = sum(s.tokens for s in sizes)
    assert report["tokens"] == tokens
    assert report["plan"]["utilisation_tokens"] == round(tokens / (plan.packs * 512), 4)
    patches = sum(sum(s.windows) for s in sizes)
    assert report["plan"]["utilisation_patches"] == round(patches / (plan.packs * 512), 4)
    assert report["sources"]["train"] == {
        "records": 44,
        "usable": 41,
        "tokens": tokens,
        "patches": patches,
    }
    rows = report["vision_rows"]
    assert rows["configured"] == [[4, 64], [2, 128]] and rows["proposed"]
    assert report["packed"]["rejected"] == 1  # of these four
    page = (folder / "report.md").read_text()
    assert "# 41 of 44 records" in page
    assert "## Rejected" in page and "| missing_file | train | 1 |" in page


def test_bytes_do_not_depend_on_workers(data, folder):
    out = data.parent / "two"
    prepared(data, out, workers=2, packed=True, packs_per_file=3)
    assert content(out) == content(folder)


def test_bytes_are_the_same_by_beam(data, folder):
    pytest.importorskip("apache_beam", reason="`make test` tests it in .venv-beam")
    out = data.parent / "beam"
    job = job_of(data, out, packs_per_file=3)
    runner = beam_runner("--runner=DirectRunner")
    prepare(job, runner, packed_shards=True, console=Console(file=io.StringIO()))
    assert content(out) == content(folder)


def test_without_beam_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'ov2_jax\[prepare\]'"):
        beam_runner("")


@pytest.mark.long
def test_a_killed_program_goes_on_where_it_was(tmp_path):
    """Killed between shards, its workers end by themselves; nothing that was done is done again.

    Any use of an accelerator, or of JAX's CPU, would end the program.
    """
    samples = [{"messages": chat(f"Say {i}.", f"{i}")} for i in range(1500)]
    path = write_jsonl(tmp_path / "many.jsonl", samples)
    out, shards = tmp_path / "out", tmp_path / "out/lengths"
    sources = repr(({"path": str(path)},))
    command = [sys.executable, "-m", "ov2_jax.data.prepare", "--config=configs/quickstart.py"]
    command += [f"--config.data.sources={sources}", f"--out={out}"]
    command += ["--num-workers=2", "--shard-size=1"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "none"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not shards.exists() or len(list(shards.glob("0*"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=30)[1]
    done = {p: p.stat().st_mtime_ns for p in shards.glob("0*")}
    assert 3 <= len(done) < 1500 and not (out / "plan.json").exists()
    (shards / ".00001.npz.123.part").write_bytes(b"half")

    experiment = experiment_from(config_of(tmp_path / "run", path, **QUICKSTART))
    job = PrepareJob(
        experiment.data,
        experiment.pack,
        experiment.model,
        experiment.tokenizer,
        seed=experiment.seed,
        out=str(out),
        shard_size=1,
    )
    straight = tmp_path / "straight"
    with ProcessRunner(1) as runner:
        prepare(job, runner, console=Console(file=io.StringIO()))
        prepare(job._replace(out=str(straight)), runner, console=Console(file=io.StringIO()))
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert content(out) == content(straight) and len(content(out)) == 1512


def test_packed_shards_come_later_and_a_broken_off_one_is_written_again(data, folder):
    out = data.parent / "later"
    prepared(data, out, packs_per_file=3)
    assert PackPlan(out).packed_files() == []
    prepared(data, out, packed=True, packs_per_file=3)
    assert content(out) == content(folder)
    Path(PackPlan(out).packed_files()[1]).unlink()
    prepared(data, out, packed=True, packs_per_file=3)
    assert content(out) == content(folder)


def test_another_mixture_is_planned_anew_from_the_same_lengths(data, folder):
    out = data.parent / "mixture"
    shutil.copytree(folder, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "lengths").iterdir()}
    sources = (SourceConfig(str(data), epochs=2),)
    assert prepared(data, out, sources=sources)["plan"]["samples"] == 82
    assert {p: p.stat().st_mtime_ns for p in (out / "lengths").iterdir()} == before
    assert (
        PackPlan(out).info.digest != PackPlan(folder).info.digest
        and not PackPlan(out).packed_files()
    )


def test_epochs_of_a_partly_drawn_data_set_have_other_samples(data):
    out = data.parent / "half"
    prepared(data, out, sources=(SourceConfig(str(data), epochs=0.5),), epochs=2)
    plan = PackPlan(out)
    assert len(plan.info.epochs) == 2
    first = [int(r) for pack in range(plan.info.epochs[0]) for r in plan.members(pack)]
    second = [int(r) for pack in range(plan.info.epochs[0], plan.packs) for r in plan.members(pack)]
    assert first and second and not set(first) & set(second)
    assert len(first + second) == plan.info.samples == 41


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_pixels": 9000}, "data.max_pixels 14400, but this run has 9000"),
        ({"system_prompt": "Hi."}, "data.system_prompt 'You are a helpful assistant.', but"),
        ({"pack": dataclasses.replace(PACK, seq_len=128)}, "pack.seq_len 256, but this run has"),
        ({"shard_size": 9}, "--shard-size 8, but this run has 9"),
    ],
)
def test_a_folder_of_another_config_is_refused(data, folder, changes, words):
    before = content(folder)
    with pytest.raises(DataError, match=words) as error:
        prepared(data, folder, **changes)
    assert str(error.value).endswith(f"or remove {folder} to make it anew.")
    assert "\n" not in str(error.value) and content(folder) == before


def test_other_data_seeds_and_tokenizers_are_refused(tmp_path):
    path = write_data(tmp_path, n=6, bad=False)
    sources = (SourceConfig(str(path), video="alternate"),)
    alternate = {"sources": sources, "codec": CodecConfig(max_pixels=6272)}
    prepared(path, tmp_path / "out", **alternate)
    with pytest.raises(DataError, match="seed 7, but this run has 8"):
        prepared(path, tmp_path / "out", seed=8, **alternate)
    with pytest.raises(DataError, match="video 'alternate', but this run has 'uniform'"):
        prepared(path, tmp_path / "out", codec=alternate["codec"])
    other = tmp_path / "tokenizer"
    shutil.copytree(PROCESSOR / "tokenizer", other)
    text = json.loads((other / "tokenizer.json").read_text())
    text["added_tokens"][-1]["single_word"] = True
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="tokenizer '[0-9a-f]+', but this run has '[0-9a-f]+'"):
        prepared(path, tmp_path / "out", tokenizer=str(other), **alternate)
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"file 1 'train.jsonl \(6 records, \d+ bytes\)', but"):
        prepared(path, tmp_path / "out", **alternate)


def test_a_folder_with_other_files_and_data_without_a_usable_record_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("Q", "")}] * 5)
    with pytest.raises(DataError, match="holds other files; name a new folder as --out"):
        prepared(path, tmp_path)
    with pytest.raises(DataError, match=r"None of the 5 records can be used \(empty_answer 5\)"):
        prepared(path, tmp_path / "out")
    with pytest.raises(DataError, match="does not exist or is no file"):
        prepared(tmp_path / "none.jsonl", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_dropped_rounds_are_counted_and_measured(tmp_path):
    samples = [{"messages": chat("Q", "A", "Q", "A " * 500)}, {"messages": chat("Q", "A")}]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    report = prepared(path, tmp_path / "out", on_long="drop_rounds")
    assert report["dropped_rounds"] == 1 and report["usable"] == 2
    plan = PackPlan(tmp_path / "out")
    assert plan.size(0) == plan.size(1)


def test_worker_processes_do_not_import_training_code():
    code = "import sys, ov2_jax.data.prepare.runners; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    packages = {name.split(".")[0] for name in found.stdout.split()}
    rooms = {name for name in found.stdout.split() if name.startswith("ov2_jax.")}
    assert "ov2_jax.data.plan.lengths" in rooms and not packages & {"flax", "optax", "orbax"}
    assert {room.split(".")[1] for room in rooms} <= {"core", "config", "data"}


class _Dying(Worker):
    """As the kernel ends a process of too much memory."""

    def measure(self, number: int) -> None:
        os._exit(9)


def test_a_worker_that_dies_is_one_sentence(data, tmp_path):
    with (
        ProcessRunner(2) as runner,
        pytest.raises(DataError, match="a smaller --num-workers") as error,
    ):
        runner(_Dying(job_of(data, tmp_path)), "measure", [0, 1], lambda number: None)
    assert "\n" not in str(error.value)


def test_tables_are_mapped_and_empty_ones_work(tmp_path):
    """Text alone: no windows at all, and no vision rows."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat(f"Q{i}", "A")} for i in range(9)])
    report = prepared(path, tmp_path / "out", pack=PackConfig(1, 128))
    assert report["patches"] == 0 and report["vision_rows"]["proposed"] == []
    plan = PackPlan(tmp_path / "out")
    assert isinstance(plan.members(0).base, np.memmap) or isinstance(plan.members(0), np.memmap)
    assert Counter(int(r) for p in range(plan.packs) for r in plan.members(p)) == Counter(range(9))


def test_vision_rows_are_proposed_from_some_of_many_records():
    """Every record of the part has its own windows, and the largest are in it."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, 30_000)
    ends = np.cumsum(counts)
    windows = rng.integers(1, 400, ends[-1]).astype(np.int32)
    windows[12_345] = 4000
    tokens = np.arange(30_000, dtype=np.int32) + 1  # a record's tokens tell its number
    part = some_lengths(Lengths(tokens, windows, ends))
    assert 20_000 <= len(part.tokens) <= 21_000 and part.windows.max() == 4000
    for i in range(0, len(part.tokens), 500):
        record = int(part.tokens[i]) - 1
        begin, end = (int(part.ends[i - 1]) if i else 0), int(part.ends[i])
        np.testing.assert_array_equal(
            part.windows[begin:end], windows[ends[record] - counts[record] : ends[record]]
        )
