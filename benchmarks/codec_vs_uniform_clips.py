"""The clips of codec_vs_uniform.py: a still scene in which a shape is there for a moment."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ov2_jax.quickstart.drawing import CELL, Clip, Shape, draw, encode_clip
from ov2_jax.quickstart.tasks import COLOUR_JITTER, COLOURS, RADIUS, SHAPES

SPLITS = ("base", "train", "heldout")
TASKS = ("what", "when")
QUESTIONS = {"what": "Which colour is it?", "when": "When is the shape seen?"}

GRID = 3  # cells of a frame, both ways; a cell is a merged token
SIDE = GRID * CELL
FRAME_TOKENS = GRID * GRID
FRAMES, RATE = 100, Fraction(10)
EVENT_FRAMES = 4
SECONDS = range(1, 10)  # the first frame, which both inputs always have, never shows the event
CHANCE = {"what": 1 / len(COLOURS), "when": 1 / len(SECONDS)}
BASE_FRAMES = 4
# Times between frames of the base model's clips, so that a frame's place does not give its second.
BASE_SECONDS = tuple(Fraction(n, 10) for n in (10, 13, 16, 19, 22, 25, 28, 30, 32))


class Event(NamedTuple):
    """What a clip shows in addition to its background."""

    colour: str
    first: int  # frame
    cell: tuple[int, int]  # row, column of the upper left one of the four that the shape covers
    second: int


def make_clip(split: str, number: int) -> tuple[Clip, Event]:
    """A still background, and a shape that is there for EVENT_FRAMES frames; one in "base"."""
    rng = np.random.default_rng([SPLITS.index(split), number])
    coarse = Image.fromarray(rng.integers(150, 256, (7, 7, 3)).astype(np.uint8))
    still = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    name = tuple(COLOURS)[rng.integers(len(COLOURS))]
    colour = np.add(COLOURS[name], rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3))
    row, column = (int(i) for i in rng.integers(GRID - 1, size=2))
    shape = Shape(
        kind=SHAPES[rng.integers(len(SHAPES))],
        colour=tuple(int(v) for v in colour.clip(0, 255)),
        x=(column + 1) * CELL,
        y=(row + 1) * CELL,
        radius=2 * rng.uniform(*RADIUS),
    )
    nothing = (1, 2, 3)  # darker than any shape
    drawn = draw((SIDE, SIDE), (GRID, GRID), nothing, [shape])
    shown = np.where((drawn != nothing).any(-1, keepdims=True), drawn, still)
    if split == "base":
        rate, count, length = 1 / BASE_SECONDS[rng.integers(len(BASE_SECONDS))], BASE_FRAMES, 1
        first = int(rng.integers(1, count))
    else:
        # Wholly within a second, so that every frame of it gives the same answer.
        rate, count, length = RATE, FRAMES, EVENT_FRAMES
        first = int(rng.choice(SECONDS) * RATE + rng.integers(RATE - EVENT_FRAMES + 1))
    frames = [shown if 0 <= n - first < length else still for n in range(count)]
    return Clip(np.stack(frames), rate), Event(name, first, (row, column), int(first / rate))


def _lines(split: str, number: int, rate: Fraction, event: Event) -> list[str]:
    """Held-out questions are samples of their own; in training a clip's two share a sample."""
    answers = {"what": event.colour, "when": str(event.second)}
    turns = {t: [("human", QUESTIONS[t]), ("gpt", answer)] for t, answer in answers.items()}
    first, second = TASKS if number % 2 else TASKS[::-1]
    chats = turns if split == "heldout" else {first: turns[first] + turns[second]}
    return [
        json.dumps(
            {
                "id": f"{split}-{number}-{task}",
                "task": task,
                "video": f"{split}/{number:05d}.mp4",
                "fps": float(rate),
                "conversations": [
                    {"from": who, "value": text if i else f"<video>{text}"}
                    for i, (who, text) in enumerate(chat)
                ],
                "event": event,
            }
        )
        for task, chat in chats.items()
    ]


def write_clips(folder: Path, counts: Mapping[str, int]) -> None:
    """Writes SPLIT.jsonl and SPLIT/*.mp4, `counts` clips of each split.

    `folder` exists only when it is complete.
    """
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)

    def write(split: str, number: int) -> list[str]:
        clip, event = make_clip(split, number)
        (part / split / f"{number:05d}.mp4").write_bytes(encode_clip(clip))
        return _lines(split, number, clip.fps, event)

    for split, count in counts.items():
        (part / split).mkdir(parents=True)
        with ThreadPoolExecutor(2) as pool:
            written = list(pool.map(write, [split] * count, range(count)))
        text = "".join(line + "\n" for lines in written for line in lines)
        (part / f"{split}.jsonl").write_text(text)
    part.rename(folder)


def read_events(jsonl: Path) -> list[Event]:
    """The event in the clip of every line."""
    return [Event(*json.loads(line)["event"]) for line in jsonl.read_text().splitlines()]
