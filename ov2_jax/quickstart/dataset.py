"""Writes the quickstart's data set as real files, as a user's own data would lie on disk.

    python -m ov2_jax.quickstart.dataset --out=DIR [--seed=0 --train=16000 --heldout=240]

makes

    DIR/train.jsonl, DIR/heldout.jsonl   LLaVA samples: id, task, image | video + fps, conversations
    DIR/train/..., DIR/heldout/...       JPEG and PNG pictures, H.264 MP4 clips
    DIR/dataset.json                     what was asked for and made; written last

Paths in the JSONL files are relative to DIR. The same arguments give the same bytes.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ov2_jax.core.errors import UserError
from ov2_jax.core.program import Given, run
from ov2_jax.quickstart import drawing, tasks

MARKER = "dataset.json"
# train.jsonl holds these broken samples on purpose: real data has them, and a newcomer should see
# that they are rejected with a reason, a file and a line, and neither end the run nor are
# trained on. They come on top of the samples asked for.
BROKEN = ("missing-file", "truncated-jpeg", "placeholder-mismatch", "broken-json")


class DatasetError(UserError):
    """A data set that cannot be written as asked."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A written data set; `counts` is split -> task -> number of samples."""

    root: Path
    counts: dict[str, dict[str, int]]
    broken: int

    @property
    def train_jsonl(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def heldout_jsonl(self) -> Path:
        return self.root / "heldout.jsonl"


def task_counts(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Splits `total` in proportion to the weights, by largest remainder."""
    shares = {t: total * w / sum(weights.values()) for t, w in weights.items()}
    counts = {t: int(share) for t, share in shares.items()}
    by_remainder = sorted(shares, key=lambda t: counts[t] - shares[t])
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


def _line(sample_id: str, sample: tasks.Sample, media: dict[str, Any]) -> str:
    conversations = []
    if sample.system is not None:
        conversations.append({"from": "system", "value": sample.system})
    for question, answer in sample.turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": answer})
    record = {"id": sample_id, "task": sample.task, **media, "conversations": conversations}
    return json.dumps(record)


def _write_sample(root: Path, split: str, seed: int, task: str, k: int) -> str:
    """Writes a sample's files and returns its line of the JSONL."""
    sample = tasks.make_sample(task, seed, k, heldout=split == "heldout")
    name = f"{split}/{task}/{k:05d}"
    media: dict[str, Any] = {}
    if sample.clip is not None:
        path = f"{name}.mp4"
        (root / path).write_bytes(drawing.encode_clip(sample.clip))
        fps = sample.clip.fps
        media = {"video": path, "fps": int(fps) if fps.denominator == 1 else float(fps)}
    elif sample.pictures:
        paths = []
        for i, pixels in enumerate(sample.pictures):
            # By chance, not by k: k picks the answer, which a JPEG's artefacts must not give away.
            file_format = ("jpg", "png")[np.random.default_rng([seed, k, i]).integers(2)]
            number = f"-{i + 1}" if len(sample.pictures) > 1 else ""
            paths.append(f"{name}{number}.{file_format}")
            (root / paths[-1]).write_bytes(drawing.encode_image(pixels, file_format))
        media = {"image": paths if len(paths) > 1 else paths[0]}
    return _line(f"{split}-{task}-{k:05d}", sample, media)


def _write_chunk(root: Path, seed: int, jobs: list[tuple[str, str, int]]) -> list[str]:
    return [_write_sample(root, split, seed, task, k) for split, task, k in jobs]


def _broken_lines(root: Path, seed: int) -> list[str]:
    """One line for each of `BROKEN`; see there why."""
    sample = tasks.make_sample("color", seed, 0, heldout=False)
    whole = drawing.encode_image(sample.pictures[0], "jpg")
    (root / "train/broken").mkdir(parents=True)
    (root / "train/broken/truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "train/broken/whole.jpg").write_bytes(whole)
    images = {
        "missing-file": "train/broken/missing.jpg",
        "truncated-jpeg": "train/broken/truncated.jpg",
        # Two pictures for a question that has one <image> mark.
        "placeholder-mismatch": ["train/broken/whole.jpg"] * 2,
        "broken-json": "train/broken/whole.jpg",
    }
    lines = {k: _line(f"broken-{k}", sample, {"image": images[k]}) for k in BROKEN}
    lines["broken-json"] = lines["broken-json"][:-20]
    return list(lines.values())


def _digest() -> str:
    """Changes when the sources that make the data do: an older data set is then made again."""
    digest = hashlib.sha256()
    for source in (drawing.__file__, tasks.__file__, __file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:16]


def _write_all(
    root: Path, seed: int, counts: dict[str, dict[str, int]], workers: int
) -> dict[str, list[str]]:
    """Writes all media; returns the lines of each split in the order split, task, k."""
    jobs = [
        (s, t, k) for s, by_task in counts.items() for t, n in by_task.items() for k in range(n)
    ]
    for split, task in {(s, t) for s, t, _ in jobs if t != "text"}:
        (root / split / task).mkdir(parents=True, exist_ok=True)
    if workers == 1:
        written = _write_chunk(root, seed, jobs)
    else:
        # Spawned rather than forked: the caller may have started JAX's threads.
        context = multiprocessing.get_context("spawn")
        chunks = [jobs[i : i + 100] for i in range(0, len(jobs), 100)]
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            done = pool.map(_write_chunk, [root] * len(chunks), [seed] * len(chunks), chunks)
            written = [line for chunk in done for line in chunk]
    lines: dict[str, list[str]] = {split: [] for split in counts}
    for (split, _, _), line in zip(jobs, written, strict=True):
        lines[split].append(line)
    return lines


def write_dataset(
    out: str | os.PathLike,
    *,
    seed: int = 0,
    train: int = 16000,
    heldout: int = 240,
    workers: int | None = None,
) -> Dataset:
    """Writes the data set, or reuses the one in `out` if the same arguments and sources made it.

    Args:
      out: a folder that does not exist, is empty, or holds a data set made earlier, which is
        replaced if it differs.
      seed: of everything that is drawn at random.
      train: samples in train.jsonl, without the four broken ones.
      heldout: samples in heldout.jsonl, equally many of each task (but for the remainder), all
        with a single turn.
      workers: processes; by default one per core. The files do not depend on it.

    Raises:
      DatasetError: too few samples, or `out` holds something else.
    """
    number = len(tasks.TASKS)
    for name, value in (("train", train), ("heldout", heldout)):
        if value < number:
            raise DatasetError(f"{name} is {value}; it must be at least {number}, one per task.")
    if workers is not None and workers < 1:
        raise DatasetError(f"workers is {workers}; it must be at least 1.")
    root = Path(out)
    counts = {
        "train": task_counts(train, {t: w for t, (_, w) in tasks.TASKS.items()}),
        "heldout": task_counts(heldout, dict.fromkeys(tasks.TASKS, 1.0)),
    }
    made = {"seed": seed, "counts": counts, "broken": len(BROKEN), "sources": _digest()}
    dataset = Dataset(root, counts, len(BROKEN))
    if (root / MARKER).exists():
        if json.loads((root / MARKER).read_text()) == made:
            return dataset
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"{root} is not empty and no quickstart data set; choose another --out.")

    root.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that a killed run leaves no half data set there.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        fresh = Path(temporary) / "data"
        fresh.mkdir()
        lines = _write_all(fresh, seed, counts, workers or os.cpu_count() or 1)
        lines["train"] += _broken_lines(fresh, seed)
        for split in lines:
            order = np.random.default_rng([seed, len(lines[split])]).permutation(len(lines[split]))
            text = "".join(lines[split][i] + "\n" for i in order)
            (fresh / f"{split}.jsonl").write_text(text)
        (fresh / MARKER).write_text(json.dumps(made, indent=1) + "\n")
        if root.exists():
            shutil.rmtree(root)
        fresh.rename(root)
    return dataset


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder of the data set.", required=True)
    flags.DEFINE_integer("seed", 0, "Of everything that is drawn at random.")
    flags.DEFINE_integer("train", 16000, "Samples to train on.")
    flags.DEFINE_integer("heldout", 240, "Samples to evaluate on.")


def main(given: Given) -> None:
    dataset = write_dataset(given.out, seed=given.seed, train=given.train, heldout=given.heldout)
    for split, by_task in dataset.counts.items():
        listed = ", ".join(f"{task} {n}" for task, n in by_task.items())
        print(f"{dataset.root / split}.jsonl: {sum(by_task.values())} samples ({listed})")
    print(f"and {dataset.broken} broken ones in train.jsonl, to show how they are rejected")


if __name__ == "__main__":
    run(main, _define_flags)
