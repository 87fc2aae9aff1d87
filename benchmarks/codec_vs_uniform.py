"""Codec-style input against uniform frames at equal numbers of vision tokens, in small.

    python -m benchmarks.codec_vs_uniform --png=docs/codec_vs_uniform.png [--out=DIR]

Clips of ten seconds (100 frames of 84 x 84, H.264) show a still, textured background. At a random
time and place a shape is there for four frames. The questions: what colour was it, and in which
second did it come? A picture of the clip's size is nine tokens, so a budget of 9 n vision tokens is

    uniform  n frames, from the first to the last
    codec    one group of n canvases over all 100 frames: the anchor whole, and the 9 (n - 1) most
             expensive blocks of the other 99 frames

Each seed first trains a base model of 0.8 million parameters with `ov2_jax.train`, on clips of four
frames, all of which it sees. It learns to find the shape and to read times, from uniform frames.
From there every input and budget continues alone, with equal clips, order, steps and learning rate,
and answers held-out questions by greedy generation; the score is exact match. Without the base, a
model with uniform frames would have to learn all that from the few clips whose event is in one of
its frames.

Model, optimizer, train step, sample encoder, packing and generation are the package's. Clips are
encoded once for every input and budget and kept in memory. Prints the table of means, and draws the
curves (extra `dev`). Every finished run is a file in --out/results; the same command continues with
the runs that are missing.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.codec_vs_uniform_clips import BASE_FRAMES, FRAME_TOKENS, FRAMES, SPLITS, write_clips
from benchmarks.codec_vs_uniform_figure import INPUTS, plot, table
from benchmarks.codec_vs_uniform_input import (
    BenchmarkError,
    Encoded,
    data_config,
    encode,
    model_config,
)
from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.data import DataConfig
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch
from ov2_jax.core.program import Given, run
from ov2_jax.data.encoding.tokenizer import Tokenizer, load_tokenizer
from ov2_jax.data.packing.build import build_pack
from ov2_jax.data.packing.placement import Placement, place_pack
from ov2_jax.data.sample import EncodedSample, SampleSize
from ov2_jax.evaluation.exact_match import Answer, accuracy_by_task
from ov2_jax.generation.generator import Generator, Sampling
from ov2_jax.quickstart import TOKENIZER
from ov2_jax.sharding.mesh import MeshConfig, make_mesh
from ov2_jax.train import train
from ov2_jax.training.program import model_graph
from ov2_jax.training.start import first_state
from ov2_jax.training.step import make_train_step

BUDGETS, SEEDS = (18, 36, 72, 144), (0, 1, 2)
EVAL_BATCH = 40


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all runs of a folder share."""

    base_clips: int = 2000
    train_clips: int = 800
    heldout_clips: int = 120
    base_steps: int = 400
    steps: int = 100
    batch: int = 8
    learning_rate: float = 1e-3


QUICK = Settings(base_clips=400, train_clips=160, heldout_clips=40, base_steps=50, steps=20)


# --- one run --------------------------------------------------------------------------------------


def experiment_of(
    data: DataConfig, pack: PackConfig, steps: int, settings: Settings, **fields: Any
) -> Experiment:
    return Experiment(
        model=model_config(),
        data=data,
        pack=pack,
        steps=steps,
        tokenizer=str(TOKENIZER),
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate,
            end_learning_rate=1e-5,
            warmup_fraction=0.05,
            eps=1e-8,
        ),
        compute=ComputeConfig(dtype="float32", remat="none"),
        **fields,
    )


def base_experiment(out: Path, settings: Settings, seed: int) -> Experiment:
    """The base model's run: one clip a text row; four frames are one window."""
    data = data_config(out / "clips/base.jsonl", "uniform", BASE_FRAMES * FRAME_TOKENS)
    pack = PackConfig(1, 112, ((1, FRAME_TOKENS * 4 * 4),))
    workdir = str(out / f"base-{seed}")
    return experiment_of(
        data,
        pack,
        settings.base_steps,
        settings,
        global_rows=settings.batch,
        workdir=workdir,
        seed=seed,
    )


def chosen(samples: list[EncodedSample], batch: int, seed: int) -> Iterator[list[EncodedSample]]:
    """Endless batches, in an order that depends only on the seed."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        for start in range(0, len(order) - batch + 1, batch):
            yield [samples[i] for i in order[start : start + batch]]
        epoch += 1


def placed(samples: list[EncodedSample], pack: PackConfig) -> list[Placement]:
    return place_pack([SampleSize(len(s.tokens), tuple(s.windows.tolist())) for s in samples], pack)


def pack_of(samples: list[EncodedSample], settings: Settings, seeds: Sequence[int]) -> PackConfig:
    """The fewest text rows that hold every batch of all seeds whole; one window a vision row.

    Some codec clips have three times the usual tokens, because every run of equal time has its own
    timestamp. With a row for each sample most of the work would be padding.
    """
    longest, windows = max(len(s.tokens) for s in samples), samples[0].windows
    batch = settings.batch
    for rows in range(1, batch + 1):
        pack = PackConfig(
            rows, -(-longest // 16) * 16, ((batch * len(windows), int(windows.max())),)
        )
        every = (
            some
            for seed in seeds
            for some in itertools.islice(chosen(samples, batch, seed), settings.steps)
        )
        if all(len(placed(some, pack)) == batch for some in every):
            break
    return pack


def batches(samples: list[EncodedSample], experiment: Experiment, batch: int) -> Iterator[Batch]:
    """Device batches of one micro-step (A = 1) and one pack (G = 1)."""
    pack = experiment.pack
    for some in chosen(samples, batch, experiment.seed):
        arrays, _ = build_pack(some, placed(some, pack), pack, experiment.model)
        yield jax.tree.map(lambda x: x[None, None], arrays)


def answer(generator: Generator, encoded: Encoded) -> list[Answer]:
    """Greedy answers to all held-out questions."""
    order = sorted(range(len(encoded.prompts)), key=lambda i: len(encoded.prompts[i].tokens))
    answers = []
    for start in range(0, len(order), EVAL_BATCH):
        some = order[start : start + EVAL_BATCH]
        filled = some + some[:1] * (EVAL_BATCH - len(some))
        texts = generator([encoded.prompts[i] for i in filled], Sampling(max_new_tokens=4))
        answers += [encoded.expected[i]._replace(got=t) for i, t in zip(some, texts, strict=False)]
    return answers


def train_and_ask(
    encoded: Encoded,
    experiment: Experiment,
    batch: int,
    train_step: Callable[..., Any],
    tokenizer: Tokenizer,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    """Trains a base model further and asks it; `tick` gets the loss after every step."""
    start = time.perf_counter()
    state = first_state(experiment, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    losses = []
    endless = batches(encoded.train, experiment, batch)
    for arrays in itertools.islice(endless, experiment.steps):
        state, metrics = train_step(state, arrays)
        losses.append(float(metrics["loss"]))
        tick(losses[-1])
    generator = Generator(experiment.model, state.params, tokenizer, experiment.compute)
    right = accuracy_by_task(answer(generator, encoded))
    return {
        "accuracy": {task: n / asked for task, (n, asked) in right.items()},
        "shown": encoded.shown,
        "loss": float(np.mean(losses[-20:])),
        "seconds": round(time.perf_counter() - start, 1),
    }


# --- all runs -------------------------------------------------------------------------------------


def result_path(out: Path, video: str, budget: int, seed: int) -> Path:
    return out / "results" / f"{video}-{budget}-{seed}.json"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def claim(out: Path, settings: Settings) -> None:
    """Makes the folder this benchmark's, or checks that it is.

    Results of different settings in one curve would be worth nothing. Raises BenchmarkError.
    """
    marker, ours = out / "settings.json", dataclasses.asdict(settings)
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != ours:
            raise BenchmarkError(f"{out} has runs of {found}, not of {ours}; choose another --out.")
    elif out.exists() and any(out.iterdir()):
        raise BenchmarkError(f"{out} is not empty and not of this benchmark; choose another --out.")
    else:
        write_json(marker, ours)


def run_case(
    out: Path,
    settings: Settings,
    video: str,
    budget: int,
    seeds: Sequence[int],
    tokenizer: Tokenizer,
    tick: Callable[[float], None],
) -> Iterator[dict[str, Any]]:
    """Yields the results of one input and budget; encodes and compiles once for all seeds."""
    encoded = encode(out / "clips", video, budget, model_config(), tokenizer)
    pack = pack_of(encoded.train, settings, seeds)
    experiment = experiment_of(
        data_config(out / "clips/train.jsonl", video, budget),
        pack,
        settings.steps,
        settings,
        global_rows=pack.rows,
        workdir=str(out),
    )
    train_step = jax.jit(
        make_train_step(
            model_graph(experiment, jax.default_backend()),
            experiment.optimizer,
            steps=experiment.steps,
            reduction=experiment.loss_reduction,
        ),
        donate_argnums=0,
    )
    for seed in seeds:
        start_from = str(out / f"base-{seed}")
        one = dataclasses.replace(experiment, seed=seed, init_from=start_from)
        result = train_and_ask(encoded, one, settings.batch, train_step, tokenizer, tick)
        yield {"input": video, "budget": budget, "seed": seed, **result}


def run_all(
    out: Path, settings: Settings, budgets: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Does every run that has no result yet; returns the results of all runs."""
    claim(out, settings)
    cases = [(video, budget) for budget in budgets for video in INPUTS]
    left = {case: [s for s in seeds if not result_path(out, *case, s).exists()] for case in cases}
    left = {case: some for case, some in left.items() if some}
    if left:
        write_clips(out / "clips", {s: getattr(settings, f"{s}_clips") for s in SPLITS})
    for seed in sorted({seed for some in left.values() for seed in some}):
        if train(base_experiment(out, settings, seed)) < settings.base_steps:
            raise BenchmarkError("The run stopped; run the same command to continue.")
    tokenizer = load_tokenizer(TOKENIZER, model_config())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.fields[rate]:.1f} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, speed_estimate_period=120, transient=True) as progress:
        # A step's time grows with its tokens, so the bar counts tokens.
        work = sum(budget * settings.steps * len(some) for (_, budget), some in left.items())
        bar, last = progress.add_task("", total=work, rate=0.0), time.perf_counter()
        for (video, budget), some in left.items():
            progress.update(bar, description=f"{video} {budget}")

            def tick(loss: float, title: str = f"{video} {budget}", advance: int = budget) -> None:
                nonlocal last
                rate, last = 1 / (time.perf_counter() - last), time.perf_counter()
                title = f"{title}: loss {loss:.2f}"
                progress.update(bar, advance=advance, rate=rate, description=title)

            for result in run_case(out, settings, video, budget, some, tokenizer, tick):
                write_json(result_path(out, video, budget, result["seed"]), result)
                progress.console.print(json.dumps(result), soft_wrap=True, highlight=False)
    return [
        json.loads(result_path(out, *case, seed).read_text()) for case in cases for seed in seeds
    ]


def _define_flags() -> None:
    flags.DEFINE_string("out", "runs/codec_vs_uniform", "The folder of clips, models and results.")
    flags.DEFINE_string("png", None, "The figure to write; none unless set.")
    flags.DEFINE_list("budgets", [str(b) for b in BUDGETS], "Vision tokens a clip.")
    flags.DEFINE_list("seeds", [str(s) for s in SEEDS], "One base model each.")
    flags.DEFINE_bool("quick", False, "A few steps on a few clips, to see it run.")


def numbers(flag: str, texts: Sequence[str]) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(text) for text in texts}))
    except ValueError:
        found = ()
    if not found:
        given = ",".join(texts)
        raise BenchmarkError(f"--{flag} is {given!r}; it must be a list such as 0,1,2.")
    return found


def main(given: Given) -> None:
    budgets, seeds = numbers("budgets", given.budgets), numbers("seeds", given.seeds)
    for budget in budgets:
        if budget % FRAME_TOKENS or not 2 <= budget // FRAME_TOKENS <= FRAMES:
            raise BenchmarkError(
                f"--budgets has {budget}; a budget must be {FRAME_TOKENS} (one frame) times 2 "
                f"to {FRAMES}."
            )
    if min(seeds) < 0:
        raise BenchmarkError(f"--seeds has {min(seeds)}; seeds are 0 or more.")
    results = run_all(Path(given.out), QUICK if given.quick else Settings(), budgets, seeds)
    print(table(results))
    print(f"{sum(r['seconds'] for r in results) / 60:.1f} minutes in {len(results)} runs")
    if given.png:
        plot(results, Path(given.png))


if __name__ == "__main__":
    run(main, _define_flags, verbosity=logging.ERROR)  # Orbax logs every action at INFO
