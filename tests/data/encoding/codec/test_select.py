"""Codec-style selection: the released tool's run, a slow oracle, edge cases, and bad input."""

import dataclasses
import json

import numpy as np
import pytest

from ov2_jax.config.build import data_config_from
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.codec import CodecConfig, TooFewFrames, select_patches
from ov2_jax.data.encoding.codec.bad_frames import is_bad_frame
from ov2_jax.data.encoding.codec.frames import canvas_size, sample_frames
from tests.golden_cases import GOLDEN

SMALL = CodecConfig(num_sampled_frames=48, group_size=16, max_pixels=30_000, max_group_frames=24)


def costs(frames, rows=9, columns=13, seed=0) -> np.ndarray:
    """Bits that drift over the picture, with ties (multiples of 8, as entropy coders give)."""
    rng = np.random.default_rng(seed)
    bits = rng.gamma(0.6, 90, (frames, rows, columns)) * rng.gamma(1, 1, (frames, 1, 1))
    return (bits // 8 * 8).astype(np.uint32)


def select(bits, config=SMALL, keyframes=(0,), hw=(140, 200), **more):
    return select_patches(
        bits, keyframes, num_frames=len(bits), fps=25.0, orig_hw=hw, config=config, **more
    )


def test_equals_the_released_tool():
    case = json.loads((GOLDEN / "codec_select/case.json").read_text())
    names = {f.name for f in dataclasses.fields(CodecConfig)}
    config = CodecConfig(**{k: v for k, v in case.items() if k in names})
    inputs = np.load(GOLDEN / "codec_select/inputs.npz")
    expected = np.load(GOLDEN / "codec_select/expected.npz")
    got = select_patches(
        inputs["bit_cost"],
        inputs["keyframes"],
        num_frames=case["num_frames"],
        fps=case["fps"],
        orig_hw=tuple(case["orig_hw"]),
        config=config,
    )
    np.testing.assert_array_equal(got.frame_ids, expected["frame_ids"])
    np.testing.assert_array_equal(got.groups, expected["groups"])
    assert abs(got.threshold - float(expected["threshold"])) <= 1e-6
    assert got.canvas_hw == tuple(case["canvas_hw"])
    assert got.positions.dtype == np.int32
    np.testing.assert_array_equal(got.positions, expected["positions"])


# --- the page's rules once more, slowly -----------------------------------------------------------


def slow_scores(bits, hw, config):
    """One frame's block scores through the whole enlarged map."""
    a = np.log1p(np.maximum(bits.astype(np.float32), 0))
    a = np.clip(a / np.float32(max(np.percentile(a, 99), 1e-6)), 0, 1)
    index = [
        [min(int(np.floor(i * (1 / (out / size)))), size - 1) for i in range(out)]
        for size, out in zip(a.shape, hw, strict=True)
    ]
    big = np.ascontiguousarray(a[np.ix_(*index)])
    p, b = config.patch, config.block_size
    patches = big.reshape(hw[0] // p, p, hw[1] // p, p).sum((1, 3))
    return patches.reshape(hw[0] // p // b, b, hw[1] // p // b, b).sum((1, 3))


def top(candidates, k):
    """(score, frame, block) triples: higher score, then earlier frame, then raster order."""
    return sorted(candidates, key=lambda c: (-c[0], c[1], c[2]))[:k]


def k_sum(chosen):
    return float(np.array([c[0] for c in chosen], np.float32).sum())


def slow_select(bits, config, keyframes, hw, bad):
    canvas = canvas_size(hw, config)
    ids = sample_frames(len(bits), keyframes, config).tolist()
    maps = [slow_scores(bits[i], canvas, config) for i in ids]
    columns, size = maps[0].shape[1], maps[0].size
    k = (config.images_per_group - 1) * size

    def best(frames):
        return top([(float(maps[f].flat[j]), f, j) for f in frames for j in range(size)], k)

    n, sums = len(ids), []
    for start in range(0, n, config.group_size):
        end = min(start + config.group_size, n)
        if end - start >= max(4, config.readiness_coverage_bins + 1):
            sums.append(k_sum(best(range(start + 1, end))))
    theta = float(np.mean(sums)) if sums else 0.0
    groups, start = [], 0
    while n - start >= config.min_group_frames:
        chosen, before = None, None
        last = min(n, start + config.max_group_frames)
        for end in range(start + config.min_group_frames, last + 1):
            kept = best(range(start + 1, end))
            total = k_sum(kept)
            edges = [
                int(x) for x in np.linspace(1, end - start, config.readiness_coverage_bins + 1)
            ]
            touched = {
                next(i for i in range(len(edges) - 1) if edges[i] <= c[1] - start < edges[i + 1])
                for c in kept
            }
            spread = min(config.readiness_coverage_bins, config.images_per_group - 1)
            if total >= theta and len(touched) >= spread:
                chosen = end
                low = before is not None and (
                    (total - before) / max(abs(before), 1e-6) < config.readiness_delta_ratio
                )
                if low:
                    break
            before = total
        end = last if chosen is None else chosen
        groups.append((start, end))
        start = end
    positions = []
    b, p = config.block_size, config.patch
    for start, end in groups:
        order = list(range(start, end))
        good = [f for f in order if ids[f] not in bad]
        anchor = good[0] if good and ids[start] in bad else start
        kept = best([f for f in good if f != anchor])
        blocks = [(ids[anchor], j) for j in range(size)]
        blocks += sorted((ids[f], j) for _, f, j in kept)
        blocks += [(-1, -1)] * (config.images_per_group * size - len(blocks))
        for first in range(0, len(blocks), size):
            grid = np.full((canvas[0] // p, canvas[1] // p, 3), -1)
            for at, (frame, j) in enumerate(blocks[first : first + size]):
                for y, x in np.ndindex(b, b):
                    value = (frame, j // columns * b + y, j % columns * b + x)
                    spot = at // columns * b + y, at % columns * b + x
                    grid[spot] = value if frame >= 0 else -1
            positions.append(grid.reshape(-1, 3))
    return ids, groups, theta, np.concatenate(positions)


@pytest.mark.parametrize(
    ("changes", "frames", "grid", "hw"),
    [
        ({}, 90, (9, 13), (140, 200)),  # one macroblock column more than the picture has
        ({"patch": 16, "block_size": 3}, 61, (9, 13), (144, 208)),
        ({"patch": 16, "max_pixels": 20_000}, 75, (3, 4), (180, 250)),  # 64-pixel units
        ({"images_per_group": 3, "readiness_coverage_bins": 2}, 48, (5, 5), (80, 80)),
        ({"images_per_group": 14, "group_size": 4}, 40, (5, 5), (80, 80)),  # all blocks fit
        ({"avoid_keyframes": False, "readiness_delta_ratio": 0.2}, 200, (6, 6), (96, 96)),
        ({"num_sampled_frames": 500, "readiness_coverage_bins": 5}, 33, (6, 6), (96, 96)),
        ({"min_group_frames": 5, "max_group_frames": 7, "group_size": 9}, 31, (6, 6), (96, 96)),
    ],
)
@pytest.mark.parametrize("bad", [(), tuple(range(0, 300, 7)), tuple(range(8, 40))])
def test_equals_a_slow_oracle(changes, frames, grid, hw, bad):
    config = dataclasses.replace(SMALL, **changes)
    bits = costs(frames, *grid, seed=frames)
    keyframes = (0, 5, 6, 7, 30)
    bad = [b for b in bad if b < frames]
    ids, groups, theta, positions = slow_select(bits, config, keyframes, hw, set(bad))
    got = select(bits, config, keyframes, hw, bad_frames=bad)
    assert got.frame_ids.tolist() == ids
    assert got.groups.tolist() == [list(g) for g in groups]
    assert got.threshold == pytest.approx(theta, rel=1e-7)
    np.testing.assert_array_equal(got.positions, positions)


# --- frames and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "wanted", "keyframes", "expected"),
    [
        (10, 4, (), [0, 3, 6, 9]),
        (10, 4, (3,), [0, 4, 6, 9]),  # the later neighbour first
        (10, 4, (9,), [0, 3, 6, 8]),  # ... if there is one
        (10, 4, (3, 4), [0, 2, 6, 9]),
        (20, 3, (9, 8, 10, 7, 11), [0, 12, 19]),
        (20, 3, tuple(range(5, 15)), [0, 9, 19]),  # no way out within 4
        (4, 9, (), [0, 1, 2, 3]),
        # 0 moves onto 1; of the unused 2..6 nearest to the kept 1, 3, 7 are 2, 4, 6; 4 is in the
        # middle.
        (8, 3, (0, 3), [1, 4, 7]),
        (6, 5, (1,), [0, 2, 3, 4, 5]),
        (6, 6, (1, 4), [0, 1, 2, 3, 4, 5]),  # key frames fill up when nothing else is left
        (3, 2, (0, 1, 2), [0, 2]),
        (1, 5, (0,), [0]),
    ],
)
def test_sampled_frames(frames, wanted, keyframes, expected):
    config = dataclasses.replace(SMALL, num_sampled_frames=wanted)
    assert sample_frames(frames, keyframes, config).tolist() == expected


def test_refill_prefers_the_nearest_then_the_middle_then_the_earlier():
    config = dataclasses.replace(SMALL, num_sampled_frames=6)
    # Samples 0 2 4 6 8 10; 6 goes to 7, and so does 8. The unused 1, 3 and 5 are all neighbours of
    # kept ones; 5 is the middle.
    assert sample_frames(11, (6, 8, 9), config).tolist() == [0, 2, 4, 5, 7, 10]
    assert sample_frames(11, (5, 6, 8, 9), config).tolist() == [0, 2, 3, 4, 7, 10]


def test_refill_equals_the_plain_rule_on_random_clips():
    rng = np.random.default_rng(0)
    for _ in range(200):
        frames, wanted = int(rng.integers(2, 40)), int(rng.integers(1, 40))
        keys = set(np.flatnonzero(rng.random(frames) < rng.random() * 0.8).tolist())
        config = dataclasses.replace(SMALL, num_sampled_frames=wanted)
        n, kept = min(wanted, frames), []
        for i in np.linspace(0, frames - 1, n).astype(int).tolist():
            shifts = [0] + [s * d for d in (1, 2, 3, 4) for s in (1, -1)]
            free = [i + s for s in shifts if 0 <= i + s < frames and i + s not in keys]
            kept.append(free[0] if free else i)
        kept = sorted(set(kept))
        rest = [f for f in range(frames) if f not in kept]
        near = {f: min(abs(f - k) for k in kept) for f in rest}
        rest.sort(key=lambda f: (0, near[f], abs(f - frames // 2), f) if f not in keys else (1, f))
        expected = sorted(kept + rest[: n - len(kept)])
        assert sample_frames(frames, sorted(keys), config).tolist() == expected


@pytest.mark.parametrize(
    ("hw", "changes", "expected"),
    [
        ((640, 360), {"max_pixels": 150_000}, (504, 280)),
        ((480, 854), {"max_pixels": 313_600}, (392, 728)),
        ((200, 300), {"max_pixels": 150_000}, (196, 308)),
        ((30, 30), {"max_pixels": 150_000}, (56, 56)),  # under 56^2: enlarged
        ((10, 300), {"max_pixels": 150_000}, (28, 308)),
        ((40, 40), {"max_pixels": 150_000, "patch": 16, "block_size": 3}, (96, 96)),
        ((4, 4000), {"max_pixels": 1000}, (28, 980)),  # a side is never 0
        # The source is small enough, its rounded size is not: it stays.
        ((300, 300), {"max_pixels": 90_000}, (308, 308)),
    ],
)
def test_canvas_sizes(hw, changes, expected):
    assert canvas_size(hw, dataclasses.replace(SMALL, **changes)) == expected


# --- properties -----------------------------------------------------------------------------------


def test_a_group_is_its_anchor_and_time_ordered_blocks():
    got = select(costs(90))
    h, w = got.canvas_hw[0] // 14, got.canvas_hw[1] // 14
    canvases = got.positions.reshape(-1, 4, h, w, 3)
    assert len(canvases) == len(got.groups)
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    for canvas, (start, end) in zip(canvases, got.groups, strict=True):
        assert (canvas[0, ..., 0] == got.frame_ids[start]).all()
        assert (canvas[0, ..., 1] == rows).all() and (canvas[0, ..., 2] == columns).all()
        t = canvas[1:, ::2, ::2, 0].reshape(-1)
        assert (np.diff(t) >= 0).all()
        assert set(t) <= set(got.frame_ids[start + 1 : end])


def test_bad_frames_are_not_chosen_and_a_bad_anchor_is_replaced():
    bits = costs(90)
    plain = select(bits)
    start = plain.groups[1, 0]
    bad = [int(plain.frame_ids[start]), int(plain.frame_ids[start + 3])]
    got = select(bits, bad_frames=bad)
    np.testing.assert_array_equal(got.groups, plain.groups)
    assert not np.isin(got.positions[:, 0], bad).any()
    size = len(got.positions) // len(got.groups)
    assert got.positions[size, 0] == plain.frame_ids[start + 1]
    mask = np.zeros(90, bool)
    mask[bad] = True
    np.testing.assert_array_equal(select(bits, bad_frames=mask).positions, got.positions)


def test_groups_of_few_good_frames_end_in_whole_padding_canvases():
    bits = costs(48)
    good = (5, 6)
    got = select(bits, bad_frames=[i for i in range(48) if i not in good])
    canvases = got.positions.reshape(len(got.groups), 4, -1, 3)
    assert (canvases[0, 0, :, 0] == 5).all() and (canvases[0, 1, :, 0] == 6).all()
    assert (canvases[0, 2:] == -1).all()
    assert (
        canvases[1, 0, :, 0] == got.frame_ids[got.groups[1, 0]]
    ).all()  # all bad: still an anchor
    assert (canvases[1, 1:] == -1).all()


def test_cap_keeps_groups_whole_over_the_whole_clip():
    bits = costs(90)
    plain = select(bits)
    assert len(plain.groups) > 2
    got = select(bits, dataclasses.replace(SMALL, max_canvases=11))
    np.testing.assert_array_equal(got.groups, plain.groups[[0, -1]])
    whole = plain.positions.reshape(len(plain.groups), -1, 3)
    np.testing.assert_array_equal(got.positions, whole[[0, -1]].reshape(-1, 3))


def test_maps_without_bits_choose_the_earliest_blocks():
    got = select(np.zeros((40, 9, 13), np.uint32))
    size = len(got.positions) // len(got.groups) // 4
    expected = got.frame_ids[np.repeat(got.groups[0, 0] + np.arange(4), size)]
    np.testing.assert_array_equal(got.positions[: 4 * size, 0], expected)


# --- bad input ------------------------------------------------------------------------------------


def test_short_clips_are_refused():
    assert len(select(costs(8)).groups) == 1
    with pytest.raises(TooFewFrames, match="7 sampled frames.*uniform"):
        select(costs(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bit_cost": costs(20)[0]}, "bit_cost has shape"),
        ({"num_frames": 21}, "21 frames"),
        ({"bit_cost": np.zeros((20, 0, 3))}, "bit_cost has shape"),
        ({"keyframes": [-1]}, "keyframes must be"),
        ({"keyframes": [0.5]}, "keyframes must be"),
        ({"bad_frames": [20]}, "bad_frames has frame 20"),
        ({"bad_frames": np.zeros(19, bool)}, "bad_frames must be"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"orig_hw": (0, 10)}, "orig_hw"),
    ],
)
def test_contradicting_input_is_refused(change, message):
    good = {
        "bit_cost": costs(20),
        "keyframes": [0],
        "num_frames": 20,
        "fps": 25.0,
        "orig_hw": (144, 208),
        "config": SMALL,
    }
    select_patches(**good)
    with pytest.raises(ValueError, match=message):
        select_patches(**(good | change))


@pytest.mark.parametrize(
    "change",
    [
        {"num_sampled_frames": 0},
        {"patch": True},
        {"min_group_frames": 3},
        {"max_group_frames": 7},
        {"max_canvases": 3},
        {"readiness_delta_ratio": -0.1},
        {"readiness_delta_ratio": float("nan")},
    ],
)
def test_config_is_checked(change):
    with pytest.raises(ConfigError, match=f"codec.{next(iter(change))} is"):
        CodecConfig(**change)


def test_sizes_of_a_config_file_are_whole_numbers():
    with pytest.raises(ConfigError, match="codec.patch is 14.0"):
        data_config_from({"codec": {"patch": 14.0}})


# --- bad frames -----------------------------------------------------------------------------------


def frame(*rgb, noise=0, h=40, w=60) -> np.ndarray:
    rng = np.random.default_rng(0)
    offset = rng.integers(-noise, noise + 1, (h, w, 1))
    return np.clip(np.array(rgb) + offset, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("picture", "bad"),
    [
        (frame(0, 0, 0), True),
        (frame(6, 6, 6, noise=6), True),  # black with grain
        (frame(20, 20, 20, noise=20), False),  # dark, but a picture
        (frame(200, 180, 90, noise=4), True),  # one colour
        (frame(200, 180, 90, noise=30), False),
        (frame(40, 200, 40, noise=20), True),  # strongly green
        (frame(60, 150, 60, noise=40), True),  # green all over, little texture
        (frame(90, 150, 90, noise=40), False),  # greenish
        (np.vstack([frame(0, 255, 0, h=15), frame(120, 90, 60, noise=50, h=25)]), True),
        (np.vstack([frame(0, 255, 0, h=13), frame(120, 90, 60, noise=50, h=27)]), False),
    ],
)
def test_bad_frames_are_recognised(picture, bad):
    assert is_bad_frame(picture) is bad


def test_only_rgb_frames_are_judged():
    with pytest.raises(ValueError, match="uint8"):
        is_bad_frame(np.zeros((4, 4), np.uint8))
