"""Several hundred damaged inputs: each is rejected for its reason or read correctly. None hangs or
ends a process, takes much memory, or changes the samples around it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageFile

from ov2_jax.config.data import SourceConfig
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.data.sources.records import RawRecord
from tests.data.bad import cases as bad_data
from tests.data.bad.cases import OK, Case
from tests.data.bad.clips import clip_cases
from tests.data.bad.pictures import picture_cases
from tests.data.bad.records import good_rows, record_cases
from tests.data.bad.shards import shard_cases
from tests.programs import REPOSITORY
from tests.tiny import tiny_model, tokenizer

# Damaged clips: fewer frames may decode than the header states.
_CUT = ("clip cut", "clip flip", "codec cut", "codec flip")
MIB = 900  # the largest picture that is decoded takes 2 x 340 MB


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[Case], list[dict[str, Any]]]:
    """The folder, its cases, and where each one lies."""
    folder = tmp_path_factory.mktemp("bad")
    cases = [*picture_cases(folder), *clip_cases(folder), *record_cases(folder)]
    cases += shard_cases(folder)
    places, lines = [], {"uniform": [], "codec": []}
    (folder / "shards").mkdir()
    for case in cases:
        if case.file is not None:
            path = f"shards/{case.video}"
            (folder / path).write_bytes(case.file)
            places.append({"path": path, "line": None})
        else:
            of_kind = lines[case.video]
            path = f"{case.video}.jsonl"
            places.append({"path": path, "line": len(of_kind), "video": case.video})
            of_kind.append(case.line)
    for kind, texts in lines.items():
        (folder / f"{kind}.jsonl").write_bytes(b"\n".join(texts) + b"\n")
    (folder / "cases.json").write_text(json.dumps(places))
    return folder, cases, places


@pytest.fixture(scope="module")
def outcomes(corpus) -> list[dict[str, Any]]:
    """What became of each case, in processes that a crash or a hang would end."""
    folder, cases, _ = corpus
    results: list[dict[str, Any]] = []
    while len(results) < len(cases):
        command = [sys.executable, "-m", bad_data.__name__, str(folder), str(len(results))]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, errors="replace", timeout=300
        )
        results += [json.loads(text) for text in done.stdout.splitlines()]
        if len(results) < len(cases):
            error = f"exit {done.returncode}: {done.stderr[-1500:]}"
            results.append({"outcome": error, "mib": 0, "s": 0, "stderr": ""})
        else:
            results[-1]["stderr"] = done.stderr
    assert [r.get("number", i) for i, r in enumerate(results)] == list(range(len(cases)))
    return results


def test_every_case_ends_as_it_should(corpus, outcomes):
    """One test for all, as they share two processes; it names each case that did not."""
    folder, cases, places = corpus
    assert len(cases) >= 300 and len({case.name for case in cases}) == len(cases)
    wrong = []
    for case, place, result in zip(cases, places, outcomes, strict=True):
        if case.file is not None:
            problem = _file_problem(case, result)
        else:
            problem = _problem(case, result) or _where(result, folder, place)
        if problem:
            wrong.append(f"{case.name}: {problem}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)


def _problem(case: Case, result: dict[str, Any]) -> str:
    if result["outcome"] not in case.wants:
        return f"{result['outcome']} ({result.get('detail')}) instead of {' or '.join(case.wants)}"
    if result["outcome"] == OK:
        if result["measured"] is not True and not case.name.startswith(_CUT):
            return f"measured as {result['measured']}"
        other = {k: result[k] for k, v in case.facts.items() if result[k] != v}
        return f"{other} instead of {case.facts}" if other else ""
    return ""


def _where(result: dict[str, Any], folder: Path, place: dict[str, Any]) -> str:
    """What is wrong with a rejection's place and detail, or nothing."""
    if result["outcome"] == OK:
        return ""
    row = json.loads(json.dumps(result))
    if row["file"] != str(folder / place["path"]) or row["line"] != place["line"] + 1:
        return f"reported at {row['file']} line {row['line']}"
    if not 10 <= len(row["detail"]) <= 2100:
        return f"the detail has {len(row['detail'])} characters: {row['detail'][:80]}"
    if row["reason"] in ("bad_image", "bad_video", "missing_file") and not _names_file(row):
        return f"the detail names no file: {row['detail']}"
    return ""


def _names_file(row: dict[str, Any]) -> bool:
    named = row["id"].removeprefix("uniform:").removeprefix("codec:")
    return named in row["detail"] or any(
        mark in row["detail"]
        for mark in ("there is no", "looked up", "images[0]", "videos[0]", "clips/")
    )


def _file_problem(case: Case, result: dict[str, Any]) -> str:
    stops = case.facts.get("stops")
    if stops or "rows" not in result:
        message = result.get("stops", "") or result.get("outcome", "")
        # A file whose columns were damaged into others, or without any row, may stop a run.
        may = not case.facts and ("no known layout" in message or "no sample" in message)
        good = (
            may
            or (stops and stops in message)
            or (case.facts.get("rows") == [] and "no sample" in message)
        )
        return "" if good else f"stops with {message!r}"
    rows = [row["outcome"] for row in result["rows"]]
    if "rows" in case.facts and rows != case.facts["rows"]:
        return f"{rows} instead of {case.facts['rows']}"
    missing = set(case.facts.get("has", ())) - set(rows)
    other = set(rows) - set(case.wants)
    details = [row.get("detail") for row in result["rows"]]
    return f"{rows}, {details}" if missing or other else ""


def test_nothing_takes_long_or_much_memory(corpus, outcomes):
    _, cases, _ = corpus
    slow = {c.name: r["s"] for c, r in zip(cases, outcomes, strict=True) if r["s"] > 12}
    large = {c.name: r["mib"] for c, r in zip(cases, outcomes, strict=True) if r["mib"] > MIB}
    assert not slow and not large


def test_nothing_is_written_to_the_terminal(outcomes):
    """FFmpeg and Pillow would report every damaged file. Pillow cannot switch off libtiff's errors
    on damaged LZW data."""
    lines = [text for r in outcomes for text in r.get("stderr", "").splitlines()]
    assert [text for text in lines if not text.startswith("tempfile.tif: ")] == []


def test_truncated_pictures_are_not_padded():
    """Some library may have switched this on for the whole process."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("array", "wants"),
    [
        (np.zeros((28, 28, 3), np.uint8), OK),
        (np.zeros((28, 28, 3), np.uint16), "bad_image"),
        (np.zeros((28, 28, 3), np.float32), "bad_image"),
        (np.zeros((28, 28, 3), bool), "bad_image"),
        (np.zeros((28, 28, 3), object), "bad_image"),
        (np.zeros((28, 28, 1), np.uint8), "bad_image"),
        (np.zeros((28, 28, 4), np.uint8), "bad_image"),
        (np.zeros((28, 28), np.uint8), "bad_image"),
        (np.zeros(28, np.uint8), "bad_image"),
        (np.zeros((), np.uint8), "bad_image"),
        (np.zeros((0, 0, 3), np.uint8), "bad_aspect"),
        (np.zeros((0, 9, 3), np.uint8), "bad_aspect"),
        (np.zeros((28, 28, 3), np.uint8)[::-1, ::2], OK),
    ],
)
def test_arrays_in_place_of_pictures(array, wants):
    """As TFDS decodes them."""
    row = bad_data.sample("<image>?", images=[array])
    raw = RawRecord(row, "a", 1, "/", "a")
    for result in (bad_data.make_encoder()(raw), bad_data.make_encoder().measure(raw)):
        assert getattr(result, "reason", OK) == wants


class _Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class _OddRow(dict):
    def items(self):
        raise _Mute


def test_an_exception_without_text_is_a_rejection():
    result = bad_data.make_encoder()(RawRecord(_OddRow(id="odd"), "a", 1, "/", "a"))
    assert result == ("internal_error", "_Mute: it has no text", "odd", "a", 1)


# --- among good samples ---------------------------------------------------------------------------


def _load(sources, folder, count: int, workers: int):
    """`count` good samples, each in a pack of its own, and the rejected ones."""
    data = bad_data.config(
        tuple(sources), lookahead=1, shuffle=False, num_workers=workers, max_reject_share=1.0
    )
    log = folder / f"rejected-{workers}.jsonl"
    loader = make_loader(
        data, bad_data.pack(), tiny_model(), tokenizer(), packs_per_step=1, seed=0, rejects_path=log
    )
    found = {}
    try:
        for batch, info in loader:
            ((name,),) = info.sample_ids
            if name.startswith("good-"):
                assert name not in found
                found[name] = batch
            if len(found) == count:
                break
    finally:
        loader.close()
    rejected = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
    return found, rejected


def test_good_samples_beside_bad_ones_are_untouched(corpus, outcomes):
    folder, cases, places = corpus
    good = [bad_data.line(row) for row in good_rows(folder)]
    (folder / "good.jsonl").write_bytes(b"\n".join(good) + b"\n")
    alone, rejected = _load([SourceConfig(str(folder / "good.jsonl"))], folder, len(good), 0)
    assert len(alone) == len(good) and not rejected

    bad = [case for case in cases if case.file is None and case.video == "uniform"]
    every = len(bad) // (len(good) - 1)
    mixed, wants = [], {}
    for i, case in enumerate(bad):
        if i % every == 0 and i // every < len(good) - 1:
            mixed.append(good[i // every])
        mixed.append(case.line)
        wants[len(mixed)] = case.wants
    (folder / "mixed.jsonl").write_bytes(b"\n".join([*mixed, good[-1]]) + b"\n")
    opens = [
        SourceConfig(str(folder / place["path"]))
        for case, place, result in zip(cases, places, outcomes, strict=True)
        if case.file is not None and result.get("rows")
    ]
    found, rejected = _load(
        [*opens, SourceConfig(str(folder / "mixed.jsonl"))], folder, len(good), 2
    )
    reasons = {r["line"]: r["reason"] for r in rejected if r["file"].endswith("mixed.jsonl")}
    assert all(reasons.get(number, OK) in allowed for number, allowed in wants.items())
    assert reasons.keys() <= wants.keys()
    assert found.keys() == alone.keys()
    for name, batch in alone.items():
        for want, got in zip(_arrays(batch), _arrays(found[name]), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)


def _arrays(batch) -> list[np.ndarray]:
    return [*batch[:-1], *(array for rows in batch.vision for array in rows)]
