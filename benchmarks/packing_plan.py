"""How full packs are and how fast a corpus is planned: plan_packs against two baselines.

    python benchmarks/packing_plan.py [--samples=1000000] [--cases=text,recipe,...] [--rounds=3]

Prints a JSON line for each case. In `text` tokens run out first. `recipe` is the mix with the
vision rows of configs/instruct_8b.py. `tight` has fewer patches than a full text row of the mix
needs, so patches run out first. `proposed` has the rows that propose_vision_rows returns for the
mix. `seconds` and `cpu_seconds` are those of one process on one core, and equal if nothing else
runs. `class_fill` and `packs_whose_windows_do_not_fit` (best-fit-decreasing looks at tokens only)
are of a thousand packs. `max_over_mean` divides the busiest of the 128 packs of a step by their
mean, and is the mean over steps.

The lengths are made up, from one seed, to follow the recipes' corpora (85 M image-text pairs, 46 M
instruction samples and documents, 8 M clips) with patch 14 and merge 2. Log-normal numbers are
(median, sigma):

    60 %  image-text pairs: a picture of (1200, 0.6) patches, of any aspect, at most 8192; a caption
          of (150, 0.6) tokens
    29 %  instruction chats: 30 % without picture, 60 % with one, 10 % with 2 to 5; pictures as
          above but (1600, 0.7); text of (300, 0.9) tokens, without picture (450, 1.0)
     5 %  documents: 70 % have 1 to 5 pages of 4000 to 8192 patches and (600, 0.8) tokens of text;
          30 % are text, (3000, 0.8)
     6 %  clips of 30 s to 15 min, log-uniform: a frame a second, at most 90, of 392 x 392 pixels in
          area and of 1:1, 4:3, 16:9 or 9:16, in windows of 4; those of more than 3 minutes
          codec-style, 16 to 24 groups of 4 canvases of 150000 pixels; 12 tokens a frame (60 a
          group) for times, and (150, 0.7) of caption

The text case has 35 % pairs, 50 % chats and 15 % documents, with pictures a third as large.
"""

import json
import time
from bisect import bisect_left, insort

import numpy as np
from absl import flags

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.program import Given, run
from ov2_jax.data.packing.placement import PackSpace, place_pack, runs_of
from ov2_jax.data.packing.planning import Lengths, plan_packs
from ov2_jax.data.packing.vision_rows import propose_vision_rows
from ov2_jax.data.sample import SampleSize

SEQ_LEN = 32768  # 8B mid-training
RECIPE = ((17, 4096), (5, 8192))  # configs/instruct_8b.py: 110592 patches
TIGHT = ((10, 9472),)  # 94720 patches; a full text row of the mix needs 96000
STEP = 128  # packs of a step of 8B mid-training
CASES = ["text", "recipe", "proposed", "tight"]


# --- lengths --------------------------------------------------------------------------------------


def lognormal(rng, n, median, sigma, low, high):
    return np.clip(median * np.exp(sigma * rng.standard_normal(n)), low, high).astype(np.int64)


def pictures(rng, n, median, sigma):
    """Patches; heights and widths are whole merged tokens, as after resizing."""
    area = lognormal(rng, n, median / 4, sigma, 4, 2048)
    height = np.clip(np.sqrt(area * np.exp(0.35 * rng.standard_normal(n))), 2, 200).astype(np.int64)
    return 4 * height * np.maximum(area // height, 1)


def of_counts(counts, windows, text):
    """Lengths of samples that have `counts` of the windows each; every 4 patches are a token."""
    ends = np.cumsum(counts)
    sums = np.concatenate([[0], np.cumsum(windows)])
    return Lengths(text + np.diff(sums[ends], prepend=0) // 4 + 2 * counts, windows, ends)


def pairs(rng, n, scale):
    text = lognormal(rng, n, 150, 0.6, 10, 2000) + 25
    return of_counts(np.ones(n, np.int64), pictures(rng, n, 1200 * scale, 0.6), text)


def chats(rng, n, scale):
    counts = rng.choice([0, 1, 2, 3, 4, 5], n, p=(0.3, 0.6, 0.04, 0.03, 0.02, 0.01))
    shown = lognormal(rng, n, 300, 0.9, 20, 8000)
    alone = lognormal(rng, n, 450, 1.0, 20, 16000)
    windows = pictures(rng, counts.sum(), 1600 * scale, 0.7)
    return of_counts(counts, windows, np.where(counts > 0, shown, alone) + 25)


def documents(rng, n, scale):
    paged = rng.random(n) < 0.7
    counts = np.where(paged, np.minimum(rng.geometric(0.45, n), 5), 0)
    windows = 4 * rng.integers(1000 * scale, 2048 * scale + 1, counts.sum())
    text = np.where(
        paged, lognormal(rng, n, 600, 0.8, 50, 6000), lognormal(rng, n, 3000, 0.8, 200, 30000)
    )
    return of_counts(counts, windows, text + 25)


def clips(rng, n, scale):
    seconds = np.exp(rng.uniform(np.log(30), np.log(900), n))
    codec = seconds > 180
    frames = np.minimum(seconds, 90).astype(np.int64)
    groups = np.where(codec, rng.integers(16, 25, n), -(-frames // 4))
    area = rng.choice([784, 768, 720, 720], n, p=(0.1, 0.25, 0.5, 0.15))  # 14x14 16x12 18x10 10x18
    windows = np.repeat(4 * np.where(codec, area * 15 // 16 // 4 * 4, area), groups)
    tail = np.cumsum(groups) - 1
    windows[tail] = np.where(codec, windows[tail], (frames - 4 * (groups - 1)) * area)
    text = np.where(codec, 58 * groups, 12 * frames) + lognormal(rng, n, 150, 0.7, 10, 3000) + 25
    return of_counts(groups, windows, text)


def mix(n, shares, scale, seed=0):
    """Lengths of n samples of the four kinds; the order of arrival is shuffled by the caller."""
    rng = np.random.default_rng(seed)
    counts = (n * np.array(shares)).astype(int)
    counts[0] += n - counts.sum()
    makers = zip((pairs, chats, documents, clips), counts.tolist(), strict=True)
    kinds = [make(rng, count, scale) for make, count in makers]
    starts = np.cumsum([0, *(len(k.windows) for k in kinds[:-1])])
    return Lengths(
        np.concatenate([k.tokens for k in kinds]).astype(np.int32),
        np.concatenate([k.windows for k in kinds]).astype(np.int32),
        np.concatenate([k.ends + s for k, s in zip(kinds, starts, strict=True)]),
    )


MIXED, TEXT = (0.60, 0.29, 0.05, 0.06), (0.35, 0.5, 0.15, 0.0)


# --- baselines ------------------------------------------------------------------------------------


def windows_of(lengths, i):
    return lengths.windows[lengths.ends[i - 1] if i else 0 : lengths.ends[i]]


def best_fit_decreasing(lengths, order, config):
    """By tokens alone: each sample, the longest first, goes into the fullest row with room."""
    tokens = lengths.tokens[order]
    rooms, by_room, packs = [], {}, []  # rooms: those that some pack has, sorted
    for i in np.argsort(-tokens, kind="stable").tolist():
        need = int(tokens[i])
        at = bisect_left(rooms, need)
        if at == len(rooms):
            pack, room = len(packs), config.seq_len
            packs.append([])
        else:
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        packs[pack].append(int(order[i]))
        room -= need
        if not by_room.setdefault(room, []):
            insort(rooms, room)
        by_room[room].append(pack)
    return packs


def first_fit(lengths, order, config, window=64):
    """By both budgets: each sample, as it arrives, goes into the first open pack with room. A new
    pack closes the oldest. Open packs hold about as many samples as wait in the planner."""
    packs, opened = [], []
    for i in order.tolist():
        windows = windows_of(lengths, i).tolist()
        sample = i, int(lengths.tokens[i]), sum(windows), runs_of(windows)
        for state, members in opened:
            if sample[1] <= state.most_tokens and state.place(*sample):
                members.append(i)
                break
        else:
            opened.append((PackSpace(config), [i]))
            opened[-1][0].place(*sample)
            packs.append(opened[-1][1])
            if len(opened) > window:
                opened.pop(0)
    return packs


# --- figures --------------------------------------------------------------------------------------


def per_pack(values, packs):
    """The sum over each pack of a value that every record has."""
    members = np.concatenate(packs)
    return np.add.reduceat(
        values[members], np.cumsum([0, *(len(p) for p in packs[:-1])]), dtype=float
    )


def spread(work):
    """The busiest pack of a step divided by the mean, as the mean over steps of random packs."""
    steps = len(work) // STEP or 1
    steps = np.array_split(np.random.default_rng(0).permutation(work), steps)
    return round(float(np.mean([s.max() / s.mean() for s in steps])), 3)


def figures(lengths, packs, config):
    def of_record(values):
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.float64)])
        return np.diff(sums[lengths.ends], prepend=0)

    tokens, windows = lengths.tokens.astype(float), lengths.windows.astype(float)
    patches = per_pack(of_record(windows), packs)
    bounds = [tokens.sum() / config.token_slots, windows.sum() / config.patch_slots]
    # Vision rows as placement fills them, in some of the packs.
    by_class, misfits, some = np.zeros(len(config.vision_rows)), 0, packs[:: len(packs) // 1000 + 1]
    for members in some:
        sizes = [
            SampleSize(int(lengths.tokens[i]), tuple(windows_of(lengths, i).tolist()))
            for i in members
        ]
        placed = place_pack(sizes, config)
        misfits += len(placed) < len(sizes)
        for p in placed:
            for window, patches_of in zip(p.windows, sizes[p.sample].windows, strict=True):
                by_class[window.row_class] += patches_of
    slots = len(some) * np.array([r * w for r, w in config.vision_rows])
    return {
        "packs": len(packs),
        "packs_over_lower_bound": round(len(packs) / max(bounds), 4),
        "token_fill": round(bounds[0] / len(packs), 4),
        "patch_fill": round(bounds[1] / len(packs), 4),
        "class_fill": [round(f, 3) for f in (by_class / slots).tolist()],
        "packs_whose_windows_do_not_fit": round(misfits / len(some), 4),
        "most_patches": int(patches.max()),
        "max_over_mean": {
            "tokens": spread(per_pack(tokens, packs)),
            "patches": spread(patches),
            "text_attention": spread(per_pack(tokens**2, packs)),
            "vision_attention": spread(per_pack(of_record(windows**2), packs)),
        },
    }


def case(name, lengths, rows, given):
    config = PackConfig(1, SEQ_LEN, rows)
    order = np.random.default_rng(1).permutation(len(lengths.tokens))
    runs = []
    for _ in range(given.rounds):
        start = time.perf_counter(), time.process_time()
        plan = plan_packs(lengths, order, config)
        runs.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    result = {
        "case": name,
        "samples": len(order),
        "windows": len(lengths.windows),
        "mean_tokens": round(float(lengths.tokens.mean()), 1),
        "vision_rows": rows,
        "patch_slots": config.patch_slots,
        "attention_mscores": round(sum(r * w * w for r, w in rows) / 1e6),
        "seconds": round(min(r[0] for r in runs), 2),
        "cpu_seconds": round(min(r[1] for r in runs), 2),
        "plan": figures(lengths, np.split(plan.members, plan.ends[:-1]), config),
    }
    if given.baselines:
        for baseline in (best_fit_decreasing, first_fit):
            start = time.perf_counter()
            packs = baseline(lengths, order, config)
            seconds = round(time.perf_counter() - start, 1)
            fills = figures(lengths, packs, config)
            if baseline is first_fit:  # its packs fit in its own order, not always in placement's
                del fills["packs_whose_windows_do_not_fit"], fills["class_fill"]
            result[baseline.__name__] = {"seconds": seconds, **fills}
    print(json.dumps(result), flush=True)


def _define_flags():
    flags.DEFINE_integer("samples", 1_000_000, "Samples of the corpus.", lower_bound=1)
    flags.DEFINE_integer(
        "rounds", 1, "Times that a plan is made; the fastest counts.", lower_bound=1
    )
    flags.DEFINE_integer("baselines", 1, "0 leaves the baselines out.")
    flags.DEFINE_list("cases", CASES, "Cases to run.")
    flags.register_validator(
        "cases", lambda cases: set(cases) <= set(CASES), f"The cases are {', '.join(CASES)}."
    )


def main(given: Given):
    mixed = mix(given.samples, MIXED, 1.0)
    if "text" in given.cases:
        case("text", mix(given.samples, TEXT, 1 / 3), RECIPE, given)
    if "recipe" in given.cases:
        case("recipe", mixed, RECIPE, given)
    if "tight" in given.cases:
        case("tight", mixed, TIGHT, given)
    if "proposed" in given.cases:
        start = time.process_time()
        rows = propose_vision_rows(mixed, 1, SEQ_LEN, unit=128, token_cost=27)
        seconds = round(time.process_time() - start, 1)
        print(json.dumps({"proposal": rows, "cpu_seconds": seconds}), flush=True)
        case("proposed", mixed, rows, given)


if __name__ == "__main__":
    run(main, _define_flags)
