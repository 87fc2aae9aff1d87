"""How well and how quickly a corpus is packed: data/plan.py against two baselines.

    python benchmarks/packing_plan.py [--samples=1000000] [--cases=...] [--baselines=...]

Prints one JSON line a case. Made-up lengths that follow the recipes' corpora (85 M image-text
pairs, 46 M instruction samples and documents, 8 M clips), patch 14, merge 2, all from one seed.
Log-normal numbers are (median, sigma):

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

The text case has chats, documents and pairs in which pictures are a third of what they are above.
"""

import argparse
import json
import time
from bisect import bisect_left, insort

import numpy as np

from ov2_jax.data.config import PackConfig
from ov2_jax.data.packing import Pack
from ov2_jax.data.plan import Lengths, plan_packs, propose_vision_rows

SEQ_LEN = 32768  # 8B mid-training
RECIPE = ((17, 4096), (5, 8192))  # configs/instruct_8b.py: 110592 patches
STEP = 128  # packs of a step of 8B mid-training


# --- lengths --------------------------------------------------------------------------------------


def lognormal(rng, n, median, sigma, low, high):
    return np.clip(median * np.exp(sigma * rng.standard_normal(n)), low, high).astype(np.int64)


def pictures(rng, n, median, sigma):
    """Patches: whole merged tokens high and wide, as resizing makes them."""
    area = lognormal(rng, n, median / 4, sigma, 4, 2048)
    height = np.clip(np.sqrt(area * np.exp(0.35 * rng.standard_normal(n))), 2, 200).astype(np.int64)
    return 4 * height * np.maximum(area // height, 1)


def of_counts(counts, windows, text):
    """Lengths of samples with so many of the windows each; every 4 patches are a token."""
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
    kinds = [f(rng, int(c), scale) for f, c in zip((pairs, chats, documents, clips), counts)]
    starts = np.cumsum([0, *(len(k.windows) for k in kinds)])
    return Lengths(
        np.concatenate([k.tokens for k in kinds]).astype(np.int32),
        np.concatenate([k.windows for k in kinds]).astype(np.int32),
        np.concatenate([k.ends + s for k, s in zip(kinds, starts)]),
    )


MIXED, TEXT = (0.60, 0.29, 0.05, 0.06), (0.35, 0.5, 0.15, 0.0)


# --- baselines ------------------------------------------------------------------------------------


def windows_of(lengths, i):
    return lengths.windows[lengths.ends[i - 1] if i else 0 : lengths.ends[i]]


def best_fit_decreasing(lengths, order, config):
    """On tokens alone: each sample, the longest first, into the fullest row with room."""
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


def first_fit(lengths, order, config, runs_of, window=64):
    """On both budgets: each sample, as they come, into the first pack with room. As many packs are
    open as the planner has samples to choose from, in tokens; the oldest is closed for a new one."""
    packs, open_packs = [], []
    for i in order.tolist():
        tokens, runs = int(lengths.tokens[i]), runs_of(windows_of(lengths, i).tolist())
        for state, members in open_packs:
            if tokens <= state.most_tokens and state.place(i, tokens, runs):
                members.append(i)
                break
        else:
            state, members = Pack(config), [i]
            state.place(i, tokens, runs)
            packs.append(members)
            open_packs.append((state, members))
            if len(open_packs) > window:
                open_packs.pop(0)
    return packs
