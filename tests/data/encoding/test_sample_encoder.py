"""From a raw record to an encoded sample, or to a rejection with a reason; never an exception."""

import json
import pickle

import numpy as np
import pytest

from configs import quickstart
from ov2_jax.config.build import data_config_from, experiment_from
from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.sample_encoder import EncodedSample, SampleEncoder
from ov2_jax.data.rejected import REASONS, Rejected, SampleError
from ov2_jax.data.sources.records import RawRecord
from tests.data.files import chat, clip, picture
from tests.tiny import PAD, data_config, tiny_model, tokenizer

PACK = PackConfig(rows=2, seq_len=256, vision_rows=((4, 64), (2, 256)))


def encode(sample, root, pack=None, frames=4, **config):
    encoder = SampleEncoder(data_config(**config), tiny_model(frames=frames), tokenizer(), pack)
    data = sample if isinstance(sample, str) else json.dumps(sample)
    return encoder(RawRecord(data.encode(), "file.jsonl", 5, str(root), "source"))


def test_media_follow_the_order_of_the_text(tmp_path):
    picture(tmp_path / "a.png", 28, 56)
    picture(tmp_path / "b.png", 56, 56)
    clip(tmp_path / "c.mp4", 30, 10, height=56, width=84)
    sample = {
        "id": "x",
        "task": "mixed",
        "messages": chat("<video> then <image>?", "Yes.", "And <image>", "No."),
        "images": ["a.png", "b.png"],
        "videos": ["c.mp4"],
    }
    got = encode(sample, tmp_path, num_frames=6)
    assert isinstance(got, EncodedSample)
    assert got[:5] == ("x", "source", "file.jsonl", 5, "mixed")
    # Six frames of 4 x 6 patches make a window of four and one of two.
    assert got.windows.tolist() == [96, 48, 8, 16]
    assert len(got.patches) == len(got.patch_positions) == 168
    assert (got.tokens == PAD).sum() == 168 // 4
    assert got.patches.dtype == np.uint8 and got.patch_positions.dtype == np.int32
    t = got.patch_positions[:, 0]
    assert t[:144:24].tolist() == [0, 6, 12, 17, 23, 29] and not t[144:].any()
    text = tokenizer().decode([i for i in got.tokens.tolist() if i != PAD])
    frame = "<|vision_start|><|vision_end|>\n"
    times = ("0.0", "0.6", "1.2", "1.7", "2.3", "2.9")
    assert "".join(f"<{s} seconds>{frame}" for s in times) + " then <|vision_start|>" in text


@pytest.mark.parametrize(
    ("config", "sample", "expected"),
    [
        ({"frame_form": "hf"}, {}, "<0.0 seconds>V<2.9 seconds>V!"),
        ({}, {}, "<0.0 seconds>V\n<2.9 seconds>V\n!"),
        ({"timestamps": False}, {"fps": 10}, "V\nV\n!"),
        ({}, {"fps": 4}, "<0.0 seconds>V\n<7.2 seconds>V\n!"),
        ({"timestamp_decimal": 0}, {}, "<0 seconds>V\n<3 seconds>V\n!"),
        ({}, {"fps": 4, "timestamp_decimal": 3}, "<0.000 seconds>V\n<7.250 seconds>V\n!"),
    ],
)
def test_how_frames_are_written(tmp_path, config, sample, expected):
    clip(tmp_path / "c.mp4", 30, 10)
    sample = {"messages": chat("<video>!", "A"), "videos": ["c.mp4"], **sample}
    got = encode(sample, tmp_path, num_frames=2, **config)
    assert got.windows.tolist() == ([16, 16] if config.get("frame_form") == "hf" else [32])
    text = tokenizer().decode([i for i in got.tokens.tolist() if i != PAD])
    written = text.split("user\n")[1].split("<|im_end|>")[0]
    assert written.replace("<|vision_start|><|vision_end|>", "V") == expected


def test_frames_have_pixel_bounds_of_their_own(tmp_path):
    clip(tmp_path / "c.mp4", 4, 10, height=112, width=112)
    picture(tmp_path / "a.png", 112, 112)
    sample = {
        "messages": chat("<video><image>", "A"),
        "videos": ["c.mp4"],
        "images": ["a.png"],
    }
    got = encode(sample, tmp_path, frame_min_pixels=784, frame_max_pixels=56 * 56)
    assert got.windows.tolist() == [64, 64]  # four frames of 4 x 4, one picture of 8 x 8


def rejected_cases():
    """(sample, reason, a word of the detail)."""
    good = chat("Q", "A")
    image = chat("<image>Q", "A")
    return {
        "json": ("{", "bad_json", "Expecting"),
        "record": ({"messages": 1}, "bad_record", "messages"),
        "codec": ({"messages": good, "positions_thw": [1]}, "unsupported_field", "patch_positions"),
        "role": ({"messages": [{"role": "x", "content": ""}]}, "unknown_role", "'x'"),
        "turns": ({"messages": good[::-1]}, "bad_turns", "alternate"),
        "answer": ({"messages": chat("Q", "")}, "empty_answer", "no text"),
        "special": ({"messages": chat("<|im_start|>", "A")}, "special_token_in_text", "spelled"),
        "few marks": ({"messages": good, "image": "a.png"}, "placeholder_mismatch", "1 pictures"),
        "no picture": ({"messages": image}, "placeholder_mismatch", "0 pictures"),
        "no clip": ({"messages": chat("<video>", "A")}, "placeholder_mismatch", "0 clips"),
        "outside": ({"messages": image, "image": "../a.png"}, "path_outside_root", "leads out"),
        "missing": ({"messages": image, "image": "no.png"}, "missing_file", "no.png"),
        "image": ({"messages": image, "image": "bad.png"}, "bad_image", "Pillow"),
        "video": (
            {"messages": chat("<video>", "A"), "video": "bad.png"},
            "bad_video",
            "no clip in a container",
        ),
        "strip": ({"messages": image, "image": "strip.png"}, "bad_aspect", "200:1"),
    }


@pytest.mark.parametrize("case", rejected_cases())
def test_bad_samples_become_rejections(tmp_path, case):
    sample, reason, word = rejected_cases()[case]
    picture(tmp_path / "a.png", 28, 28)
    picture(tmp_path / "strip.png", 2, 402)
    (tmp_path / "bad.png").write_text("no picture")
    got = encode(sample, tmp_path, PACK)
    assert isinstance(got, Rejected)
    assert got.reason == reason and reason in REASONS
    assert word in got.detail
    assert (got.id, got.file, got.line) == ("source:5", "file.jsonl", 5)


def test_a_slow_clip_is_rejected_with_its_own_reason(tmp_path):
    clip(tmp_path / "c.mp4", 30, 10)
    sample = {"id": 3, "messages": chat("<video>", "A"), "video": "c.mp4"}
    got = encode(sample, tmp_path, decode_timeout_s=1e-4)
    assert got.reason == "video_timeout" and got.id == "3"


def test_an_unforeseen_error_rejects_the_sample_and_names_itself(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ov2_jax.data.encoding.chat.parse_chat", broken)
    got = encode({"messages": chat("Q", "A")}, tmp_path)
    assert got.reason == "internal_error" and "ZeroDivisionError: a bug" in got.detail


# --- samples that do not fit ----------------------------------------------------------------------


def test_too_long_names_the_remedy(tmp_path):
    got = encode({"messages": chat("Q " * 300, "A")}, tmp_path, PACK)
    assert got.reason == "too_long" and "raise pack.seq_len" in got.detail
    assert isinstance(encode({"messages": chat("Q " * 300, "A")}, tmp_path), EncodedSample)


def test_a_sample_of_exactly_the_row_length_fits(tmp_path):
    sample = {"messages": chat("Why?", "Because.")}
    n = len(encode(sample, tmp_path).tokens)
    exact, short = PackConfig(1, n, ()), PackConfig(1, n - 1, ())
    assert isinstance(encode(sample, tmp_path, exact), EncodedSample)
    assert encode(sample, tmp_path, short).reason == "too_long"


def test_a_window_larger_than_every_row(tmp_path):
    picture(tmp_path / "a.png", 280, 280)
    sample = {"messages": chat("<image>", "A"), "image": "a.png"}
    got = encode(sample, tmp_path, PACK, max_pixels=280 * 280)
    assert got.reason == "window_too_large"
    assert "400 patches but the largest vision row 256" in got.detail
    assert "pack.vision_rows" in got.detail
    got = encode(sample, tmp_path, PackConfig(1, 256))
    assert got.reason == "window_too_large" and "largest vision row 0" in got.detail


def test_more_windows_than_a_pack_holds(tmp_path):
    picture(tmp_path / "a.png", 112, 112)
    pack = PackConfig(1, 2048, ((3, 64),))
    sample = {"messages": chat("<image>" * 4, "A"), "image": ["a.png"] * 4}
    got = encode(sample, tmp_path, pack)
    assert got.reason == "too_many_patches" and "256 patches in 4 windows" in got.detail


def test_a_clip_that_cannot_fit_is_not_decoded(tmp_path, monkeypatch):
    clip(tmp_path / "c.mp4", 40, 10, height=112, width=112)
    sample = {"messages": chat("<video>", "A"), "video": "c.mp4"}
    monkeypatch.setattr(
        "ov2_jax.data.encoding.video._decode", None
    )  # calling it would be internal_error
    got = encode(sample, tmp_path, PACK, num_frames=30)
    assert got.reason == "too_long"


def test_drop_rounds_leaves_out_the_last_rounds_with_their_pictures(tmp_path):
    picture(tmp_path / "a.png", 28, 28, seed=1)
    picture(tmp_path / "b.png", 112, 112, seed=2)
    short = chat("<image>One?", "Yes.")
    long = [*short, *chat("Two <image>?", "No. " * 100, "Three?", "Maybe.")]
    sample = {"messages": long, "images": ["a.png", "b.png"]}
    assert encode(sample, tmp_path, PACK).reason == "too_long"
    got = encode(sample, tmp_path, PACK, on_long="drop_rounds")
    kept = encode({"messages": short, "images": ["a.png"]}, tmp_path, PACK)
    assert got.dropped_rounds == 2 and kept.dropped_rounds == 0
    for name in ("tokens", "loss_mask", "windows", "patches", "patch_positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(kept, name))
    # Also when it is a window that does not fit; the first round must fit.
    small = PackConfig(1, 4096, ((1, 16),))
    assert encode(sample, tmp_path, small, on_long="drop_rounds").dropped_rounds == 2
    first = {"messages": chat("Q " * 300, "A", "Q", "A")}
    assert encode(first, tmp_path, PACK, on_long="drop_rounds").reason == "too_long"


def test_prompts_may_be_pictures_in_memory(tmp_path):
    path = picture(tmp_path / "a.png", 50, 70)
    encoder = SampleEncoder(data_config(), tiny_model(), tokenizer())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    messages = [{"role": "user", "content": "<image>Q"}]
    for picture_ in (str(path), pixels):
        got = encoder.encode_prompt(messages, [picture_])
        assert got.windows.tolist() == [16]
    with pytest.raises(SampleError, match="uint8"):
        encoder.encode_prompt(messages, [pixels.astype(np.float32)])
    with pytest.raises(SampleError, match="bad_turns"):
        encoder.encode_prompt(chat("Q", "A"))
    with pytest.raises(SampleError, match="1 pictures"):
        encoder.encode_prompt([{"role": "user", "content": "Q"}], [pixels])


def test_the_encoder_can_be_sent_to_workers(tmp_path):
    encoder = pickle.loads(
        pickle.dumps(SampleEncoder(data_config(), tiny_model(), tokenizer(), PACK))
    )
    data = json.dumps({"messages": chat("Q", "A")}).encode()
    assert isinstance(encoder(RawRecord(data, "f", 1, "/", "s")), EncodedSample)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_pixels": 0}, "data.min_pixels is 0"),
        ({"min_pixels": 10, "max_pixels": 5}, "data.max_pixels is 5; it must be at least 10"),
        ({"frame_max_pixels": 100}, "data.frame_max_pixels is 100"),
        ({"num_frames": 8, "target_fps": 1.0}, "data.num_frames is 8"),
        ({"frame_form": "both"}, "'training' or 'hf'"),
        ({"timestamp_decimal": 9}, "data.timestamp_decimal is 9"),
        ({"on_long": "cut"}, "data.on_long is 'cut'"),
        ({"on_image_mismatch": "guess"}, "data.on_image_mismatch"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"lookahead": 0}, "data.lookahead is 0"),
        ({"max_reject_share": 1.5}, "data.max_reject_share is 1.5"),
        ({"decode_timeout_s": 0}, "data.decode_timeout_s is 0"),
    ],
)
def test_bad_data_configs(changes, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**({"sources": (SourceConfig("a.jsonl"),)} | changes))


def test_sections_of_other_forms_are_refused():
    with pytest.raises(ConfigError, match="data.sources.0. is 'a.jsonl'"):
        data_config_from({"sources": ["a.jsonl"]})
    config = quickstart.get_config()
    config.pack.vision_rows = ((2, 8, 1),)
    with pytest.raises(ConfigError, match="pack.vision_rows.0. is .2, 8, 1.; it must have 2"):
        experiment_from(config, needs_workdir=False)


def test_bad_source_and_pack_configs():
    with pytest.raises(ConfigError, match="source.path is .a.csv"):
        SourceConfig("a.csv")
    for arguments, words in (
        ((0, 10), "pack.rows is 0"),
        ((1, 0), "pack.seq_len is 0"),
        ((1, 10, ((2, -8),)), "pairs of"),
        ((1, 10, ((2, 16), (2, 8))), "sorted by"),
        ((1, 10, ((2, 8), (1, 8))), "each length once"),
        ((1, 10, (), 0), "pack.max_samples_per_row is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            PackConfig(*arguments)
    with pytest.raises(ConfigError, match="multiple of 4"):
        PackConfig(1, 10, ((2, 10),)).check(tiny_model())
