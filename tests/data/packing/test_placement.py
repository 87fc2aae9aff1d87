"""Placement on lengths, and the arrays of a pack."""

import numpy as np
import pytest

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import IGNORE
from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.build import build_pack
from ov2_jax.data.packing.placement import fits_alone, place_pack
from ov2_jax.data.sample import EncodedSample, SampleSize
from tests.tiny import PAD, tiny_model

PACK = PackConfig(rows=3, seq_len=100, vision_rows=((4, 32), (2, 128)))


def random_sizes(seed: int, n: int) -> list[SampleSize]:
    rng = np.random.default_rng(seed)
    sizes = []
    for _ in range(n):
        windows = tuple(4 * int(w) for w in rng.integers(1, 20, rng.integers(0, 4)))
        tokens = sum(windows) // 4 + 2 * len(windows) + int(rng.integers(4, 30))
        sizes.append(SampleSize(tokens, windows))
    return [s for s in sizes if fits_alone(s, PACK)]


def check(candidates, placements, pack):
    """No overlap, nothing over the edge, everything whole: counted slot by slot."""
    text = np.zeros((pack.rows, pack.seq_len), int)
    rows = [np.zeros((r, w), int) for r, w in pack.vision_rows]
    for p in placements:
        tokens, windows = candidates[p.sample]
        assert p.offset + tokens <= pack.seq_len
        text[p.row, p.offset : p.offset + tokens] += 1
        assert len(p.windows) == len(windows)
        for w, patches in zip(p.windows, windows, strict=True):
            assert w.offset + patches <= pack.vision_rows[w.row_class][1]
            rows[w.row_class][w.row, w.offset : w.offset + patches] += 1
    assert text.max() <= 1 and all(r.max() <= 1 for r in rows)
    assert len({p.sample for p in placements}) == len(placements)


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_valid_and_no_sample_waits_forever(seed):
    waiting = list(enumerate(random_sizes(seed, 150)))
    arrived, served, packs = [], [], 0
    while waiting or arrived:
        while waiting and len(arrived) < 16:
            arrived.append(waiting.pop(0))
        sizes = [size for _, size in arrived]
        placements = place_pack(sizes, PACK)
        check(sizes, placements, PACK)
        assert placements[0].sample == 0  # the oldest
        gone = {p.sample for p in placements}
        served += [arrived[i][0] for i in gone]
        arrived = [a for i, a in enumerate(arrived) if i not in gone]
        packs += 1
    assert sorted(served) == list(range(len(served)))


def test_nothing_that_still_fits_is_left_out():
    for seed in range(10):
        sizes = random_sizes(seed, 40)
        placements = place_pack(sizes, PACK)
        free = [100] * 3
        for p in placements:
            free[p.row] -= sizes[p.sample].tokens
        left = set(range(len(sizes))) - {p.sample for p in placements}
        assert all(sizes[i].tokens > max(free) for i in left if not sizes[i].windows)


def test_placement_is_a_pure_function():
    sizes = random_sizes(0, 60)
    assert place_pack(sizes, PACK) == place_pack(list(sizes), PACK)


def test_windows_take_the_smallest_class_with_room():
    pack = PackConfig(1, 1000, ((2, 32), (1, 128)))
    (p,) = place_pack([SampleSize(50, (20, 32, 100, 12))], pack)
    assert [w.row_class for w in p.windows] == [0, 0, 1, 0]
    # The small class is full: the rest goes to the larger one instead of waiting.
    (p,) = place_pack([SampleSize(50, (32, 32, 32))], pack)
    assert sorted(w.row_class for w in p.windows) == [0, 0, 1]


def test_best_fit_fills_the_fullest_row():
    pack = PackConfig(2, 100)
    placed = place_pack([SampleSize(60, ()), SampleSize(50, ()), SampleSize(40, ())], pack)
    assert [(p.sample, p.row, p.offset) for p in placed] == [(0, 0, 0), (1, 1, 0), (2, 0, 60)]


def test_a_failed_sample_leaves_no_trace():
    """Its first windows found room, its last did not; others must get that room."""
    pack = PackConfig(1, 100, ((2, 32),))
    sizes = [SampleSize(30, (16,)), SampleSize(40, (32, 20)), SampleSize(30, (32,))]
    assert {p.sample for p in place_pack(sizes, pack)} == {0, 2}


def test_a_row_takes_at_most_so_many_samples():
    pack = PackConfig(2, 100, max_samples_per_row=3)
    assert len(place_pack([SampleSize(1, ())] * 10, pack)) == 6


def test_what_can_never_fit_is_an_error():
    assert not fits_alone(SampleSize(101, ()), PACK)
    assert not fits_alone(SampleSize(10, (132,)), PACK)
    assert not fits_alone(SampleSize(90, (64,) * 5), PACK)
    assert fits_alone(SampleSize(90, (64,) * 4), PACK)
    with pytest.raises(DataError, match="101 tokens"):
        place_pack([SampleSize(101, ())], PACK)
    assert place_pack([], PACK) == []


def test_utilisation_on_a_mixture():
    """Pictures of many sizes, clips and text, in classes that suit them."""
    rng = np.random.default_rng(0)
    sizes = []
    for kind in rng.choice(3, 4000, p=(0.2, 0.55, 0.25)):
        if kind == 0:
            sizes.append(SampleSize(int(rng.integers(20, 800)), ()))
        elif kind == 1:
            area = np.exp(rng.uniform(np.log(60), np.log(1560), rng.integers(1, 4)))
            windows = tuple(4 * int(a) for a in area)
            sizes.append(SampleSize(sum(windows) // 4 + int(rng.integers(50, 600)), windows))
        else:
            frames = int(rng.choice((8, 16, 32)))
            sizes.append(SampleSize(frames * 204 + 100, (4 * 784,) * (frames // 4)))
    pack = PackConfig(1, 32768, ((14, 3136), (8, 6400)))
    waiting, at, packs, tokens, patches = [], 0, 0, 0, 0
    while at < len(sizes):
        take = 64 - len(waiting)
        waiting, at = waiting + sizes[at : at + take], at + take
        gone = {p.sample for p in place_pack(waiting, pack)}
        tokens += sum(waiting[i].tokens for i in gone)
        patches += sum(sum(waiting[i].windows) for i in gone)
        waiting = [s for i, s in enumerate(waiting) if i not in gone]
        packs += 1
    # Here the vision rows are what fills up; text follows from the mixture.
    assert patches / (packs * pack.patch_slots) > 0.97
    assert tokens / (packs * pack.token_slots) > 0.85


# --- arrays ---------------------------------------------------------------------------------------


def sample(name: str, n: int, windows: tuple[int, ...], seed: int) -> EncodedSample:
    rng = np.random.default_rng(seed)
    model = tiny_model()
    total = sum(windows)
    tokens = rng.integers(10, 900, n).astype(np.int32)
    places = np.sort(rng.choice(n - 2, total // 4, replace=False))
    tokens[places] = PAD
    mask = np.zeros(n, bool)
    mask[-2:] = True
    return EncodedSample(
        id=name,
        source="s",
        file="f",
        line=1,
        task="",
        tokens=tokens,
        loss_mask=mask,
        windows=np.array(windows, np.int32),
        patches=rng.integers(0, 256, (total, model.vision.patch_dim), np.uint8),
        patch_positions=rng.integers(0, 50, (total, 3)).astype(np.int32),
    )


def test_a_pack_gives_every_sample_back():
    model = tiny_model()
    samples = [
        sample("a", 60, (32, 12), 0),
        sample("b", 30, (), 1),
        sample("c", 50, (100,), 2),
        sample("d", 35, (8, 8, 8), 3),
        sample("e", 40, (16,), 4),
    ]
    sizes = [SampleSize(len(s.tokens), tuple(s.windows.tolist())) for s in samples]
    placements = place_pack(sizes, PACK)
    assert len(placements) == 5
    batch, info = build_pack(samples, placements, PACK, model)
    unit = model.vision.merge_unit
    # Every merged token of the pack, as the model flattens them.
    patches = np.concatenate([v.patches.reshape(-1, unit, 588) for v in batch.vision])
    positions = np.concatenate([v.patch_positions.reshape(-1, unit, 3) for v in batch.vision])
    used = np.zeros(len(patches), int)
    text_used = np.zeros((PACK.rows, PACK.seq_len), bool)
    for p in placements:
        s = samples[p.sample]
        here = (p.row, slice(p.offset, p.offset + len(s.tokens)))
        text_used[here] = True
        np.testing.assert_array_equal(batch.tokens[here], s.tokens)
        np.testing.assert_array_equal(batch.positions[here], np.arange(len(s.tokens)))
        assert len(set(batch.segment_ids[here].tolist())) == 1 and batch.segment_ids[here][0] > 0
        targets = np.full(len(s.tokens), IGNORE)
        targets[:-1] = np.where(s.loss_mask[1:], s.tokens[1:], IGNORE)
        np.testing.assert_array_equal(batch.targets[here], targets)
        index = batch.vision_index[here]
        np.testing.assert_array_equal(index >= 0, s.tokens == PAD)
        index = index[index >= 0]
        used[index] += 1
        np.testing.assert_array_equal(patches[index].reshape(-1, 588), s.patches)
        np.testing.assert_array_equal(positions[index].reshape(-1, 3), s.patch_positions)
        # Each window lies whole in one row, under a number that no other window of the row has.
        for w, size in zip(p.windows, s.windows.tolist(), strict=True):
            ids = batch.vision[w.row_class].segment_ids[w.row]
            number = ids[w.offset]
            assert number > 0 and (ids == number).sum() == size
            assert (ids[w.offset : w.offset + size] == number).all()
    assert used.max() == 1
    # Padding carries nothing.
    empty = ~text_used
    assert not batch.tokens[empty].any() and not batch.segment_ids[empty].any()
    assert (batch.targets[empty] == IGNORE).all() and (batch.vision_index[empty] == -1).all()
    for v in batch.vision:
        assert not v.patches[v.segment_ids == 0].any()
        assert not v.patch_positions[v.segment_ids == 0].any()
    # Samples of a row have different segments.
    for row in range(PACK.rows):
        of_row = [p for p in placements if p.row == row]
        numbers = {int(batch.segment_ids[row, p.offset]) for p in of_row}
        assert numbers == set(range(1, len(of_row) + 1))
    assert sorted(info.sample_ids) == list("abcde")
    assert info.tokens == 215 and info.supervised_tokens == 10 and info.windows == 7
    assert sum(info.class_patches) == 184
    assert batch.tokens.dtype == batch.vision_index.dtype == np.int32


def test_placeholders_without_patches_are_an_error():
    bad = sample("bad", 30, (8,), 0)
    bad.tokens[bad.tokens == PAD] = 11
    placements = place_pack([SampleSize(30, (8,))], PACK)
    with pytest.raises(DataError, match="Sample bad has 0 placeholders for 8 patches"):
        build_pack([bad], placements, PACK, tiny_model())
