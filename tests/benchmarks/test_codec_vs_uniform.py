"""benchmarks/codec_vs_uniform.py: clips show their event; a stopped benchmark continues."""

import subprocess
import sys

import pytest

from benchmarks import codec_vs_uniform as benchmark
from benchmarks.codec_vs_uniform_clips import (
    EVENT_FRAMES,
    FRAMES,
    SECONDS,
    make_clip,
    read_events,
    write_clips,
)
from benchmarks.codec_vs_uniform_figure import plot, table
from ov2_jax.core.program import Given
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.quickstart import TOKENIZER
from tests.programs import REPOSITORY

TINY = benchmark.Settings(
    base_clips=16, train_clips=16, heldout_clips=4, base_steps=2, steps=2, batch=8
)


def test_event_is_where_the_clip_says():
    for number in range(20):
        clip, event = make_clip("train", number)
        changed = (clip.frames != clip.frames[0]).any((1, 2, 3)).nonzero()[0]
        assert changed.tolist() == list(range(event.first, event.first + EVENT_FRAMES))
        seconds = {int(n / clip.fps) for n in changed}
        assert seconds == {event.second} and event.second in SECONDS
        assert len(clip.frames) == FRAMES


def test_base_clips_fit_their_answers():
    seconds = set()
    for number in range(60):
        clip, event = make_clip("base", number)
        changed = (clip.frames != clip.frames[0]).any((1, 2, 3)).nonzero()[0]
        assert changed.tolist() == [event.first]
        assert int(event.first / clip.fps) == event.second
        seconds.add(event.second)
    assert seconds == set(SECONDS)


def test_codec_input_shows_the_event_and_uniform_frames_mostly_do_not(tmp_path):
    write_clips(tmp_path / "clips", {"train": 1, "heldout": 12})
    model = benchmark.model_config()
    tokenizer = load_tokenizer(TOKENIZER, model)
    shown = {}
    for video in benchmark.INPUTS:
        encoded = benchmark.encode(tmp_path / "clips", video, 36, model, tokenizer)
        shown[video] = encoded.shown
        for sample in (*encoded.train, *encoded.prompts):
            assert (sample.tokens == model.image_token_id).sum() == 36
            assert len(sample.patches) == 4 * 36
        assert [a.task for a in encoded.expected] == ["what", "when"] * 12
    assert shown["codec"] == 1
    assert shown["uniform"] < 0.4
    events = read_events(tmp_path / "clips/heldout.jsonl")
    answers = {a.id: a.expected for a in encoded.expected}
    for number in range(12):
        event = events[2 * number]
        assert answers[f"heldout-{number}-what"] == event.colour
        assert answers[f"heldout-{number}-when"] == str(event.second)


@pytest.mark.long
def test_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    benchmark.claim(out, TINY)
    found = {**_results()[0], "made": "earlier"}
    benchmark.write_json(benchmark.result_path(out, "codec", 18, 0), found)
    results = benchmark.run_all(out, TINY, (18,), (0,))
    assert results[0] == found
    assert (results[1]["input"], results[1]["budget"], results[1]["seed"]) == ("uniform", 18, 0)
    assert set(results[1]["accuracy"]) == {"what", "when"}
    assert all(0 <= value <= 1 for value in results[1]["accuracy"].values())

    monkeypatch.setattr(benchmark, "train", None)  # nothing is left to train
    monkeypatch.setattr(benchmark, "train_and_ask", None)
    assert benchmark.run_all(out, TINY, (18,), (0,)) == results
    with pytest.raises(benchmark.BenchmarkError, match="choose another --out"):
        benchmark.run_all(out, benchmark.Settings(), (18,), (0,))


def _results():
    return [
        {
            "input": video,
            "budget": budget,
            "seed": seed,
            "accuracy": {"what": 0.5 + seed / 4, "when": 0.25},
            "shown": 0.5,
            "seconds": 1.0,
        }
        for video in benchmark.INPUTS
        for budget in (18, 36)
        for seed in (0, 1)
    ]


def test_table_and_figure(tmp_path):
    lines = table(_results()).splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        "| 18 | 0.50 | 0.62 (0.50 to 0.75) | 0.25 | 0.50 | 0.62 (0.50 to 0.75) | 0.25 |"
    )
    pytest.importorskip("matplotlib")
    plot(_results(), tmp_path / "a.png")
    plot(_results(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 150_000


def given(out, **changes) -> Given:
    values = {"png": None, "budgets": ["18"], "seeds": ["0"], "quick": False}
    return Given(out=str(out), **(values | changes))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"budgets": ["20"]}, "--budgets has 20"),
        ({"budgets": ["9"]}, "--budgets has 9"),
        ({"budgets": ["1800"]}, "--budgets has 1800"),
        ({"budgets": ["18", "many"]}, "--budgets is '18,many'"),
        ({"seeds": ["-1"]}, "--seeds has -1"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path, flags, sentence):
    with pytest.raises(benchmark.BenchmarkError, match=sentence):
        benchmark.main(given(tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()


def test_the_program_ends_with_the_sentence():
    program = [sys.executable, "-m", "benchmarks.codec_vs_uniform", "--seeds=0,-2,1"]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "BenchmarkError: --seeds has -2; seeds are 0 or more."


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(benchmark.BenchmarkError, match="not of this benchmark"):
        benchmark.main(given(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
