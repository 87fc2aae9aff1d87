"""Training by a plan: one order for any workers, processes and batch splits; rejected samples."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ov2_jax.config.build import experiment_from
from ov2_jax.config.codec import CodecConfig
from ov2_jax.config.data import SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import IGNORE
from ov2_jax.core.errors import DataError
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.data.loader.resume import share_state
from ov2_jax.data.plan.folder import DONE, PackPlan
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.run import prepare
from ov2_jax.data.prepare.runners import ProcessRunner
from ov2_jax.quickstart.dataset import write_dataset
from ov2_jax.training.checkpoint import CheckpointError
from tests.data.files import chat, clip, write_jsonl
from tests.data.loader.test_loader import assert_same, take, write_data
from tests.data.prepare.folders import CONFIG, PACK, prepared
from tests.tiny import config_of, data_config, run, tiny_model, tokenizer

GOOD = {f"good-{i}" for i in range(40)}


def loader(path, plan, *, pack=PACK, packs=2, seed=7, process=(0, 1), rejects=None, **config):
    return make_loader(
        data_config(path, **{**CONFIG, "plan": str(plan), **config}),
        pack,
        tiny_model(),
        tokenizer(),
        packs_per_step=packs,
        seed=seed,
        process_index=process[0],
        process_count=process[1],
        rejects_path=rejects or Path(path).parent / "rejected.jsonl",
    )


def ids(steps) -> list[tuple[str, ...]]:
    """Samples of each pack, in order."""
    return [pack for _, info in steps for pack in info.sample_ids]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plan(data) -> Path:
    prepared(data, data.parent / "plan")
    return data.parent / "plan"


@pytest.fixture(scope="module")
def steps(data, plan) -> list:
    """Twelve steps of one process with threads: three epochs of the plan."""
    assert PackPlan(plan).packs == 8
    return take(loader(data, plan), 12)


# --- order ----------------------------------------------------------------------------------------


def test_every_epoch_has_each_sample_once_in_another_order(steps):
    order = ids(steps)
    for epoch in range(3):
        packs = order[8 * epoch : 8 * epoch + 8]
        # Only decoding finds the picture that is cut off: its place stays empty.
        assert Counter(name for pack in packs for name in pack) == Counter(GOOD)
    assert len({tuple(order[8 * e : 8 * e + 8]) for e in range(3)}) == 3
    assert Counter(order[:8]) == Counter(order[8:16])  # the same packs


def test_steps_have_the_packs_shape_and_are_counted(steps):
    for step, (batch, info) in enumerate(steps):
        assert batch.tokens.shape == (2, 2, 256)
        assert info.tokens == (batch.segment_ids > 0).sum() <= info.token_slots == 1024
        assert info.supervised_tokens == (batch.targets != IGNORE).sum()
        assert info.patches == 4 * (batch.vision_index >= 0).sum()
        if step % 4 == 3:  # an epoch
            done = step // 4 + 1
            assert (info.seen, info.rejected) == (41 * done, done)
            assert info.mixture[0][:2] == ("train", 40 * done)
    used = sum(info.tokens for _, info in steps) / sum(info.token_slots for _, info in steps)
    assert used > 0.75


def test_seeds_and_no_shuffling_give_other_orders(data, plan, steps):
    other = ids(take(loader(data, plan, seed=8), 4))
    assert other != ids(steps[:4]) and Counter(other) == Counter(ids(steps[:4]))
    out = data.parent / "plain"
    prepared(data, out, shuffle=False)
    plain = ids(take(loader(data, out, shuffle=False), 8))
    assert plain[:8] == plain[8:]


def test_batches_do_not_depend_on_workers_nor_on_a_restart(data, plan, steps):
    """One worker, then two, then threads, each from the state of the one before."""
    actual = []
    state = None
    for workers, count in ((1, 3), (2, 4), (0, 5)):
        iterator = loader(data, plan, num_workers=workers)
        if state is not None:
            iterator.set_state(state)
            assert iterator.get_state() == state
        actual += [next(iterator) for _ in range(count)]
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
    assert len(json.dumps(state)) < 500
    assert_same(actual, steps)


def together(data, plan, count: int, packs: int, steps: int, states: list | None):
    """Steps of `count` processes: the packs in global order, and their states."""
    shares, after = [], []
    for index in range(count):
        iterator = loader(data, plan, packs=packs, process=(index, count))
        if states is not None:
            iterator.set_state(share_state(states, index, count))
        shares.append([next(iterator) for _ in range(steps)])
        after.append(json.loads(json.dumps(iterator.get_state())))
        iterator.close()
    taken = [share[step] for step in range(steps) for share in shares]
    return ids(taken), np.concatenate([batch.tokens for batch, _ in taken]), after


def test_a_run_goes_on_with_other_processes_and_batch_splits(data, plan, steps):
    """1 process of 2 packs, 2 of 4, 4 of 4, 1 of 3: one order, nothing skipped or repeated."""
    names, tokens, states = [], [], None
    for count, packs, number in ((1, 2, 2), (2, 4, 2), (4, 4, 1), (1, 3, 2)):
        found, arrays, states = together(data, plan, count, packs, number, states)
        names += found
        tokens.append(arrays)
    assert len(names) == 22 and names == ids(steps)[:22]
    expected = np.concatenate([batch.tokens for batch, _ in steps])[:22]
    np.testing.assert_array_equal(np.concatenate(tokens), expected)
    # Counts of all processes were added up in the first one, and the last run has only that.
    reasons = states[0]["reasons"]["bad_image"]
    assert states[0]["counts"]["seen"] == sum(map(len, names)) + reasons
    assert states[0]["given"]["train"][0] == sum(map(len, names))


def without_plan(data):
    return make_loader(
        data_config(data, **CONFIG),
        PACK,
        tiny_model(),
        tokenizer(),
        packs_per_step=2,
        seed=7,
        rejects_path=data.parent / "rejected.jsonl",
    )


def test_the_state_of_other_runs_is_refused(data, plan):
    iterator = loader(data, plan)
    state = iterator.get_state()
    iterator.close()
    prepared(data, data.parent / "other", sources=(SourceConfig(str(data), epochs=2),))
    more = {"sources": (SourceConfig(str(data), epochs=2),)}
    for other, words in (
        (loader(data, plan, seed=9), "made with seed 7 but this run has 9"),
        (loader(data, data.parent / "other", **more), "made with plan [0-9a-f]+ but this"),
        (without_plan(data), "made with plan [0-9a-f]+ but this run has None"),
    ):
        with pytest.raises(DataError, match=words):
            other.set_state(state)
        other.close()
    plain = without_plan(data)
    iterator = loader(data, plan)
    with pytest.raises(DataError, match="made with plan None but this run has [0-9a-f]+"):
        iterator.set_state(plain.get_state())
    with pytest.raises(DataError, match="that of 1 processes but this run has 2; without"):
        share_state([plain.get_state()], 0, 2)
    plain.close()
    iterator.close()


# --- packed shards --------------------------------------------------------------------------------


def test_packed_shards_give_the_same_steps_without_the_data(data, steps):
    folder = data.parent / "packed"
    prepared(data, folder, packed=True, packs_per_file=3)
    moved = data.parent.parent / "moved"
    shutil.copytree(folder, moved)
    rejects = moved / "rejected-in-training.jsonl"
    somewhere = moved / "not/there" / data.name
    for workers in (0, 2):
        iterator = loader(somewhere, moved, rejects=rejects, num_workers=workers)
        assert_same(take(iterator, 6), steps[:6])
    (entry,) = map(json.loads, rejects.read_text().splitlines())
    assert (entry["id"], entry["reason"]) == ("cut-jpeg", "bad_image")
    Path(PackPlan(moved).packed_files()[0]).unlink()
    with pytest.raises(DataError, match="run ov2_jax.data.prepare --packed-shards again"):
        loader(somewhere, moved)


# --- plans of something else ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pack": PackConfig(2, 128, PACK.vision_rows)}, "pack.seq_len 256, but this run has 128"),
        ({"pack": PackConfig(2, 256, ((8, 128),))}, "pack.vision_rows "),
        ({"max_pixels": 9000}, "data.max_pixels 14400, but this run has 9000"),
        ({"num_frames": 7}, "data.num_frames 6, but this run has 7"),
        ({"shuffle": False}, "data.shuffle True, but this run has False"),
        ({"plan": "no/such/folder"}, "data.plan is 'no/such/folder', which does not exist; run"),
    ],
)
def test_a_plan_of_another_config_is_refused(data, plan, changes, words):
    with pytest.raises(DataError, match=words) as error:
        loader(data, **{"plan": plan, **changes})
    assert "\n" not in str(error.value) and "ov2_jax.data.prepare" in str(error.value)


def test_a_plan_of_other_data_or_without_an_end_is_refused(data, plan, tmp_path):
    sources = (SourceConfig(str(data), cap=10),)
    with pytest.raises(DataError, match=r"data.sources\[0\].cap None, but this run has 10"):
        loader(data, plan, sources=sources)
    moved = tmp_path / "moved"
    shutil.copytree(data.parent, moved)
    take(loader(moved / data.name, moved / "plan"), 1)  # a data set may lie elsewhere
    with (moved / data.name).open("a") as file:
        file.write('{"id": "one more"}\n')
    with pytest.raises(DataError, match=r"\(44 records, \d+ bytes\)', but this run has"):
        loader(moved / data.name, moved / "plan")
    (moved / "plan" / DONE).unlink()
    with pytest.raises(DataError, match="where prepare has not finished; run"):
        loader(moved / data.name, moved / "plan")


# --- samples that changed since -------------------------------------------------------------------


def test_samples_that_changed_since_leave_their_places_empty(tmp_path):
    path = write_data(tmp_path, n=40, bad=False)
    prepared(path, tmp_path / "plan")
    options = {"shuffle": True, "max_reject_share": 1.0}
    before = take(loader(path, tmp_path / "plan", **options), 4)
    (tmp_path / "c.mp4").unlink()  # of every fifth sample
    clip(tmp_path / "c.mp4", 12, 6, height=96)  # other windows than planned
    (tmp_path / "a.png").unlink()  # of two in five
    after = take(loader(path, tmp_path / "plan", **options), 4)
    entries = [json.loads(x) for x in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    reasons = Counter(entry["reason"] for entry in entries)
    assert reasons == {"missing_file": 16, "plan_mismatch": 8}
    detail = next(e["detail"] for e in entries if e["reason"] == "plan_mismatch")
    assert "in the plan" in detail and "prepare it anew" in detail
    gone = {entry["id"] for entry in entries}
    assert after[-1][1].rejected == 24 and after[-1][1].seen == 40
    for (batch, info), (other, other_info) in zip(before, after, strict=True):
        left = tuple(tuple(n for n in pack if n not in gone) for pack in info.sample_ids)
        assert other_info.sample_ids == left
        # Every token that is left stands where it stood.
        there = other.segment_ids > 0
        np.testing.assert_array_equal(other.tokens[there], batch.tokens[there])
        np.testing.assert_array_equal(other.targets[there], batch.targets[there])
        for rows, other_rows in zip(batch.vision, other.vision, strict=True):
            there = other_rows.segment_ids > 0
            np.testing.assert_array_equal(other_rows.patches[there], rows.patches[there])
    with pytest.raises(DataError, match="more than data.max_reject_share 0.3 allows"):
        take(loader(path, tmp_path / "plan"), 8)


def test_clips_too_short_for_the_codec_are_counted(tmp_path):
    clip(tmp_path / "c.mp4", 3, 6)
    samples = [{"messages": chat("<video>?", f"{i}"), "video": "c.mp4"} for i in range(6)]
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    codec = {
        "sources": (SourceConfig(str(path), video="codec"),),
        "codec": CodecConfig(max_pixels=6272),
    }
    report = prepared(path, tmp_path / "plan", **codec)
    packs = PackPlan(tmp_path / "plan").packs
    info = take(loader(path, tmp_path / "plan", packs=packs, **codec), 1)[0][1]
    assert report["uniform_fallbacks"] == info.uniform_fallbacks == info.seen == 6


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, Path]:
    """The quickstart's data in small, and its plan for tests.runs."""
    root = tmp_path_factory.mktemp("runs")
    path = write_dataset(root / "data", train=120, heldout=7, workers=1).train_jsonl
    e = experiment_from(config_of(root / "unused", path))
    job = PrepareJob(e.data, e.pack, e.model, e.tokenizer, seed=e.seed, out=str(root / "plan"))
    with ProcessRunner(1) as processes:
        prepare(job, processes, console=Console(file=io.StringIO()))
    return path, root / "plan"


@pytest.mark.long
def test_a_training_run_by_a_plan_goes_on_with_fewer_processes(tmp_path, quickstart):
    """A checkpoint as two processes leave it; the run goes on as one, at the same place."""
    path, folder = quickstart
    changes = {"data.plan": str(folder)}
    run(tmp_path / "straight", path, steps=3, **{"checkpoint.every": 2}, **changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoints/3")
    item = tmp_path / "broken/checkpoints/2/loader"
    state = json.loads((item / "process_0-of-1.json").read_text())
    (item / "process_0-of-1.json").unlink()
    assert state["next"] == 16
    half = {**state, "counts": {"seen": 1}, "reasons": {}}
    seen = {"seen": state["counts"]["seen"] - 1}
    rest = {**state, "share": 1, "counts": seen, "given": {"train": [0, 0]}}
    (item / "process_0-of-2.json").write_text(json.dumps(half))
    with pytest.raises(CheckpointError, match="state of every process"):
        run(tmp_path / "broken", path, steps=3, **changes)
    (item / "process_1-of-2.json").write_text(json.dumps(rest))
    run(tmp_path / "broken", path, steps=3, **changes)
    last = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("straight", "broken")
    ]
    for name in ("step", "loss", "samples", "data/seen", "data/rejected"):
        assert last[0][name] == last[1][name], name
