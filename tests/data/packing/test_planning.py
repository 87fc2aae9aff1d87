"""Plans of whole corpora, and the vision rows that a mix wants."""

import numpy as np
import pytest

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.placement import fits_alone, place_pack
from ov2_jax.data.packing.planning import Lengths, Packs, plan_packs
from ov2_jax.data.packing.vision_rows import propose_vision_rows
from ov2_jax.data.sample import SampleSize


def table(sizes: list[SampleSize]) -> Lengths:
    windows = [np.array(s.windows, np.int32) for s in sizes]
    return Lengths(
        np.array([s.tokens for s in sizes], np.int32),
        np.concatenate([np.zeros(0, np.int32), *windows]),
        np.cumsum([len(w) for w in windows], dtype=np.int64),
    )


def sizes_of(lengths: Lengths, records: np.ndarray) -> list[SampleSize]:
    parts = np.split(lengths.windows, lengths.ends[:-1])
    return [SampleSize(int(lengths.tokens[i]), tuple(parts[i].tolist())) for i in records]


def each(packs: Packs) -> list[np.ndarray]:
    return np.split(packs.members, packs.ends[:-1])


def check(lengths: Lengths, order: np.ndarray, packs: Packs, config: PackConfig) -> None:
    """Every entry once; every pack places whole from its members in their order."""
    assert sorted(packs.members.tolist()) == sorted(order.tolist())
    assert packs.ends[-1] == len(order) and (np.diff(packs.ends, prepend=0) > 0).all()
    for records in each(packs):
        sizes = sizes_of(lengths, records)
        placed = place_pack(sizes, config)
        assert [p.sample for p in placed] == list(range(len(sizes)))
        text, vision = set(), set()
        samples = np.zeros(config.rows, int)
        for p in placed:
            samples[p.row] += 1
            slots = {(p.row, p.offset + i) for i in range(sizes[p.sample].tokens)}
            assert not slots & text and p.offset + len(slots) <= config.seq_len
            text |= slots
            for w, patches in zip(p.windows, sizes[p.sample].windows, strict=True):
                slots = {(w.row_class, w.row, w.offset + i) for i in range(patches)}
                assert not slots & vision
                assert w.row < config.vision_rows[w.row_class][0]
                assert w.offset + patches <= config.vision_rows[w.row_class][1]
                vision |= slots
        assert samples.max() <= (config.max_samples_per_row or config.seq_len)


@pytest.mark.parametrize("seed", range(30))
def test_random_corpora(seed):
    """Also hard ones: few rows, equal windows, samples of almost a whole pack, a low limit."""
    rng = np.random.default_rng(seed)
    widths = sorted({4 * int(w) for w in rng.integers(4, 40, rng.integers(0, 4))})
    config = PackConfig(
        int(rng.integers(1, 4)),
        int(rng.integers(60, 200)),
        tuple((int(rng.integers(1, 6)), w) for w in widths),
        int(rng.integers(1, 6)) if seed % 3 == 0 else None,
    )
    sizes = []
    for _ in range(400):
        windows: tuple[int, ...] = ()
        if widths and rng.random() < 0.7:
            count = int(rng.integers(1, 8))
            some = 4 * rng.integers(1, widths[-1] // 4 + 1, count)
            windows = tuple(some.tolist()) if rng.random() < 0.5 else (int(some[0]),) * count
        sizes.append(SampleSize(sum(windows) // 4 + int(rng.integers(1, 60)), windows))
    lengths = table([s for s in sizes if fits_alone(s, config)])
    order = rng.integers(0, len(lengths.tokens), 300)  # with repetitions, and not all
    check(lengths, order, plan_packs(lengths, order, config), config)


def corpus(n: int, seed: int = 0, *, pictures: bool = True) -> Lengths:
    """Pictures of many sizes, clips and chats, for rows of 4096 tokens."""
    rng = np.random.default_rng(seed)
    sizes = []
    for kind in rng.choice(3, n, p=(0.6, 0.06, 0.34)):
        text = int(np.clip(60 * np.exp(rng.standard_normal()), 5, 3000))
        windows: tuple[int, ...] = ()
        if pictures and kind == 0:
            windows = (4 * int(np.clip(60 * np.exp(0.6 * rng.standard_normal()), 4, 256)),)
        elif pictures and kind == 1:
            windows = (4 * int(rng.choice((90, 98))),) * int(rng.integers(4, 16))
        sizes.append(SampleSize(sum(windows) // 4 + text, windows))
    return table(sizes)


def fills(lengths: Lengths, packs: Packs, config: PackConfig) -> tuple[float, float]:
    n = len(packs.ends)
    return (
        lengths.tokens.sum() / (n * config.token_slots),
        lengths.windows.sum() / (n * config.patch_slots),
    )


GENEROUS = PackConfig(1, 4096, ((20, 512), (10, 1024)))


def test_tokens_that_bind_are_used():
    lengths = corpus(8000)
    packs = plan_packs(lengths, np.arange(8000), GENEROUS)
    assert fills(lengths, packs, GENEROUS)[0] > 0.99
    text = corpus(8000, pictures=False)
    packs = plan_packs(text, np.arange(8000), PackConfig(1, 4096))
    # The last pack is what is left.
    assert len(packs.ends) == -(-int(text.tokens.sum()) // 4096)


def test_vision_rows_that_bind_are_used():
    lengths = corpus(8000)
    tight = PackConfig(1, 4096, ((3, 2352),))
    packs = plan_packs(lengths, np.arange(8000), tight)
    assert fills(lengths, packs, tight)[1] > 0.95


def test_both_budgets_are_used_up_together():
    """By size alone, without regard to what is left, they are at 0.950 and 0.935."""
    lengths, both = corpus(8000), PackConfig(1, 4096, ((3, 2744),))
    packs = plan_packs(lengths, np.arange(8000), both)
    assert min(fills(lengths, packs, both)) > 0.97


def test_packs_are_alike():
    """No order by length, and no pack is all clips or all text."""
    lengths = corpus(8000)
    packs = each(plan_packs(lengths, np.arange(8000), GENEROUS))
    patches = np.diff(np.concatenate([[0], np.cumsum(lengths.windows)])[lengths.ends], prepend=0)
    attention = lengths.tokens.astype(float) ** 2
    for values, apart in ((lengths.tokens, 0.05), (patches, 0.15), (attention, 0.3)):
        sums = np.array([values[p].sum() for p in packs])
        parts = [part.mean() / sums.mean() for part in np.array_split(sums, 8)]
        assert max(abs(part - 1) for part in parts) < apart
    # With as many samples in a pack as on a long row: only what is left at the end is odd.
    config = PackConfig(4, 4096, ((80, 512), (40, 1024)))
    sums = np.array([patches[p].sum() for p in each(plan_packs(lengths, np.arange(8000), config))])
    assert np.mean(sums > 0.5 * sums.mean()) > 0.95
    # Sorted by length, the same corpus makes packs that are almost as even, and not one more.
    order = np.argsort(lengths.tokens)
    in_order, packs = packs, each(plan_packs(lengths, order, GENEROUS))
    assert len(packs) == len(in_order)
    counts = np.array([len(p) for p in packs])
    parts = [part.mean() / counts.mean() for part in np.array_split(counts, 8)]
    assert min(parts) > 0.8 and max(parts) < 1.6  # by length: 0.1 and 3.4


def test_a_plan_is_a_pure_function():
    lengths, order = corpus(2000), np.random.default_rng(1).permutation(2000)
    before = [a.copy() for a in (*lengths, order)]
    first, second = (plan_packs(lengths, order, GENEROUS) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.int64
    for a, b in zip((*lengths, order), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_order_has_no_packs():
    packs = plan_packs(corpus(5), np.zeros(0, np.int64), GENEROUS)
    assert len(packs.members) == len(packs.ends) == 0
    nothing = Lengths(*(np.zeros(0, int) for _ in range(3)))
    assert len(plan_packs(nothing, np.zeros(0, np.int64), GENEROUS).ends) == 0


@pytest.mark.parametrize(
    "size, config",
    [
        (SampleSize(101, ()), PackConfig(1, 100)),
        (SampleSize(40, (40,)), PackConfig(1, 100)),
        (SampleSize(40, (40,)), PackConfig(1, 100, ((9, 36),))),
        (SampleSize(40, (20, 20, 20)), PackConfig(1, 100, ((2, 36),))),
    ],
)
def test_a_record_that_fits_no_pack_is_named(size, config):
    lengths = table([SampleSize(10, ()), size])
    with pytest.raises(
        DataError, match=f"Record 1 of {size.tokens} tokens and {sum(size.windows)}"
    ):
        plan_packs(lengths, np.array([0, 1, 0]), config)
    assert len(plan_packs(lengths, np.array([0, 0]), config).ends) == 1  # it is not asked for


def test_lengths_that_make_no_sense():
    good = table([SampleSize(10, (4, 4)), SampleSize(10, (8,))])
    for bad in (
        good._replace(ends=good.ends[:1]),
        good._replace(ends=good.ends[::-1].copy()),
        good._replace(ends=good.ends + 1),
        good._replace(tokens=np.array([10, 0])),
        good._replace(windows=-good.windows),
    ):
        with pytest.raises(DataError):
            plan_packs(bad, np.arange(2), GENEROUS)
    for order in ([2], [-1]):
        with pytest.raises(DataError, match="lengths of 2 records"):
            plan_packs(good, np.array(order), GENEROUS)


# --- vision rows ----------------------------------------------------------------------------------


def test_proposed_rows_suit_the_mix():
    lengths = corpus(6000)
    rows = propose_vision_rows(lengths, 1, 4096, samples=1500)
    assert rows == propose_vision_rows(lengths, 1, 4096, samples=1500)
    config = PackConfig(1, 4096, rows)  # which checks their order
    assert len(rows) <= 3 and all(width % 4 == 0 for _, width in rows)
    packs = plan_packs(lengths, np.arange(6000), config)  # so every record fits
    tokens, patches = fills(lengths, packs, config)
    assert tokens > 0.96 and patches > 0.8

    def cost(rows):
        config = PackConfig(1, 4096, rows)
        packs = len(plan_packs(lengths, np.arange(6000), config).ends)
        return packs * (16 * 4096 + sum(r * w * (1 + w / 6144) for r, w in rows))

    # As good as what one would write down by hand, with a class or two.
    assert cost(rows) < 1.01 * min(cost(((15, 1024),)), cost(((20, 512), (4, 1024))))


def test_proposed_rows_keep_to_units():
    lengths = corpus(600)
    rows = propose_vision_rows(lengths, 2, 4096, unit=128, divide=4, classes=2, samples=300)
    assert len(rows) <= 2
    assert all(count % 4 == 0 and width % 128 == 0 for count, width in rows)
    plan_packs(lengths, np.arange(600), PackConfig(2, 4096, rows))


def test_proposed_rows_hold_every_record():
    """Also those that are neither among the largest nor among those that are tried."""
    kinds = [((40,) * 10, 600), ((100,), 600), ((60,) * 6, 100)]
    lengths = table([SampleSize(sum(w) // 4 + 9, w) for w, n in kinds for _ in range(n)])
    for samples in (50, 1300):
        rows = propose_vision_rows(lengths, 1, 256, samples=samples)
        plan_packs(lengths, np.arange(1300), PackConfig(1, 256, rows))


def test_text_wants_no_vision_rows():
    assert propose_vision_rows(corpus(100, pictures=False), 1, 4096) == ()
    with pytest.raises(DataError, match="but a text row 100"):
        propose_vision_rows(corpus(100), 1, 100)
