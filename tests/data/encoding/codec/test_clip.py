"""Clips read codec-style: real files written and decoded by FFmpeg."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec.context import Flags2
from PIL import Image

from benchmarks import codec_signal
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.codec import (
    CodecConfig,
    FileScores,
    TooFewFrames,
    read_codec_clip,
    read_pictures,
    read_positions,
    select_patches,
    time_runs,
)
from ov2_jax.data.encoding.codec.clip import block_order
from ov2_jax.data.encoding.codec.energy import EnergyMeter
from ov2_jax.data.encoding.images import patch_positions, patchify
from ov2_jax.data.rejected import SampleError
from tests.programs import REPOSITORY

CONFIG = CodecConfig(num_sampled_frames=48, group_size=16, max_pixels=30_000, max_group_frames=24)
H, W, FRAMES = 144, 192, 60
OPTIONS = {
    "libx264": {"g": "30", "crf": "24", "threads": "1"},
    "mpeg4": {"g": "30", "b": "400000"},
    "libx265": {"x265-params": "log-level=none:keyint=30:crf=26:pools=1:frame-threads=1"},
    "libvpx-vp9": {"g": "30", "crf": "34", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"g": "30", "crf": "40", "preset": "12", "svtav1-params": "lp=1"},
}
VECTORS = ("libx264", "mpeg4")


def scene(i: int) -> np.ndarray:
    """A textured still picture, and on it a textured square that moves and changes."""
    rng = np.random.default_rng(0)
    still = np.kron(rng.integers(60, 180, (H // 4, W // 4, 3)), np.ones((4, 4, 1)))
    top, left = square(i)
    noise = np.random.default_rng(i // 2).integers(0, 256, (16, 16, 3))
    still[top : top + 32, left : left + 32] = np.kron(noise, np.ones((2, 2, 1)))
    return still.astype(np.uint8)


def square(i: int) -> tuple[int, int]:
    return 8 + i, 16 + 2 * i


def write(path, frames=FRAMES, codec="libx264", picture=scene, rate=25, size=(H, W)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=OPTIONS[codec])
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    suffix = {"libvpx-vp9": "webm", "mpeg4": "avi"}
    written = {c: write(folder / f"{c}.{suffix.get(c, 'mp4')}", codec=c) for c in OPTIONS}
    # SVT-AV1, run as root, makes its caller a real-time thread, whose children are such too: later
    # tests would starve all else on the machine, and jobs of theirs that wait for each other hang.
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return written


def read(path, config=CONFIG, **more):
    return read_codec_clip(str(path), config, timeout_s=30, **more)


@pytest.mark.parametrize("codec", OPTIONS)
def test_the_moving_square_is_chosen(clips, codec):
    """Blocks beside the anchors are where the square is or was: it is 7 % of the picture."""
    clip = read(clips[codec])
    canvas = clip.selection.canvas_hw
    positions = block_order(clip.selection, CONFIG)
    size = canvas[0] * canvas[1] // CONFIG.patch**2
    beside = np.concatenate([g[size:] for g in np.split(positions, len(clip.selection.groups))])
    hit = 0
    for t, row, column in beside:
        # The square's place in this frame and the one before, in canvas pixels, a cell around it.
        top, left = square(t)
        y, x = (row + 0.5) * 14 * H / canvas[0], (column + 0.5) * 14 * W / canvas[1]
        hit += top - 30 <= y <= top + 62 and left - 30 <= x <= left + 62
    share = hit / len(beside)
    around = 92 * 92 / (H * W)
    assert share > (0.75 if codec in VECTORS else 0.6) > around


@pytest.mark.parametrize("codec", OPTIONS)
def test_patches_are_the_frames_pixels(clips, codec):
    """Every patch against its place in its frame, shrunk alike."""
    clip = read(clips[codec])
    h, w = clip.selection.canvas_hw
    assert clip.fps == pytest.approx(25)
    assert len(clip.patches) == len(clip.positions) == clip.windows.sum()
    assert clip.patches.dtype == np.uint8 and clip.positions.dtype == np.int32
    with av.open(clips[codec]) as container:
        frames = [
            f.reformat(width=w, height=h, format="yuv420p", interpolation="AREA")
            for f in container.decode(video=0)
        ]
    assert len(frames) == FRAMES
    index = {tuple(p[1:]): i for i, p in enumerate(patch_positions(0, h // 14, w // 14, 2))}
    for t in np.unique(clip.positions[:, 0]):
        whole = patchify(frames[t].to_ndarray(format="rgb24"), 14, 2)
        mine = clip.positions[:, 0] == t
        rows = [index[tuple(p[1:])] for p in clip.positions[mine]]
        np.testing.assert_array_equal(clip.patches[mine], whole[rows])


def test_given_bit_costs_give_the_released_selection(clips, tmp_path):
    bits = np.random.default_rng(1).integers(0, 300, (FRAMES, 9, 13))
    np.savez(tmp_path / "bits.npz", bit_cost=bits)
    clip = read(clips["libx264"], scores=FileScores(str(tmp_path / "bits.npz")))
    expected = select_patches(
        bits, [0, 30], num_frames=FRAMES, fps=25, orig_hw=(H, W), config=CONFIG
    )
    np.testing.assert_array_equal(clip.selection.frame_ids, expected.frame_ids)
    np.testing.assert_array_equal(clip.positions, block_order(expected, CONFIG))
    with pytest.raises(SampleError, match="bad_video.*48 frames"):
        np.savez(tmp_path / "short.npz", bit_cost=bits[:48])
        read(clips["libx264"], scores=FileScores(str(tmp_path / "short.npz")))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"cost": np.zeros((2, 2, 2))}, "no array bit_cost but cost"),
        ({"bit_cost": np.zeros((2, 2))}, r"shape \(2, 2\)"),
    ],
)
def test_other_npz_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bits.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        FileScores(str(tmp_path / "bits.npz"))


def test_bad_frames_of_a_clip_are_left_out(tmp_path):
    black = np.zeros((H, W, 3), np.uint8)
    green = black + np.array([0, 230, 0], np.uint8)
    path = write(tmp_path / "c.mp4", picture=lambda i: {20: black, 21: green}.get(i, scene(i)))
    config = CodecConfig(num_sampled_frames=60, max_pixels=30_000, avoid_keyframes=False)
    seen = set(read(path, config).positions[:, 0].tolist())
    assert 20 not in seen and 21 not in seen
    assert len(seen) > 10


def test_frames_are_numbered_in_the_order_of_display(clips):
    """B frames come out of order from the container; key frame 30 is avoided by number."""
    with av.open(clips["libx264"]) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert 3 in kinds and kinds[0] == kinds[30] == 1
    ids = read(clips["libx264"], CodecConfig(num_sampled_frames=58)).selection.frame_ids
    assert 0 not in ids and 30 not in ids and len(ids) == 58


def test_energy_is_small_where_motion_explains_the_change(tmp_path):
    """A panning picture: vectors explain it, the difference to the last frame does not."""
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(0, 256, (H // 8, 2 * W // 8)), np.ones((8, 8)))
    wide = np.repeat(wide[..., None], 3, 2).astype(np.uint8)
    path = write(tmp_path / "pan.mp4", 24, picture=lambda i: wide[:, 4 * i : 4 * i + W].copy())
    with av.open(path) as container:
        container.streams.video[0].codec_context.flags2 |= Flags2.export_mvs
        meter, difference, before = EnergyMeter(), 0.0, None
        for number, frame in enumerate(container.decode(video=0)):
            meter.add(number, frame, True)
            luma = frame.to_ndarray(format="gray").astype(int)[::4, ::4]
            if before is not None:
                difference += np.abs(luma - before)[:, :-8].sum()
            before = luma
        meter.finish()
    assert meter.has_vectors and sorted(meter.energies) == list(range(24))
    explained = sum(meter.energies[i][:, :-1].sum() for i in range(1, 24))
    assert explained < 0.5 * difference


def test_runs_of_equal_time_cross_canvases():
    t = [5, 5, 5, 7, 7, 5, 9]
    positions = np.repeat([[i, 0, 0] for i in t], 4, 0)
    frames, tokens = time_runs(positions, 2)
    assert frames.tolist() == [5, 7, 5, 9] and tokens.tolist() == [3, 2, 1, 1]


# --- ready-made canvases --------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path):
    """Two groups of 4 canvases of 2x3 blocks; the last canvas is padding."""
    rng = np.random.default_rng(0)
    pictures, positions = [], []
    for i in range(8):
        picture = rng.integers(0, 256, (56, 84, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"canvas_{i}.png")
        pictures.append(picture)
        rows, columns = np.meshgrid(np.arange(4), np.arange(6), indexing="ij")
        where = np.stack([np.full((4, 6), 3 * i), rows, columns], -1)
        positions.append(np.where(i == 7, -1, where).reshape(-1, 3))
    np.save(tmp_path / "src_patch_position.npy", np.concatenate(positions).astype(np.int32))
    names = [str(tmp_path / f"canvas_{i}.png") for i in range(8)]
    return names, str(tmp_path / "src_patch_position.npy"), pictures


def read_assets(names, positions, together=4):
    found = read_positions(positions, len(names), patch=14, merge=2, together=together)
    return found, read_pictures(names, found, patch=14, merge=2)


def test_assets_are_read_in_block_order_without_padding(assets):
    names, where, pictures = assets
    found, patches = read_assets(names, [where])
    assert found.windows.tolist() == [4 * 24, 3 * 24] and found.hw == (56, 84)
    np.testing.assert_array_equal(patches[24:48], patchify(pictures[1], 14, 2))
    np.testing.assert_array_equal(found.positions[24:48], patch_positions(3, 4, 6, 2))
    assert time_runs(found.positions, 2)[0].tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert read_assets(names, [where], together=3)[0].windows.tolist() == [72, 72, 24]


def test_frames_have_positions_each_and_are_resized(assets, tmp_path):
    names, where, pictures = assets
    paths = []
    for i, part in enumerate(np.split(np.load(where), 8)[:7]):
        np.save(tmp_path / f"{i}.npy", part)
        paths.append(str(tmp_path / f"{i}.npy"))
    found, patches = read_assets(names[:7], paths)
    Image.fromarray(pictures[2]).resize((168, 112)).save(names[2])
    larger = read_assets(names[:7], paths)[1]
    assert larger.shape == patches.shape
    changed = (larger != patches).any(1).reshape(7, 24).any(1)
    assert changed.tolist() == [i == 2 for i in range(7)]


def test_damaged_assets_are_rejected(assets, tmp_path):
    names, where, _ = assets
    good = np.load(where)
    index = np.arange(len(good))[:, None]
    mixed = np.where((index == 2) & (np.arange(3) == 0), 6, good)
    cases = {
        "positions for 7 pictures": (names[:7], good),
        "positions for 8 pictures": (names, good[:-1]),
        "whole numbers": (names, good.astype(float)),
        "shape": (names, good[:, :2]),
        "whole blocks": (names, np.where(np.arange(3) == 1, good // 4, good)),
        "several frames": (names, mixed),
        "padding in part": (names, np.where(index < 2, -1, good)),
        "first picture is padding": (names, np.where(index < 24, -1, good)),
    }
    for message, (canvases, positions) in cases.items():
        np.save(tmp_path / "p.npy", positions)
        with pytest.raises(SampleError, match=f"bad_record.*{message}"):
            read_assets(canvases, [str(tmp_path / "p.npy")])
    (tmp_path / "p.npy").write_bytes(b"nothing")
    with pytest.raises(SampleError, match="bad_record.*no .npy file"):
        read_assets(names, [str(tmp_path / "p.npy")])
    with pytest.raises(SampleError, match="missing_file"):
        read_assets(names, [str(tmp_path / "other.npy")])
    with pytest.raises(SampleError, match="missing_file"):
        read_assets(["nowhere.png", *names[1:]], [where])
    canvas = np.where((index >= 24 + 12) & (index < 48) & (np.arange(3) == 0), 4, good)
    np.save(tmp_path / "p.npy", canvas)  # a canvas of two frames' blocks
    read_assets(names, [str(tmp_path / "p.npy")])
    Image.new("RGB", (168, 112)).save(names[0])
    with pytest.raises(SampleError, match="bad_record.*168x112"):
        read_assets(names, [str(tmp_path / "p.npy")])


# --- bad clips ------------------------------------------------------------------------------------


def test_bad_clips_are_rejected(clips, tmp_path):
    with pytest.raises(SampleError, match="missing_file"):
        read(tmp_path / "nowhere.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no clip")
    data = Path(clips["libx265"]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    for name in ("empty", "text", "cut"):
        with pytest.raises(SampleError, match="bad_video"):
            read(tmp_path / f"{name}.mp4")


def test_damaged_packets_never_crash(clips, tmp_path):
    """Flipped bytes: an answer or a SampleError, nothing else."""
    whole = np.fromfile(clips["libx264"], np.uint8)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        data = whole.copy()
        at = rng.integers(len(data) // 10, len(data) * 9 // 10, 40)
        data[at] ^= rng.integers(1, 256, 40).astype(np.uint8)
        data.tofile(tmp_path / "damaged.mp4")
        try:
            clip = read(tmp_path / "damaged.mp4")
        except SampleError as error:
            assert error.reason == "bad_video"
        else:
            assert len(clip.patches) == len(clip.positions)


def test_short_clips_want_uniform_frames(tmp_path):
    with pytest.raises(TooFewFrames):
        read(write(tmp_path / "c.mp4", frames=7))
    assert len(read(write(tmp_path / "d.mp4", frames=9)).windows) == 1


def test_canvases_of_odd_blocks_are_refused(clips):
    with pytest.raises(ConfigError, match="codec.patch . codec.block_size is 15"):
        read(clips["libx264"], CodecConfig(patch=15, block_size=1))


def test_time_limit(clips):
    with pytest.raises(SampleError, match="video_timeout"):
        read_codec_clip(clips["libx264"], CONFIG, timeout_s=1e-4)


def test_benchmark_measures(clips, tmp_path):
    """The benchmark's program, with the stream's scores as the true ones: overlap is then 1."""
    stream = codec_signal.KeptScores()
    config = CodecConfig(num_sampled_frames=60, max_pixels=30_000)
    read(clips["libx264"], config, scores=stream)
    kept = np.stack([stream.kept[i] for i in range(FRAMES)])
    np.savez(tmp_path / "bits.npz", bit_cost=kept)
    program = [sys.executable, "benchmarks/codec_signal.py", clips["libx264"]]
    arguments = ["--frames=60", "--max-pixels=30000", "--rounds=1"]
    command = [*program, f"--bit-cost={tmp_path / 'bits.npz'}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["clip"] == "libx264.mp4"
    assert result["overlap"] == result["selected_overlap"] == 1
    assert result["spearman"] == pytest.approx(1)
    assert result["frames"] == result["sampled"] == FRAMES and result["ratio"] > 0


def test_a_clip_reads_alike_every_time(clips):
    """Frame threads would export vectors of frames that another thread still decodes."""
    first = read(clips["libx264"])
    for _ in range(20):
        again = read(clips["libx264"])
        np.testing.assert_array_equal(again.positions, first.positions)
        np.testing.assert_array_equal(again.patches, first.patches)
