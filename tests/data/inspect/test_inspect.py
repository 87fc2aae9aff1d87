"""The page shows what the loader's batches hold, and why samples were rejected."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ov2_jax.config.data import SourceConfig
from ov2_jax.config.experiment import Experiment
from ov2_jax.core.batch import IGNORE
from ov2_jax.data.encoding import images as images_lib
from ov2_jax.data.encoding.codec import read_codec_clip
from ov2_jax.data.inspect.inspect import InspectError, check_out, inspect_data, write_page
from ov2_jax.data.inspect.media import data_uri, sample_kind, unpatchify, window_kind
from ov2_jax.data.inspect.page import histogram
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.run import prepare
from ov2_jax.data.prepare.runners import ProcessRunner
from ov2_jax.data.sample import EncodedSample
from tests.data.files import chat, picture
from tests.data.files import write_jsonl as jsonl
from tests.data.inspect.pages import (
    CODEC,
    HOSTILE,
    PACK,
    Reader,
    encoded,
    experiment,
    moving,
    pixels,
    report,
)
from tests.programs import PATIENCE, REPOSITORY
from tests.tiny import tiny_model, tokenizer


def batches(corpus: Experiment, folder: Path, steps: int):
    loader = make_loader(
        corpus.data,
        corpus.pack,
        corpus.model,
        tokenizer(),
        packs_per_step=1,
        seed=corpus.seed,
        rejects_path=folder / "rejected.jsonl",
    )
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def test_rows_are_the_loaders_batches(corpus, page, tmp_path):
    check_rows(corpus, page, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_those_of_the_plan(corpus, page, tmp_path, packed):
    out = tmp_path / "plan"
    job = PrepareJob(
        corpus.data, corpus.pack, corpus.model, corpus.tokenizer, seed=corpus.seed, out=str(out)
    )
    prepare(job, ProcessRunner(1), packed_shards=packed, console=Console(quiet=True))
    data = dataclasses.replace(corpus.data, plan=str(out))
    planned = dataclasses.replace(corpus, data=data)
    got = inspect_data(planned, tokenizer(), count=1000, samples=2)
    check_rows(planned, got, tmp_path)
    names = [s["id"] for s in report(got)["samples"]]
    good = {s.id for s in encoded(corpus).values() if isinstance(s, EncodedSample)}
    assert set(names) == good and len(names) == 60 + 2 * 3
    # Those that prepare found, and the broken picture that only decoding finds.
    assert {reason: sorted(cells) for reason, cells in Reader(got).reasons.items()} == {
        reason: sorted(cells) for reason, cells in Reader(page).reasons.items()
    }


def check_rows(corpus: Experiment, page: str, tmp_path: Path) -> None:
    data = report(page)
    assert len(data["packs"]) > 2
    step = 0
    for pack, (batch, info) in zip(
        data["packs"], batches(corpus, tmp_path, len(data["packs"])), strict=True
    ):
        numbers = range(step, step + info.samples)
        step += info.samples
        assert tuple(data["samples"][n]["id"] for n in numbers) == info.sample_ids[0]
        assert (pack["tokens"], pack["patches"]) == (info.tokens, info.patches)
        assert pack["supervised"] == info.supervised_tokens
        assert sorted(s[0] for row in pack["rows"] for s in row) == list(numbers)
        for row, samples in enumerate(pack["rows"]):
            kinds = np.full(PACK.seq_len, -1)
            for n, offset, *runs in samples:
                look = np.repeat(runs[::2], runs[1::2])
                assert len(look) == data["samples"][n]["tokens"]
                kinds[offset : offset + len(look)] = look
            segments, targets = batch.segment_ids[0, row], batch.targets[0, row]
            np.testing.assert_array_equal(kinds >= 0, segments > 0)
            np.testing.assert_array_equal(kinds == 1, batch.vision_index[0, row] >= 0)
            np.testing.assert_array_equal(np.flatnonzero(kinds == 2) - 1,
                                          np.flatnonzero(targets != IGNORE))  # fmt: skip
        for rows, vision in zip(pack["vision"], batch.vision, strict=True):
            for row, windows in enumerate(rows):
                filled = np.zeros(vision.segment_ids.shape[-1], bool)
                for _, offset, size, _ in windows:
                    assert not filled[offset : offset + size].any()
                    filled[offset : offset + size] = True
                np.testing.assert_array_equal(filled, vision.segment_ids[0, row] > 0)


def test_every_data_set_task_and_kind_is_shown(page):
    data, shown = report(page), Reader(page).samples
    assert len(shown) == 30
    key = lambda s: (s["source"], s["task"], s["kind"])  # noqa: E731
    assert {key(data["samples"][n]) for n in shown} == {key(s) for s in data["samples"]}
    kinds = {s["kind"] for s in data["samples"]}
    assert kinds == {"text", "picture", "pictures", "clip", "codec clip"}
    names = [(data["samples"][n]["file"], data["samples"][n]["line"]) for n in shown]
    assert len(set(names)) == len(names), "samples of a second epoch are not shown again"


def test_text_is_exact_and_its_loss_is_marked(corpus, page):
    samples = encoded(corpus)
    data = report(page)
    decode = tokenizer().backend_tokenizer.decode
    for n, shown in Reader(page).samples.items():
        sample = samples[data["samples"][n]["id"]]
        text = ""
        for look, piece in shown.pieces:
            pads = re.fullmatch(r"<\|image_pad\|>×(\d+)", piece) if look == "pad" else None
            assert (look == "pad") == (pads is not None)
            text += "<|image_pad|>" * int(pads.group(1)) if pads else piece
        assert text == decode(sample.tokens.tolist(), skip_special_tokens=False)
        loss = "".join(piece for look, piece in shown.pieces if "loss" in look)
        learnt = sample.tokens[sample.loss_mask].tolist()
        assert loss == decode(learnt, skip_special_tokens=False)


def test_pictures_are_the_patches_pixels(corpus, page):
    samples = encoded(corpus)
    data, vision = report(page), corpus.model.vision
    seen = {"png": 0, "jpeg": 0}
    for n, shown in Reader(page).samples.items():
        row = data["samples"][n]
        if row["kind"] == "codec clip":
            continue
        sample, at = samples[row["id"]], 0
        for uri, t in shown.uris:
            got = pixels(uri)
            h, w = got.shape[0] // 14, got.shape[1] // 14
            here = slice(at, at + h * w)
            at += h * w
            assert (sample.patch_positions[here, 0] == t).all()
            # Not by way of the code under test: the page's picture is cut into patches again.
            want = images_lib.patchify(got.astype(np.uint8), vision.patch_size, 2)
            error = np.abs(want.astype(np.int16) - sample.patches[here])
            kind = "png" if uri.startswith("data:image/png") else "jpeg"
            seen[kind] += 1
            assert error.max() == 0 if kind == "png" else error.mean() < 6
        assert at == len(sample.patches)
    assert seen["png"] > 20 and seen["jpeg"] == 2  # the two large ones, of noise


def check_blocks(page: str, number: int, sample) -> list[dict]:
    """Every patch of a clip is on a canvas where the page's data says; returns that data."""
    data = report(page)
    canvases = [pixels(uri) for uri, _ in Reader(page).samples[number].uris]
    groups = data["clips"][f"{number}-0"]
    assert len(groups) == len(sample.windows)
    block = data["block"]
    columns = canvases[0].shape[1] // block
    area = columns * (canvases[0].shape[0] // block)
    found = {}
    for group, patches in zip(groups, sample.windows.tolist(), strict=True):
        own = [canvases.pop(0) for _ in range(-(-patches // (area * 4)))]
        for frame in group["frames"]:
            for k, row, column in np.reshape(frame["blocks"], (-1, 3)).tolist():
                y, x = k % area // columns * block, k % area % columns * block
                drawn = own[k // area][y : y + block, x : x + block]
                for i in range(2):
                    for j in range(2):
                        patch = drawn[14 * i : 14 * (i + 1), 14 * j : 14 * (j + 1)]
                        found[frame["t"], 2 * row + i, 2 * column + j] = patch
        if group["anchor"] is not None:
            assert len(group["frames"][group["anchor"]]["blocks"]) == 3 * area
    assert not canvases
    assert len(found) == len(sample.patches)
    for place, patch in zip(sample.patch_positions.tolist(), sample.patches, strict=True):
        want = patch.reshape(3, 14, 14).transpose(1, 2, 0)
        assert np.abs(found[tuple(place)] - want).mean() < 4, place
    return groups


def test_codec_blocks_and_canvases(corpus, page):
    data = report(page)
    (number,) = (n for n in Reader(page).samples if data["samples"][n]["id"] == "codec")
    groups = check_blocks(page, number, encoded(corpus)["codec"])
    assert len(groups) > 1 and all(group["anchor"] is not None for group in groups)
    for frame in (frame for group in groups for frame in group["frames"]):
        assert float(frame["seconds"]) == pytest.approx(frame["t"] / 12, abs=0.0501)


@pytest.mark.parametrize("fps", [None, 12])
def test_canvases_made_beforehand(tmp_path, fps):
    """Their windows need not begin with an anchor, and without fps their text has no times."""
    config = dataclasses.replace(CODEC, max_canvases=6)
    clip = read_codec_clip(str(moving(tmp_path / "a.mp4")), config, timeout_s=60)
    layout = images_lib.patch_positions(0, 8, 12, 2)[:, 1:]
    names = [f"{i}.png" for i in range(len(clip.patches) // 96)]
    for name, patches in zip(names, np.split(clip.patches, len(names)), strict=True):
        canvas = unpatchify(patches, layout, (8, 12), tiny_model().vision)
        Image.fromarray(canvas).save(tmp_path / name)
    raster = np.lexsort((layout[:, 1], layout[:, 0]))
    order = (raster + 96 * np.arange(len(names))[:, None]).reshape(-1)
    np.save(tmp_path / "at.npy", clip.positions[order].astype(np.int32))
    line = {"images": names, "patch_positions": ["at.npy"], "fps": fps,
            "messages": chat("\n".join(["<image>"] * len(names)) + "\nHm?", "Hm.")}  # fmt: skip
    if fps is None:
        del line["fps"]
    case = experiment(SourceConfig(str(jsonl(tmp_path / "a.jsonl", [line]))))
    page = inspect_data(case, tokenizer())
    (sample,) = encoded(case).values()
    groups = check_blocks(page, 0, sample)
    assert [len(g["frames"]) > 1 for g in groups] == [True, True]
    assert page.count('class="codec"') == 1, "one clip"
    seconds = {f["seconds"] is None for g in groups for f in g["frames"]}
    assert seconds == {fps is None}


def test_statistics(page, corpus):
    data = report(page)
    tokens = sum(s["tokens"] for s in data["samples"])
    slots = len(data["packs"]) * PACK.token_slots
    text = re.sub(r"\s", " ", page)
    thin = f"{tokens:,} of {slots:,}".replace(",", "\u202f")
    assert f"{100 * tokens / slots:.1f}\u202f%" in page and thin in page
    shares = re.findall(r"</i>(quickstart|own)</th>\s*<td class=\"num\"><b>(\d+)</b>", text)
    counts = {name: int(n) for name, n in shares}
    assert counts == {
        name: sum(s["source"] == name for s in data["samples"]) for name in ("quickstart", "own")
    }
    assert sum(counts.values()) == len(data["samples"])


def test_rejected_samples_are_listed(page):
    reasons = Reader(page).reasons
    assert set(reasons) == {
        "missing_file", "bad_image", "placeholder_mismatch", "bad_json", "empty_answer"
    }  # fmt: skip
    # A title, and three cells for each sample. `own` is read twice, but each is listed once.
    assert [len(cells) - 1 for cells in reasons.values()] == [2 * 3, 3, 3, 3, 3]
    _, sample, why, where = reasons["empty_answer"]
    assert sample == "mute" and "no text" in why and where.endswith("own.jsonl, line 5")


def test_data_cannot_run_scripts_or_fetch(page):
    reader = Reader(page)
    assert len(reader.scripts) == 2  # the data, the page's own
    assert not any(tag == "img" and "onerror" in attrs for tag, attrs in reader.tags)
    assert all(link.startswith(("#", "data:")) for link in reader.links)
    (policy,) = (a["content"] for tag, a in reader.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert any(s["task"] == HOSTILE for s in report(page)["samples"])


def test_nothing_usable_still_tells_why(tmp_path):
    path = jsonl(tmp_path / "bad.jsonl", [{"messages": chat("Well?", "")}] * 3)
    page = inspect_data(experiment(SourceConfig(str(path))), tokenizer())
    assert len(Reader(page).reasons["empty_answer"]) == 1 + 3 * 3
    assert report(page)["packs"] == [] and "#packs" not in Reader(page).links


def test_odd_names_can_be_written(tmp_path):
    """JSON can spell characters that UTF-8 has no bytes for."""
    odd = '{"id": "a\\ud800b", "messages": [{"role": "user", "content": "Hm?"}%s]}'
    answer = ', {"role": "assistant", "content": "Hm."}'
    path = jsonl(tmp_path / "odd.jsonl", [odd % answer, odd % ""])
    page = inspect_data(experiment(SourceConfig(str(path))), tokenizer())
    write_page(page, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<h3>a\\ud800b</h3>" in page and "<code>a\\ud800b</code>" in page


def test_count_and_samples_bound_the_page(corpus):
    page = inspect_data(corpus, tokenizer(), count=5, samples=0)
    assert Reader(page).samples == {}
    data = report(page)
    assert len(data["samples"]) >= 5 and len(data["packs"]) == 1


def test_pictures_between_text_and_frames_alone(tmp_path):
    """Each frame a window (frame_form hf), two clips that follow each other, a picture between."""
    moving(tmp_path / "a.mp4", frames=12)
    picture(tmp_path / "b.png", 56, 56)
    line = {"id": "all", "videos": ["a.mp4", "a.mp4"], "image": "b.png",
            "messages": chat("<image>\n<video><video>\nHm?", "Hm.")}  # fmt: skip
    path = jsonl(tmp_path / "all.jsonl", [line])
    for form, times in (("hf", True), ("training", True), ("training", False)):
        case = experiment(SourceConfig(str(path)), frame_form=form, timestamps=times)
        page = inspect_data(case, tokenizer())
        assert page.count('class="strip"') == 2 and page.count('class="single"') == 1
        times_ = [t for _, t in Reader(page).samples[0].uris]
        assert times_ == [0, *[0, 2, 4, 7, 9, 11] * 2]


def test_window_kinds():
    grid = images_lib.patch_positions(0, 4, 6, 2)
    later = images_lib.patch_positions(7, 4, 6, 2)
    assert window_kind(grid) == "picture"
    assert window_kind(later) == "frames"
    assert window_kind(np.concatenate([grid, later])) == "frames"
    assert window_kind(np.concatenate([grid, later[:4]])) == "codec"
    assert [sample_kind(k) for k in ([], ["picture"], ["picture"] * 2)] == [
        "text", "picture", "pictures"
    ]  # fmt: skip


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 3)])
def test_unpatchify_undoes_patchify(patch, merge):
    model = tiny_model(patch=patch, merge=merge)
    h, w = 2 * merge, 3 * merge
    want = np.random.default_rng(0).integers(0, 256, (h * patch, w * patch, 3), np.uint8)
    patches = images_lib.patchify(want, patch, merge)
    places = images_lib.patch_positions(0, h, w, merge)[:, 1:]
    got = unpatchify(patches, places, (h, w), model.vision)
    np.testing.assert_array_equal(got, want)
    assert data_uri(got[:28, :28]).startswith("data:image/png")


def test_histogram_counts_every_value_once():
    even = [(n, "clip") for n in range(10, 110)]
    wide = [(n, "text") for n in (3, 3, 50, 4000)]
    for values, logarithmic in ((even, False), (wide, True), ([(7, "picture")], False)):
        h = histogram(values)
        assert h["logarithmic"] == logarithmic
        bins = h["bins"]
        assert bins[0]["low"] == h["low"] and bins[-1]["high"] == h["high"]
        assert all(a["high"] + 1 == b["low"] for a, b in zip(bins, bins[1:], strict=False))
        for b in bins:
            assert sum(b["counts"]) == sum(b["low"] <= n <= b["high"] for n, _ in values)


def test_out_must_be_a_page_in_a_folder(tmp_path):
    for name in ("report.txt", "missing/report.html"):
        with pytest.raises(InspectError, match="--out"):
            check_out(tmp_path / name)
    (tmp_path / "a.html").mkdir()
    with pytest.raises(InspectError, match="which is a folder"):
        check_out(tmp_path / "a.html")
    out = check_out(tmp_path / "b.html")
    out.write_text("old")
    write_page("new", out)
    assert out.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ov2_jax.data.inspect", *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.long
def test_the_program(corpus, tmp_path):
    """The config's own tokenizer and model; its work directory is neither needed nor made."""
    out = tmp_path / "report.html"
    source = corpus.data.sources[0].path
    config = "--config=configs/quickstart.py"
    path = f"--config.data.sources[0].path={source}"
    made = run(config, path, "--config.workdir=", f"--out={out}", "--count=20", "--samples=3")
    assert made.returncode == 0, made.stderr
    assert str(out) in made.stdout
    page = out.read_text()
    assert len(Reader(page).samples) == 3 and "configs/quickstart.py" in page
    assert list(tmp_path.iterdir()) == [out]

    missing = run(config, "--config.data.sources[0].path=none.jsonl", f"--out={out}")
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines()[-1].startswith("DataError: The data source none.js")
    absent = run("--config=configs/absent.py", f"--out={out}")
    assert absent.returncode == 1
    assert absent.stderr.startswith("ConfigError: The file that --config names cannot be loaded")
    assert out.read_text() == page, "a failed run leaves the page of the one before"
