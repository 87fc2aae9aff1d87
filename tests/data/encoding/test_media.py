"""Codec-style clips, ready-made canvases and exact lengths, from the record to the pack."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ov2_jax.config.data import SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.codec import (
    CodecConfig,
    FileScores,
    read_codec_clip,
    select_patches,
    time_runs,
)
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.data.packing.build import build_pack
from ov2_jax.data.packing.placement import place_pack
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample, SampleSize
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.media import Section
from ov2_jax.data.sources.parsing import parse_record
from tests.data.encoding.codec.test_clip import write
from tests.data.files import chat, clip, picture, write_jsonl
from tests.tiny import PAD, data_config, tiny_model, tokenizer

CODEC = CodecConfig(num_sampled_frames=48, group_size=16, max_pixels=30_000, max_group_frames=24)
PACK = PackConfig(rows=2, seq_len=2048, vision_rows=((4, 640), (2, 2560)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    write(folder / "long.mp4")
    clip(folder / "short.mp4", 6, 10, height=56, width=84)
    clip(folder / "even.mp4", 30, 10, height=56, width=84)
    picture(folder / "a.png", 90, 61)
    rng = np.random.default_rng(0)
    positions = []
    for i in range(4):
        pixels = rng.integers(0, 256, (56, 84, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"canvas_{i}.png")
        rows, columns = np.meshgrid(np.arange(4), np.arange(6), indexing="ij")
        t = np.full((4, 6), 0)
        if i:  # three pieces of time in a canvas, cut between blocks
            t = np.repeat(3 * i + np.arange(3), 2)[None].repeat(4, 0)
        positions.append(np.stack([t, rows, columns], -1).reshape(-1, 3))
    np.save(folder / "positions.npy", np.concatenate(positions))
    np.savez(folder / "bits.npz", bit_cost=rng.integers(0, 300, (60, 9, 13)))
    return folder


SAMPLES = {
    "codec": {"messages": chat("<video>\nWhat?", "A square."), "video": "long.mp4"},
    "bits": {
        "messages": chat("<video>\nWhat?", "A square."),
        "video": "long.mp4",
        "bit_cost": "bits.npz",
    },
    "short": {"messages": chat("Here: <video>\nWhat?", "Grey."), "video": "short.mp4"},
    "mixed": {
        "messages": chat("<image> and <video>?", "One.", "<video>!", "Two."),
        "images": ["a.png"],
        "videos": ["long.mp4", "even.mp4"],
        "fps": [25, 10],
    },
    "canvases": {
        "messages": chat("<image>\n<image>\n<image>\n<image>\nWhat?", "Noise."),
        "images": [f"canvas_{i}.png" for i in range(4)],
        "patch_positions": ["positions.npy"],
        "fps": 2,
    },
    "timeless": {
        "messages": chat("<image>\n<image>\n<image>\n<image>\nWhat?", "Noise."),
        "images": [f"canvas_{i}.png" for i in range(4)],
        "patch_positions": ["positions.npy"],
    },
    "text": {"messages": chat("Hello", "There")},
}


def source(root, names, video="codec"):
    path = write_jsonl(root / f"{'_'.join(names)}.jsonl", [SAMPLES[n] | {"id": n} for n in names])
    return SourceConfig(str(path), name="clips", video=video)


def encode(root, name, video="codec", pack=None, measure=False, **config):
    sources = (source(root, [name], video),)
    data = data_config(sources=sources, codec=CODEC, **config)
    encoder = SampleEncoder(data, tiny_model(), tokenizer(), pack)
    return (encoder.measure if measure else encoder)(RecordSource(sources)[0])


def text_of(sample):
    tokens = sample.tokens[sample.tokens != PAD].tolist()
    return tokenizer().decode(tokens).replace("<|vision_start|><|vision_end|>", "V")


def test_a_clip_is_what_the_codec_reader_keeps(root):
    got = encode(root, "codec")
    assert isinstance(got, EncodedSample), got
    want = read_codec_clip(str(root / "long.mp4"), CODEC, timeout_s=60)
    np.testing.assert_array_equal(got.patches, want.patches)
    np.testing.assert_array_equal(got.patch_positions, want.positions)
    assert got.windows.tolist() == want.windows.tolist() and len(want.windows) > 1
    frames, counts = time_runs(want.positions, 2)
    assert len(set(frames.tolist())) > 8 and counts.min() < counts.max()
    # A timestamp and a run of placeholders for every run of equal t, and nothing else.
    times = "".join(f"<{t / 25:.1f} seconds>V\n" for t in frames)
    assert times + "What?" in text_of(got)
    starts = np.flatnonzero((got.tokens[1:] == PAD) & (got.tokens[:-1] != PAD)) + 1
    ends = np.flatnonzero((got.tokens[:-1] == PAD) & (got.tokens[1:] != PAD)) + 1
    assert (ends - starts).tolist() == counts.tolist()
    assert got.uniform_fallbacks == 0


def test_bit_costs_that_come_with_the_sample_choose(root):
    assert not np.array_equal(
        encode(root, "bits").patch_positions, encode(root, "codec").patch_positions
    )


def test_short_clips_are_read_as_uniform_frames_and_counted(root):
    got, plain = encode(root, "short"), encode(root, "short", "uniform")
    assert got.uniform_fallbacks == 1 and plain.uniform_fallbacks == 0
    for name in ("tokens", "windows", "patches", "patch_positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(plain, name))


def test_canvases_stand_for_their_marks(root):
    got, timeless = encode(root, "canvases"), encode(root, "timeless")
    assert got.windows.tolist() == timeless.windows.tolist() == [4 * 24]
    frames, counts = time_runs(got.patch_positions, 2)
    assert len(frames) == 1 + 3 * 2 * 3  # the anchor, then two block rows of three pieces each
    times = "".join(f"<{t / 2:.1f} seconds>V\n" for t in frames)
    assert "user\n" + times + "What?" in text_of(got)
    assert "user\nV\nV\nV\nV\nWhat?" in text_of(timeless)
    assert (got.tokens == PAD).sum() == (timeless.tokens == PAD).sum() == 24
    first = np.asarray(Image.open(root / "canvas_0.png"))
    block = got.patches[:4].reshape(2, 2, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(28, 28, 3)
    np.testing.assert_array_equal(block, first[:28, :28])


def brightness(got):
    """Of the frames of clip(): frame i is a grey of 4i + 20."""
    t = got.patch_positions[:, 0]
    return {int(n): round((got.patches[t == n].mean() - 20) / 4) for n in np.unique(t)}


def test_a_section_is_read_as_a_clip_of_its_own(root, tmp_path):
    sample = {"messages": chat("<video>?", "A"), "video": "even.mp4", "start": 0.95, "end": 2.0}
    path = write_jsonl(tmp_path / "a.jsonl", [sample, sample | {"end": None}])
    sources = (SourceConfig(str(path), str(root)),)
    data = data_config(sources=sources, num_frames=4)
    encoder = SampleEncoder(data, tiny_model(), tokenizer())
    got, rest = (encoder(RecordSource(sources)[i]) for i in range(2))
    # Frames 10 to 20 of 30 at 10 a second; t and seconds count from the section's start.
    assert brightness(got) == {0: 10, 3: 13, 7: 17, 10: 20}
    assert "<0.0 seconds>V\n<0.3 seconds>V\n<0.7 seconds>V\n<1.0 seconds>V\n?" in text_of(got)
    assert brightness(rest) == {0: 10, 6: 16, 13: 23, 19: 29}
    for i, sample in enumerate((got, rest)):
        assert encoder.measure(RecordSource(sources)[i]).tokens == len(sample.tokens)


def test_a_section_is_read_codec_style(root, tmp_path):
    bits = np.random.default_rng(0).integers(0, 300, (60, 9, 13))
    np.savez(tmp_path / "bits.npz", bit_cost=bits)
    whole = read_codec_clip(
        str(root / "long.mp4"),
        CODEC,
        timeout_s=60,
        scores=FileScores(str(tmp_path / "bits.npz")),
        section=Section(0.8, 2.0),
    )
    want = select_patches(
        bits[20:51],
        [10],  # frame 30 of the file
        num_frames=31,
        fps=25,
        orig_hw=(144, 192),
        config=CODEC,
    )
    assert whole.selection.frame_ids.tolist() == want.frame_ids.tolist()
    np.testing.assert_array_equal(whole.selection.positions, want.positions)
    own = read_codec_clip(
        str(root / "long.mp4"), CODEC, timeout_s=60, section=Section(0.8, 2.0)
    ).positions[:, 0]
    assert own.min() == 0 and 20 < own.max() <= 30


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": chat("<image> x <image>\n<image>\n<image>?", "A")}, "placeholder_mismatch"),
        ({"messages": chat("<image>\n<image>\n<image>?", "A")}, "placeholder_mismatch"),
        ({"patch_positions": ["positions.npy"] * 2}, "bad_record"),
        ({"patch_positions": ["nowhere.npy"]}, "missing_file"),
        ({"images": ["canvas_0.png"] * 3 + ["nowhere.png"]}, "missing_file"),
        ({"videos": ["long.mp4"]}, "bad_record"),
        ({"images": []}, "bad_record"),
        ({"fps": [1, 2]}, "bad_record"),
    ],
)
def test_bad_canvases_are_rejected(root, tmp_path, change, reason):
    path = write_jsonl(tmp_path / "a.jsonl", [SAMPLES["canvases"] | change])
    sources = (SourceConfig(str(path), str(root)),)
    got = SampleEncoder(data_config(sources=sources), tiny_model(), tokenizer())(
        RecordSource(sources)[0]
    )
    assert isinstance(got, Rejected) and got.reason == reason, got


@pytest.mark.parametrize("video", ["codec", "uniform"])
@pytest.mark.parametrize("name", SAMPLES)
def test_lengths_are_known_without_pixels(root, name, video):
    """`measure` gives exactly the length of the encoded sample, rejections included."""
    for pack in (None, PACK, PackConfig(2, 320, ((4, 640), (2, 2560))), PackConfig(2, 2048)):
        for on_long in ("reject", "drop_rounds"):
            if video == "codec" and pack and not pack.vision_rows:
                continue  # refused as a whole, see below
            options = {"video": video, "pack": pack, "on_long": on_long, "num_frames": 6}
            sample = encode(root, name, **options)
            length = encode(root, name, measure=True, **options)
            if isinstance(sample, Rejected):
                assert length == sample
                continue
            assert length.tokens == len(sample.tokens)
            assert list(length.windows) == sample.windows.tolist()
            assert length[:4] == sample[:4] and length.dropped_rounds == sample.dropped_rounds
            assert length.uniform_fallbacks == sample.uniform_fallbacks


def test_a_clip_that_cannot_fit_is_refused_before_it_is_decoded(root, tmp_path):
    data = (root / "long.mp4").read_bytes()
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    (tmp_path / "c.mp4").write_bytes(data[:start] + bytes(size) + data[start + size :])
    path = write_jsonl(tmp_path / "a.jsonl", [SAMPLES["codec"] | {"video": "c.mp4"}])
    sources = (SourceConfig(str(path), video="codec"),)
    reasons = []
    for seq_len in (64, 4096):
        pack = PackConfig(1, seq_len, ((4, 640), (2, 2560)))
        encoder = SampleEncoder(
            data_config(sources=sources, codec=CODEC), tiny_model(), tokenizer(), pack
        )
        reasons.append(encoder(RecordSource(sources)[0]).reason)
    assert reasons == ["too_long", "bad_video"]


def test_the_coin_is_fair_seeded_and_remembered(root, tmp_path):
    path = write_jsonl(tmp_path / "many.jsonl", [SAMPLES["codec"]] * 200)
    records = RecordSource([SourceConfig(str(path), str(root), video="alternate")])

    def throw(seed, moved=False):
        encoder = SampleEncoder(data_config(), tiny_model(), tokenizer(), seed=seed)
        parsed = [parse_record(records[i]) for i in range(200)]
        if moved:
            parsed = [r._replace(file="/elsewhere/many.jsonl") for r in parsed]
        return [encoder.video_input(r) for r in parsed]

    first = throw(0)
    assert 70 < Counter(first)["codec"] < 130 and set(first) == {"codec", "uniform"}
    assert throw(0) == first == throw(0, moved=True) and throw(1) != first


@pytest.mark.parametrize(
    ("changes", "pack", "message"),
    [
        ({"patch": 16}, None, "data.codec.patch is 16 but the model's is 14"),
        ({"block_size": 3}, None, "data.codec.block_size is 3 but the model's is 2"),
        ({"max_pixels": 150_000}, PACK, "3060 patches, but the largest vision row has 2560"),
    ],
)
def test_configs_that_cannot_work_are_refused(root, changes, pack, message):
    def make(video):
        codec = CodecConfig(**changes)
        data = data_config(sources=(source(root, ["codec"], video),), codec=codec)
        return SampleEncoder(data, tiny_model(), tokenizer(), pack)

    if pack:
        make("uniform")  # what is not used need not fit
    with pytest.raises(ConfigError, match=message):
        make("codec")


def test_unknown_video_input_is_refused():
    with pytest.raises(ConfigError, match="source.video is 'sparse'"):
        SourceConfig("a.jsonl", video="sparse")


def test_prompts_are_what_training_saw(root):
    sample = encode(root, "codec")
    encoder = SampleEncoder(data_config(codec=CODEC), tiny_model(), tokenizer())
    prompt = encoder.encode_prompt(
        SAMPLES["codec"]["messages"][:1], [], [str(root / "long.mp4")], video_input="codec"
    )
    n = len(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens, sample.tokens[:n])
    assert not sample.loss_mask[:n].any() and sample.loss_mask[n]
    np.testing.assert_array_equal(prompt.patches, sample.patches)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_packs_all_kinds_together(root, tmp_path, workers):
    """Pictures, uniform frames and codec groups share rows; every kind of clip gets there."""
    names = ["codec", "short", "mixed", "canvases", "text"]
    sources = (source(root, names, "alternate"),)
    data = data_config(
        sources=sources, codec=CODEC, num_frames=6, num_workers=workers, lookahead=5, shuffle=False
    )
    loader = make_loader(
        data,
        PACK,
        tiny_model(),
        tokenizer(),
        packs_per_step=1,
        seed=3,
        rejects_path=tmp_path / "rejected.jsonl",
    )
    try:
        batch, info = next(loader)
    finally:
        loader.close()
    assert info.rejected == 0 and len(info.sample_ids[0]) == info.samples >= 3
    encoder = SampleEncoder(data, tiny_model(), tokenizer(), PACK, seed=3)
    records = RecordSource(sources)
    samples = [encoder(records[i]) for i in range(5)]
    sizes = [SampleSize(len(s.tokens), tuple(s.windows.tolist())) for s in samples]
    want, _ = build_pack(samples, place_pack(sizes, PACK), PACK, tiny_model())
    np.testing.assert_array_equal(batch.tokens[0], want.tokens)
    np.testing.assert_array_equal(batch.vision_index[0], want.vision_index)
    for got, expected in zip(batch.vision, want.vision, strict=True):
        np.testing.assert_array_equal(got.patches[0], expected.patches)
        np.testing.assert_array_equal(got.patch_positions[0], expected.patch_positions)
