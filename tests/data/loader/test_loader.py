"""The loader: same batches for any number of workers, exact resume, shares, rejected samples."""

import json
from collections import Counter

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave

from ov2_jax.config.data import SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import IGNORE
from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.data.rejected import Rejected, RejectLog
from tests.data.files import chat, clip, picture, write_jsonl
from tests.tiny import data_config, tiny_model, tokenizer

PACK = PackConfig(rows=2, seq_len=256, vision_rows=((4, 64), (2, 128)))
BAD = ("no-file", "cut-jpeg", "no-mark", "bad-json")


def write_data(root, n: int = 40, bad: bool = True):
    """n good samples of five kinds, and between them four that cannot be used."""
    image = picture(root / "a.png", 60, 90)
    picture(root / "b.jpg", 112, 84)
    clip(root / "c.mp4", 12, 6)
    (root / "cut.jpg").write_bytes((root / "b.jpg").read_bytes()[:-300])
    assert image.exists()
    samples = []
    for i in range(n):
        media = (
            {"messages": chat(f"Say {i}.", f"{i} " * (i + 1))},
            {"messages": chat(f"<image>Which {i}?", f"It is {i}."), "image": "a.png"},
            {"messages": chat("<image>\n<image>?", f"Both, {i}."), "images": ["b.jpg", "a.png"]},
            {"messages": chat("<video>When?", f"At {i}."), "video": "c.mp4"},
            {"messages": chat("One", "two", "<image>three", "four"), "image": "b.jpg"},
        )[i % 5]
        samples.append({"id": f"good-{i}", **media})
    if bad:
        asked = chat("<image>?", "A")
        samples.insert(3, {"id": BAD[0], "messages": asked, "image": "none.png"})
        samples.insert(11, {"id": BAD[1], "messages": asked, "image": "cut.jpg"})
        samples.insert(20, {"id": BAD[2], "messages": chat("?", "A"), "image": "a.png"})
        samples.insert(30, '{"id": "bad-json", ')
    return write_jsonl(root / "train.jsonl", samples)


def loader(path, *, pack=PACK, packs=2, seed=7, process=(0, 1), rejects=None, **config):
    config = {"lookahead": 12, "max_reject_share": 0.3, "num_frames": 6} | config
    return make_loader(
        data_config(path, **config),
        pack,
        tiny_model(),
        tokenizer(),
        packs_per_step=packs,
        seed=seed,
        process_index=process[0],
        process_count=process[1],
        rejects_path=rejects or path.parent / "rejected.jsonl",
    )


def take(iterator, n: int) -> list:
    try:
        return [next(iterator) for _ in range(n)]
    finally:
        iterator.close()


def assert_same(actual: list, expected: list):
    assert len(actual) == len(expected)
    for (batch, info), (other, other_info) in zip(actual, expected, strict=True):
        assert info == other_info
        jax.tree.map(np.testing.assert_array_equal, batch, other)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def steps(data):
    """Ten steps of the plain run with threads."""
    return take(loader(data), 10)


def test_batches_have_the_packs_shape_and_the_info_counts_them(steps):
    seen = 0
    for batch, info in steps:
        assert batch.tokens.shape == batch.vision_index.shape == (2, 2, 256)
        assert [v.patches.shape for v in batch.vision] == [(2, 4, 64, 588), (2, 2, 128, 588)]
        assert info.tokens == (batch.segment_ids > 0).sum() <= info.token_slots == 1024
        assert info.class_patches == tuple((v.segment_ids > 0).sum() for v in batch.vision)
        assert info.class_slots == (512, 512) and info.patch_slots == 1024
        assert info.patches == sum(info.class_patches) == 4 * (batch.vision_index >= 0).sum()
        assert info.supervised_tokens == (batch.targets != IGNORE).sum()
        assert info.samples == sum(map(len, info.sample_ids)) > 0
        assert info.dropped_rounds == 0 and seen < info.seen
        seen = info.seen
    assert steps[-1][1].rejected >= 4
    used = sum(info.tokens for _, info in steps) / sum(info.token_slots for _, info in steps)
    assert used > 0.5


def test_every_epoch_has_each_sample_once_in_another_order(data):
    # One sample a row and a pack, and no look-ahead: the order of packs is the order of reading.
    pack = PackConfig(1, 256, ((2, 64), (1, 128)), max_samples_per_row=1)
    infos = [i for _, i in take(loader(data, pack=pack, packs=1, lookahead=1), 80)]
    order = [name for info in infos for ids in info.sample_ids for name in ids]
    good = {f"good-{i}" for i in range(40)}
    assert set(order[:40]) == set(order[40:]) == good
    assert order[:40] != order[40:]
    plain = [i for _, i in take(loader(data, pack=pack, packs=1, lookahead=1, shuffle=False), 41)]
    assert [i.sample_ids[0][0] for i in plain] == [f"good-{i % 40}" for i in range(41)]


def test_processes_share_the_samples(data):
    pack = PackConfig(1, 256, ((2, 64), (1, 128)), max_samples_per_row=1)
    shares = []
    for index in range(2):
        options = {"pack": pack, "packs": 2, "lookahead": 1, "process": (index, 2)}
        iterator = loader(data, **options)
        infos, names = [], []
        while not infos or infos[-1].seen < 22:  # half of the 44 samples
            batch, info = next(iterator)
            assert batch.tokens.shape == (1, 1, 256)
            infos.append(info)
            names += info.sample_ids[0]
        iterator.close()
        shares.append(names)
    assert not set(shares[0]) & set(shares[1])
    assert len(shares[0] + shares[1]) == 40
    names = sorted(p.name for p in data.parent.glob("rejected-*.jsonl"))
    assert names == ["rejected-00000.jsonl", "rejected-00001.jsonl"]


def test_seeds_give_other_orders(data, steps):
    other = take(loader(data, seed=8), 1)
    assert other[0][1].sample_ids != steps[0][1].sample_ids


# --- resume ---------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_workers_nor_on_a_restart(data, steps):
    """One worker, then a restart with two, then one with threads; also in the other order."""
    iterator = loader(data, num_workers=1)
    actual = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    iterator = loader(data, num_workers=2)
    iterator.set_state(state)
    actual += [next(iterator) for _ in range(4)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert len(json.dumps(state)) < 1000
    iterator = loader(data)
    iterator.set_state(state)
    assert iterator.get_state() == state
    assert_same(actual + take(iterator, 3), steps)


def test_the_state_is_of_what_was_handed_out(data, steps):
    """Steps are prepared ahead; every state must still resume right behind its own step."""
    iterator = loader(data)
    states = [iterator.get_state()]
    for _ in range(5):
        next(iterator)
        states.append(iterator.get_state())
    for i in (3, 0, 5):
        iterator.set_state(states[i])
        assert_same([next(iterator)], steps[i : i + 1])
    iterator.close()


def test_state_goes_through_an_orbax_checkpoint(data, steps, tmp_path):
    iterator = loader(data)
    for _ in range(4):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(4, args=ocp.args.Composite(data=CheckpointSave(iterator)))
        manager.wait_until_finished()
        iterator.close()
        fresh = loader(data)
        manager.restore(4, args=ocp.args.Composite(data=CheckpointRestore(fresh)))
    assert_same(take(fresh, 3), steps[4:7])


def test_a_state_of_other_data_is_refused(data):
    iterator = loader(data)
    state = iterator.get_state()
    iterator.close()
    for changes, words in (
        ({"seed": 9}, "made with seed 7 but this run has 9"),
        ({"process": (1, 2)}, "process_index 0"),
        ({"shuffle": False}, "shuffle True"),
    ):
        other = loader(data, **changes)
        with pytest.raises(DataError, match=words):
            other.set_state(state)
        other.close()


def test_a_waiting_sample_that_vanished_is_rejected(tmp_path):
    path = write_data(tmp_path, bad=False)
    iterator = loader(path)
    next(iterator)
    state = iterator.get_state()
    iterator.close()
    (tmp_path / "a.png").unlink()
    iterator = loader(path, max_reject_share=1.0)
    iterator.set_state(state)
    info = next(iterator)[1]
    iterator.close()
    assert info.rejected > 0
    lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"missing_file"}


# --- rejected samples -----------------------------------------------------------------------------


def test_rejects_are_listed_once_over_epochs_and_restarts(tmp_path):
    path = write_data(tmp_path)
    log = tmp_path / "out" / "rejected.jsonl"
    for _ in range(2):
        last = take(loader(path, rejects=log), 10)[-1][1]
    assert last.seen > 2 * 44 and last.rejected >= 8  # at least two epochs
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert Counter(e["reason"] for e in entries) == Counter(
        ["missing_file", "bad_image", "placeholder_mismatch", "bad_json"]
    )
    assert {e["line"] for e in entries} == {4, 12, 21, 31}
    assert {e["file"] for e in entries} == {str(path)}
    assert {e["id"] for e in entries} == {"no-file", "cut-jpeg", "no-mark", "train:31"}


def test_too_many_rejects_stop_the_run(tmp_path):
    path = write_data(tmp_path)
    iterator = loader(path, max_reject_share=0.05, reject_check_after=20)
    with pytest.raises(DataError) as error:
        take(iterator, 50)
    text = str(error.value)
    assert "samples were rejected" in text and "data.max_reject_share 0.05" in text
    assert "rejected.jsonl" in text and "line" in text


def test_a_few_early_rejects_do_not_stop_the_run(tmp_path):
    asked = chat("<image>?", "A")
    bad = [{"messages": asked, "image": "none.png"}]
    good = [{"messages": chat("Q", f"A {i}")} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", bad + good)
    options = {"shuffle": False, "lookahead": 4, "max_reject_share": 0.1}
    take(loader(path, reject_check_after=20, **options), 1)
    with pytest.raises(DataError, match="1 of 1 samples"):
        take(loader(path, reject_check_after=1, **options), 1)


def test_data_without_one_usable_sample_ends(tmp_path):
    samples = [{"messages": chat("Q", "")}] * 5
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    with pytest.raises(DataError, match="a whole epoch had no usable sample"):
        take(loader(path, max_reject_share=1.0), 1)


def test_dropped_rounds_are_counted(tmp_path):
    samples = [{"messages": chat("Q", "A", "Q", "A " * 500)}] * 5
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    info = take(loader(path, on_long="drop_rounds"), 1)[0][1]
    assert info.dropped_rounds == info.seen > 0 and info.rejected == 0


def test_the_log_survives_a_killed_writer_and_refuses_a_foreign_file(tmp_path):
    path = tmp_path / "rejected.jsonl"
    one = Rejected("bad_json", "détail \ud800", "id", "file", 1)
    assert RejectLog(path).add(one)
    with path.open("ab") as file:
        file.write(b'{"reason": "bad_j')
    log = RejectLog(path)
    assert not log.add(one) and log.add(one._replace(line=2))
    lines = [json.loads(line)["line"] for line in path.read_bytes().splitlines()]
    assert lines == [1, 2]
    path.write_text("hello\n")
    with pytest.raises(DataError, match="is not a list of rejected samples"):
        RejectLog(path)


def test_bad_arguments(data):
    for changes, words in (
        ({"packs": 3, "process": (0, 2)}, "packs_per_step is 3"),
        ({"packs": 2, "process": (2, 2)}, "process_index 2"),
        ({"pack": PackConfig(1, 64, ((1, 30),))}, "multiple of 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            loader(data, **changes)
    with pytest.raises(DataError, match="does not exist"):
        loader(data.parent / "none.jsonl")


def test_several_sources_are_mixed(data, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "x", "messages": chat("Q", "A")}] * 40)
    sources = (SourceConfig(str(data)), SourceConfig(str(more)))
    infos = [i for _, i in take(loader(data, sources=sources), 2)]
    names = [n for i in infos for ids in i.sample_ids for n in ids]
    assert "x" in names and any(n.startswith("good-") for n in names)
