"""The quickstart's data set and tokenizer: real files, balanced answers, nothing leaked."""

import collections
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from ov2_jax.quickstart import dataset, drawing, make_tokenizer, tasks

TRAIN, HELDOUT = 700, 70


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "data"
    return dataset.write_dataset(out, seed=3, train=TRAIN, heldout=HELDOUT, workers=1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(make_tokenizer.FOLDER)


def records(path: Path) -> list[dict]:
    """The lines of a JSONL without the ones that are broken on purpose."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if '"broken-' not in line]


def media(record: dict) -> list[str]:
    images = record.get("image", [])
    return [images] if isinstance(images, str) else images


def first_answer(record: dict) -> str:
    return next(t["value"] for t in record["conversations"] if t["from"] == "gpt")


def digest(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return list(container.decode(video=0))


def test_samples_have_the_llava_form_and_their_files(written):
    both = {"train": records(written.train_jsonl), "heldout": records(written.heldout_jsonl)}
    for split, wanted in (("train", TRAIN), ("heldout", HELDOUT)):
        found = both[split]
        assert len(found) == wanted == sum(written.counts[split].values())
        assert collections.Counter(r["task"] for r in found) == written.counts[split]
        for record in found:
            roles = [turn["from"] for turn in record["conversations"]]
            dialogue = roles[1:] if roles[0] == "system" else roles
            assert dialogue == ["human", "gpt"] * (len(dialogue) // 2) and dialogue
            assert all(turn["value"] for turn in record["conversations"])
            text = "".join(turn["value"] for turn in record["conversations"])
            assert text.count("<image>") == len(media(record))
            assert text.count("<video>") == ("video" in record)
            for path in media(record):
                assert not Path(path).is_absolute()
                with Image.open(written.root / path) as picture:
                    picture.load()
                    assert picture.format == {"jpg": "JPEG", "png": "PNG"}[path[-3:]]
    ids = [r["id"] for found in both.values() for r in found]
    assert len(set(ids)) == len(ids)
    conversations = [[t["from"] for t in r["conversations"]] for r in both["train"]]
    assert any("system" in c for c in conversations)
    assert any(c.count("gpt") == 2 for c in conversations)
    assert all(len(r["conversations"]) <= 3 for r in both["heldout"])  # one turn, perhaps a system


def test_pictures_differ_in_size_format_and_aspect(written):
    paths = [p for r in records(written.train_jsonl) for p in media(r)]
    sizes = {Image.open(written.root / p).size for p in paths}
    assert len(sizes) > 50
    cells = {(round(h / drawing.CELL), round(w / drawing.CELL)) for w, h in sizes}
    grids = {*tasks.GRIDS_ONE, *tasks.GRIDS_COUNT, *tasks.GRIDS_COMPARE}
    assert cells == grids  # resizing to multiples of 28 brings back the grid that was drawn
    formats = collections.Counter(p[-3:] for p in paths)
    assert min(formats["jpg"], formats["png"]) > len(paths) / 3


def test_file_format_says_nothing_about_the_answer(written):
    seen = collections.defaultdict(set)
    for record in records(written.train_jsonl):
        if isinstance(record.get("image"), str):
            answer = first_answer(record)
            seen[record["task"], answer].add(record["image"][-3:])
    assert all(formats == {"jpg", "png"} for formats in seen.values())


def test_clips_have_the_frames_and_times_that_the_sample_states(written):
    clips = [r for r in records(written.heldout_jsonl) if "video" in r]
    assert clips
    for record in clips:
        frames = decode(written.root / record["video"])
        for i, frame in enumerate(frames):
            assert float(frame.time) == pytest.approx(i / record["fps"], abs=1e-3)
        if record["task"] == "motion":
            assert len(frames) == tasks.MOTION_FRAMES
        else:  # whole strides: linspace over the frames needs no rounding
            assert (len(frames) - 1) % (tasks.NUM_FRAMES - 1) == 0


def test_when_is_answered_by_the_one_sampled_frame_that_differs(written):
    answers_by_index = collections.defaultdict(set)
    found = [r for r in records(written.train_jsonl) if r["task"] == "when"]
    for record in found:
        frames = decode(written.root / record["video"])
        sampled = np.round(np.linspace(0, len(frames) - 1, tasks.NUM_FRAMES)).astype(int)
        pixels = np.stack([frames[i].to_ndarray(format="rgb24") for i in sampled]).astype(float)
        difference = np.abs(pixels - np.median(pixels, axis=0)).mean((1, 2, 3))
        event = int(difference.argmax())
        assert np.sort(difference)[-2] < difference[event] / 4
        answer = record["conversations"][-1]["value"]
        assert answer == f"{sampled[event] / record['fps']:.1f} seconds"
        answers_by_index[event].add(answer)
    # The index of the frame does not tell the answer; only the timestamps do.
    assert all(len(answers) >= 4 for index, answers in answers_by_index.items() if index > 0)
    assert set(answers_by_index) == set(range(tasks.NUM_FRAMES))


def test_motion_goes_where_the_answer_says(written):
    axis_and_sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}
    for record in records(written.train_jsonl):
        if record["task"] != "motion":
            continue
        frames = [f.to_ndarray(format="rgb24") for f in decode(written.root / record["video"])]
        centres = []
        for frame in (frames[0], frames[-1]):
            background = np.median(frame, axis=(0, 1))
            shape = np.abs(frame - background).sum(-1) > 90
            centres.append([places.mean() for places in np.nonzero(shape)])
        axis, sign = axis_and_sign[first_answer(record)]
        moved = np.subtract(centres[1], centres[0])
        assert moved[axis] * sign > 20 and abs(moved[1 - axis]) < 3


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_are_balanced_so_that_chance_is_what_the_table_says(task):
    samples = [tasks.make_sample(task, 1, k, heldout=True) for k in range(120)]
    answers = collections.Counter(s.turns[0][1] for s in samples)
    majority = answers.most_common(1)[0][1] / len(samples)
    if task == "text":  # the best guess knows the question: half of them name two digits
        digits = sum(a.isdigit() for a in answers.elements())
        assert tasks.CHANCE[task] == digits / 2 / len(samples)
    elif task == "when":  # the best guess knows the stamps; without them it does no better
        assert majority <= tasks.CHANCE[task] + 0.05
    else:
        assert majority == pytest.approx(tasks.CHANCE[task])


def test_count_and_compare_agree_with_the_pixels():
    """Shapes lie in different cells, so occupied cells are shapes."""

    def occupied(pixels):
        grid = [round(n / drawing.CELL) for n in pixels.shape[:2]]
        size = (grid[1] * drawing.CELL, grid[0] * drawing.CELL)
        resized = np.asarray(Image.fromarray(pixels).resize(size), float)
        background = np.median(resized, axis=(0, 1))
        cells = np.abs(resized - background).sum(-1) > 90
        shape = (grid[0], drawing.CELL, grid[1], drawing.CELL)
        return int((cells.reshape(shape).mean((1, 3)) > 0.12).sum())

    for k in range(40):
        count = tasks.make_sample("count", 5, k, heldout=True)
        assert str(occupied(count.pictures[0])) == count.turns[0][1]
        compare = tasks.make_sample("compare", 5, k, heldout=True)
        question, answer = compare.turns[0]
        if "more" in question:
            numbers = [occupied(p) for p in compare.pictures]
            assert abs(numbers[0] - numbers[1]) >= tasks.COMPARE_GAP
            assert answer == ("first" if numbers[0] > numbers[1] else "second")


def test_nothing_heldout_is_in_train(written):
    files = digest(written.root)
    train = {h for name, h in files.items() if name.startswith("train/")}
    heldout = {h for name, h in files.items() if name.startswith("heldout/")}
    assert heldout and not train & heldout

    def texts(path):
        found = (r for r in records(path) if r["task"] == "text")
        return {r["conversations"][-2]["value"] for r in found}

    assert not texts(written.train_jsonl) & texts(written.heldout_jsonl)


def test_broken_samples_are_broken_as_named(written):
    lines = written.train_jsonl.read_text().splitlines()
    broken = {k: line for k in dataset.BROKEN for line in lines if f'"broken-{k}"' in line}
    assert len(lines) == TRAIN + len(dataset.BROKEN) and set(broken) == set(dataset.BROKEN)
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken["broken-json"])
    record = {k: json.loads(line) for k, line in broken.items() if k != "broken-json"}
    assert not (written.root / record["missing-file"]["image"]).exists()
    with pytest.raises(OSError, match="truncated"):
        Image.open(written.root / record["truncated-jpeg"]["image"]).load()
    mismatch = record["placeholder-mismatch"]
    marks = mismatch["conversations"][0]["value"].count("<image>")
    assert marks != len(mismatch["image"])
    assert '"broken-' not in written.heldout_jsonl.read_text()


def test_same_arguments_same_bytes_for_any_number_of_workers(written, tmp_path):
    again = dataset.write_dataset(tmp_path / "b", seed=3, train=TRAIN, heldout=HELDOUT, workers=2)
    assert digest(again.root) == digest(written.root)
    other = dataset.write_dataset(tmp_path / "c", seed=4, train=7, heldout=7, workers=1)
    assert digest(other.root)["heldout.jsonl"] != digest(written.root)["heldout.jsonl"]


def test_a_finished_data_set_is_reused_and_a_different_one_replaced(tmp_path):
    out = tmp_path / "data"
    arguments = {"seed": 0, "train": 7, "heldout": 7, "workers": 1}
    dataset.write_dataset(out, **arguments)
    before = (out / "train.jsonl").stat().st_mtime_ns
    dataset.write_dataset(out, **arguments)
    assert (out / "train.jsonl").stat().st_mtime_ns == before
    (out / "stale").write_text("from before")
    dataset.write_dataset(out, **(arguments | {"seed": 1}))
    assert not (out / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # no temporary folder is left


def test_refuses_what_it_cannot_do(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(dataset.DatasetError, match="not empty"):
        dataset.write_dataset(tmp_path, train=7, heldout=7, workers=1)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(dataset.DatasetError, match="heldout is 3"):
        dataset.write_dataset(tmp_path / "new", train=7, heldout=3, workers=1)
    with pytest.raises(dataset.DatasetError, match="workers is 0"):
        dataset.write_dataset(tmp_path / "new", train=7, heldout=7, workers=0)
    with pytest.raises(ValueError, match="Unknown shape 'star'"):
        shape = drawing.Shape("star", (0, 0, 0), 14, 14, 9)
        drawing.draw((28, 28), (1, 1), (255, 255, 255), [shape])


# --- The tokenizer --------------------------------------------------------------------------------


def test_the_shipped_tokenizer_is_the_one_that_the_script_makes(tmp_path):
    make_tokenizer.write_tokenizer(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {p.name for p in make_tokenizer.FOLDER.iterdir()}
    for name in names:
        assert (tmp_path / name).read_text() == (make_tokenizer.FOLDER / name).read_text(), name


def test_every_word_of_the_tasks_is_one_token(tokenizer):
    default = f"system\n{make_tokenizer.DEFAULT_SYSTEM}"  # one token as a whole
    texts = {text for text in make_tokenizer.corpus() if text != default}
    words = {w.strip("<>?.,:") for text in texts for w in text.split()}
    words = {w for w in words if w.isalpha()}
    assert words >= {*tasks.COLOURS, *tasks.SHAPES, *tasks.OPPOSITES, "first", "second", "seconds"}
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for text in texts:
        assert len(tokenizer.encode(text)) == len(split(text)), text
    assert len(tokenizer) < 512


def test_prompts_and_timestamps_are_compact_and_digits_stand_alone(tokenizer):
    def pieces(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n") == [
        *("<|im_start|>", "system\nYou are a helpful assistant.", "<|im_end|>", "\n")
    ]
    assert pieces("\n<2.5 seconds><|vision_start|>") == [
        *("\n<", "2", ".", "5", " seconds>", "<|vision_start|>")
    ]
    assert pieces("2.5 seconds") == ["2", ".", "5", " seconds"]
    assert pieces(" larger, 13 or") == [" larger", ",", " ", "1", "3", " or"]
    for text in ("Grüße, 漢字 🙂\n\n\t12.50 %", "assistant\n\nx", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_chat_layout(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    ids = tokenizer.convert_tokens_to_ids(list(make_tokenizer.SPECIAL_TOKENS))
    assert ids == list(range(len(ids)))
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Why?"}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        "Why?<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
    )
