"""The quickstart's tasks: one generator each, that makes the pixels, the questions and the answers.

They need what the model is for, and are easy enough for a model of a few million parameters that
starts from nothing and has minutes. How hard they are is set by the constants below; a changed
constant makes a new data set (dataset.py compares this file's digest).
"""

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from ov2_jax.quickstart.drawing import CELL, Clip, Colour, Shape, draw

# --- What there is to see -------------------------------------------------------------------------

COLOURS: dict[str, Colour] = {
    "red": (215, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (240, 205, 35),
    "purple": (150, 50, 185),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}

# --- How hard it is -------------------------------------------------------------------------------

COLOUR_JITTER = 15  # a shape's colour differs by at most this from the table, per channel
BACKGROUND = (205, 255)  # each channel of a background: light, so that every colour stands out
RADIUS = (11.0, 13.0)  # of a shape, in pixels after resizing; a cell is 28 wide
CELL_JITTER = 1.0  # how far a shape's centre lies from its cell's, in pixels after resizing
SIZE_JITTER = 9  # a picture's side differs by at most this from a multiple of 28 (under 14)

# (rows, cols) of cells; a picture costs rows * cols tokens and four times as many patches.
GRIDS_ONE = ((1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (1, 4), (5, 1))  # pictures of one shape
GRIDS_COUNT = ((2, 2), (2, 3), (3, 2), (2, 4))
GRIDS_COMPARE = ((2, 2), (1, 3), (3, 1), (2, 3), (3, 2))
COUNT_MAX = 4
COMPARE_GAP = 2  # "which has more": the fuller picture has at least this many shapes more

NUM_FRAMES = 6  # frames sampled from a clip: the data config must say the same
MOTION_FRAMES = 4  # clips of `motion` are shorter than that and are read whole, as one window
MOTION_GRID = (2, 2)
MOTION_SPAN = (24.0, 32.0)  # pixels from the first frame to the last
WHEN_GRIDS = ((1, 2), (2, 1))
# Frames a second. With the strides below a sampled frame's seconds are not its index: a model
# that counts frames instead of reading the timestamps is wrong most of the time.
RATES = (Fraction(1), Fraction(2), Fraction(5, 2), Fraction(5))
WHEN_STRIDES = (1, 2, 3)  # source frames from one sampled frame to the next
WHEN_MAX_SECONDS = 9.9  # one digit before the point

SYSTEM_SHARE = 0.04
SYSTEM_PROMPTS = ("Be brief.", "Look and answer.")
# Training samples of colour, shape and motion that ask a second question about the same picture or
# clip: more to learn from the same patches, which cost most of the time.
TWO_TURN_SHARE = 0.4
TEXT_HELDOUT_SHARE = 0.15  # text questions that are never trained on


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before it is written to files.

    Attributes:
      task: its name in `TASKS`.
      turns: (question, answer) pairs; `<image>` and `<video>` mark places in the first question.
      pictures: uint8 [H W 3] each, in the order of the marks.
      clip: the one clip, or None.
      system: the system prompt, or None for the default one.
    """

    task: str
    turns: tuple[tuple[str, str], ...]
    pictures: tuple[np.ndarray, ...] = ()
    clip: Clip | None = None
    system: str | None = None


def _pick(rng: np.random.Generator, options: tuple) -> object:
    return options[rng.integers(len(options))]


def _near(rng: np.random.Generator, colour: Colour) -> Colour:
    shifted = np.asarray(colour) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    return tuple(int(v) for v in np.clip(shifted, 0, 255))


def _background(rng: np.random.Generator) -> Colour:
    return tuple(int(v) for v in rng.integers(BACKGROUND[0], BACKGROUND[1] + 1, 3))


def _shape(
    rng: np.random.Generator,
    cell: tuple[int, int],
    kind: str | None = None,
    name: str | None = None,
) -> Shape:
    """A shape in the cell (row, col), of the given kind and colour or of any."""
    dx, dy = rng.uniform(-CELL_JITTER, CELL_JITTER, 2)
    return Shape(
        kind=kind or _pick(rng, SHAPES),
        colour=_near(rng, COLOURS[name or _pick(rng, tuple(COLOURS))]),
        x=(cell[1] + 0.5) * CELL + dx,
        y=(cell[0] + 0.5) * CELL + dy,
        radius=rng.uniform(*RADIUS),
    )


def _picture(
    rng: np.random.Generator,
    grid: tuple[int, int],
    number: int = 1,
    kind: str | None = None,
    name: str | None = None,
) -> np.ndarray:
    """A picture with `number` shapes in different cells, of a size that resizes to `grid`."""
    size = tuple(int(n * CELL + rng.integers(-SIZE_JITTER, SIZE_JITTER + 1)) for n in grid)
    cells = [divmod(int(c), grid[1]) for c in rng.permutation(grid[0] * grid[1])[:number]]
    return draw(size, grid, _background(rng), [_shape(rng, c, kind, name) for c in cells])


def _about_image(rng: np.random.Generator, question: str) -> str:
    """LLaVA data puts the mark before the question, now and then behind it."""
    return f"{question}\n<image>" if rng.random() < 0.15 else f"<image>\n{question}"


# --- One generator a task: (rng, k, heldout) -> Sample --------------------------------------------
# `k` counts a task's samples and picks the answer, so that every answer is equally frequent.

COLOUR_QUESTIONS = ("What colour is the shape?", "Which colour is it?", "Name the colour.")
SHAPE_QUESTIONS = ("What shape is it?", "Which shape is it?", "Name the shape.")
COUNT_QUESTIONS = ("How many shapes are there?", "Count the shapes.")
MORE_QUESTIONS = ("Which picture has more shapes?", "Where are more shapes?")
FIND_QUESTIONS = ("Which picture is {}?", "Where is the {} shape?")
MOTION_QUESTIONS = ("Which way does it move?", "Where does the shape move?")
FLASH_QUESTIONS = ("When does the light flash?", "When is it bright?")
SEEN_QUESTIONS = ("When is the shape seen?", "When is there a shape?")
REPEAT_QUESTIONS = ("Repeat: {} {}", "Say: {} {}")
LARGER_QUESTIONS = ("Which is larger, {} or {}?", "What is more, {} or {}?")


def _colour_and_shape(
    rng: np.random.Generator, name: str, kind: str, first: str, heldout: bool
) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    pixels = _picture(rng, _pick(rng, GRIDS_ONE), kind=kind, name=name)
    turns = [(_pick(rng, COLOUR_QUESTIONS), name), (_pick(rng, SHAPE_QUESTIONS), kind)]
    if first == "shape":
        turns.reverse()
    if heldout or rng.random() >= TWO_TURN_SHARE:
        turns = turns[:1]
    turns[0] = (_about_image(rng, turns[0][0]), turns[0][1])
    return pixels, tuple(turns)


def make_colour(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    name = tuple(COLOURS)[k % len(COLOURS)]
    pixels, turns = _colour_and_shape(rng, name, _pick(rng, SHAPES), "colour", heldout)
    return Sample("color", turns, (pixels,))


def make_shape(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    kind = SHAPES[k % len(SHAPES)]
    pixels, turns = _colour_and_shape(rng, _pick(rng, tuple(COLOURS)), kind, "shape", heldout)
    return Sample("shape", turns, (pixels,))


def make_count(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    del heldout
    number = 1 + k % COUNT_MAX
    pixels = _picture(rng, _pick(rng, GRIDS_COUNT), number)
    question = _about_image(rng, _pick(rng, COUNT_QUESTIONS))
    return Sample("count", ((question, str(number)),), (pixels,))


def make_compare(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    """Two pictures: which has more shapes, or which has the colour asked for."""
    del heldout
    which = k % 2
    grids = [_pick(rng, GRIDS_COMPARE) for _ in range(2)]
    if (k // 2) % 2:
        most = [min(COUNT_MAX, rows * cols) for rows, cols in grids]
        more = int(rng.integers(1 + COMPARE_GAP, most[which] + 1))
        numbers = [int(rng.integers(1, more - COMPARE_GAP + 1))] * 2
        numbers[which] = more
        pictures = tuple(_picture(rng, g, n) for g, n in zip(grids, numbers, strict=True))
        question = _pick(rng, MORE_QUESTIONS)
    else:
        names = [str(n) for n in rng.choice(tuple(COLOURS), 2, replace=False)]
        pictures = tuple(_picture(rng, g, name=n) for g, n in zip(grids, names, strict=True))
        question = _pick(rng, FIND_QUESTIONS).format(names[which])
    turns = ((f"<image>\n<image>\n{question}", ("first", "second")[which]),)
    return Sample("compare", turns, pictures)


def make_motion(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    """A shape that crosses the clip; every place is passed in both directions, so one frame alone
    says nothing."""
    direction = tuple(OPPOSITES)[k % len(OPPOSITES)]
    rows, cols = MOTION_GRID
    horizontal = direction in ("left", "right")
    along, across = (cols, rows) if horizontal else (rows, cols)
    span = rng.uniform(*MOTION_SPAN)
    # The shape is whole in the first and the last frame.
    radius = rng.uniform(RADIUS[0], min(RADIUS[1], (along * CELL - span) / 2))
    start = rng.uniform(radius, along * CELL - span - radius)
    path = start + np.linspace(0, span, MOTION_FRAMES)
    if direction in ("left", "up"):
        path = path[::-1]
    still = rng.uniform(radius, across * CELL - radius)
    kind, name, background = _pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), _background(rng)
    colour = _near(rng, COLOURS[name])
    size = (rows * CELL, cols * CELL)
    frames = [
        draw(size, MOTION_GRID, background, [Shape(kind, colour, x, y, radius)])
        for x, y in ((p, still) if horizontal else (still, p) for p in path)
    ]
    turns = [("<video>" + _pick(rng, MOTION_QUESTIONS), direction)]
    if not heldout and rng.random() < TWO_TURN_SHARE:
        turns.append(
            _pick(
                rng,
                (
                    (f"What is the opposite of {direction}?", OPPOSITES[direction]),
                    (_pick(rng, COLOUR_QUESTIONS), name),
                    (_pick(rng, SHAPE_QUESTIONS), kind),
                ),
            )
        )
    clip = Clip(np.stack(frames), _pick(rng, RATES))
    return Sample("motion", tuple(turns), clip=clip)


def when_timings() -> list[tuple[int, Fraction]]:
    """(stride, fps) of the clips of `when`: stamps with one digit on each side of the point."""
    return [
        (stride, fps)
        for stride, fps in itertools.product(WHEN_STRIDES, RATES)
        if (NUM_FRAMES - 1) * stride / fps <= WHEN_MAX_SECONDS and (10 * stride / fps) % 1 == 0
    ]


def make_when(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    """Something is there in exactly one of the sampled frames; the answer is that frame's stamp."""
    del heldout
    event = k % NUM_FRAMES
    stride, fps = _pick(rng, tuple(when_timings()))
    grid = _pick(rng, WHEN_GRIDS)
    size = (grid[0] * CELL, grid[1] * CELL)
    if (k // NUM_FRAMES) % 2:
        background = _background(rng)
        cell = (int(rng.integers(grid[0])), int(rng.integers(grid[1])))
        usual, special = (draw(size, grid, background, s) for s in ([], [_shape(rng, cell)]))
        question = _pick(rng, SEEN_QUESTIONS)
    else:
        dark = tuple(int(v) for v in rng.integers(10, 70, 3))
        usual, special = (draw(size, grid, c, []) for c in (dark, _background(rng)))
        question = _pick(rng, FLASH_QUESTIONS)
    # As many source frames as lie nearest to the sampled one: the clip really has them all, and
    # only sampling makes one of them.
    nearest = np.floor(np.arange((NUM_FRAMES - 1) * stride + 1) / stride + 0.5)
    frames = np.stack([special if n == event else usual for n in nearest])
    answer = f"{float(event * stride / fps):.1f} seconds"
    turns = (("<video>" + question, answer),)
    return Sample("when", turns, clip=Clip(frames, fps))


def _text_pools() -> dict[tuple[str, bool], tuple]:
    """All text questions, split once and for all into trained and held-out ones."""
    words = (*COLOURS, *SHAPES, *OPPOSITES)
    everything = {
        "repeat": list(itertools.permutations(words, 2)),
        "larger": list(itertools.combinations(range(1, 10), 2)),
    }
    pools = {}
    for kind, items in everything.items():
        order = np.random.default_rng(0).permutation(len(items))
        kept = round(len(items) * TEXT_HELDOUT_SHARE)
        pools[kind, True] = tuple(items[i] for i in order[:kept])
        pools[kind, False] = tuple(items[i] for i in order[kept:])
    return pools


_TEXT = _text_pools()


def make_text(rng: np.random.Generator, k: int, heldout: bool) -> Sample:
    """Repeat two words, or say which of two digits is larger; held-out pairs are not in train."""
    if k % 2:
        a, b = _pick(rng, _TEXT["larger", heldout])
        answer = str(b)
        if rng.random() < 0.5:
            a, b = b, a
        question = _pick(rng, LARGER_QUESTIONS).format(a, b)
    else:
        a, b = _pick(rng, _TEXT["repeat", heldout])
        answer = f"{a} {b}"
        question = _pick(rng, REPEAT_QUESTIONS).format(a, b)
    return Sample("text", ((question, answer),))


# Task -> (generator, weight of the task in the training split). Tasks that take longer to learn
# get more samples; the held-out split has equally many of each.
TASKS: dict[str, tuple[Callable[[np.random.Generator, int, bool], Sample], float]] = {
    "color": (make_colour, 1.2),
    "shape": (make_shape, 1.5),
    "count": (make_count, 1.3),
    "compare": (make_compare, 2.2),
    "motion": (make_motion, 1.5),
    "when": (make_when, 1.4),
    "text": (make_text, 1.0),
}

# Expected exact match of the best guess that ignores pictures and clips.
CHANCE: dict[str, float] = {
    "color": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "count": 1 / COUNT_MAX,
    "compare": 1 / 2,
    "motion": 1 / len(OPPOSITES),
    "when": 1 / NUM_FRAMES,
    "text": 1 / 4,  # half the questions name two digits, the other half cannot be guessed
}


def make_sample(task: str, seed: int, k: int, *, heldout: bool) -> Sample:
    """The k-th sample of a task and split; the same arguments always give the same sample."""
    rng = np.random.default_rng([seed, list(TASKS).index(task), int(heldout), k])
    sample = TASKS[task][0](rng, k, heldout)
    if rng.random() < SYSTEM_SHARE:
        sample = dataclasses.replace(sample, system=_pick(rng, SYSTEM_PROMPTS))
    return sample
