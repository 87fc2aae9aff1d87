"""Clips: which frames, their numbers and times, and what is refused."""

import os
import threading

import av
import numpy as np
import pytest

from ov2_jax.data.encoding.video import FrameSampling, read_clip, select_frames
from ov2_jax.data.rejected import SampleError
from tests.data.files import clip

DEFAULT = FrameSampling(None, None, 384)


def read(path, sampling=DEFAULT, *, timeout_s=20.0, fps=None, target_size=lambda n, h, w: (h, w)):
    return read_clip(str(path), sampling, timeout_s=timeout_s, fps=fps, target_size=target_size)


def numbers_seen(frames) -> list[int]:
    """The frame numbers that tests.data_cases.clip painted."""
    return [round((float(f.mean()) - 20) / 4) for f in frames]


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        (5, 8, [0, 1, 2, 3, 4]),
        (8, 8, list(range(8))),
        (100, 1, [0]),
        (2, 1, [0]),
        # Exact halves go to the even neighbour: 4.5 to 4.
        (10, 3, [0, 4, 9]),
        (6, 3, [0, 2, 5]),
        (8, 3, [0, 4, 7]),
        (487, 8, [0, 69, 139, 208, 278, 347, 417, 486]),
        (300, 8, [0, 43, 85, 128, 171, 214, 256, 299]),
    ],
)
def test_frame_choice(available, wanted, expected):
    """Expected values from torch.linspace(0, available - 1, wanted).round()."""
    assert select_frames(available, wanted) == expected


@pytest.mark.parametrize(
    ("available", "wanted", "index", "expected"),
    [
        (149875, 768, 314, 61356),
        (143796, 768, 504, 94488),
        (122186, 768, 243, 38710),
        (179236, 90, 85, 171180),
    ],
)
def test_frame_choice_of_long_clips_follows_torch_float32(available, wanted, index, expected):
    """Values from torch; float64 arithmetic gives a neighbour."""
    assert select_frames(available, wanted)[index] == expected
    exact = np.rint(np.linspace(0, available - 1, wanted)).astype(int)
    assert abs(exact[index] - expected) == 1


def test_counts_by_duration_number_or_rate():
    assert [DEFAULT.count(s) for s in (0.1, 9.99, 10, 29.9, 30, 4000)] == [8, 8, 16, 16, 384, 384]
    assert FrameSampling(5, None, 384).count(100) == 5
    fps = FrameSampling(None, 2.0, 30)
    assert [fps.count(s) for s in (0.2, 3.7, 14.9, 1000)] == [1, 7, 29, 30]


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.mp4"), ("libvpx-vp9", "a.webm")])
def test_frames_numbers_and_seconds(tmp_path, codec, name):
    """WebM states no number of frames: its packets are counted."""
    path = str(clip(tmp_path / name, 30, 10, codec))
    got = read(path, FrameSampling(4, None, 384))
    assert got.frame_numbers == (0, 10, 19, 29)
    assert numbers_seen(got.frames) == [0, 10, 19, 29]
    assert got.seconds == pytest.approx((0, 1.0, 1.9, 2.9))
    assert got.frames[0].shape == (48, 64, 3)
    small = read(path, FrameSampling(1, None, 384), target_size=lambda n, h, w: (28, 56))
    assert small.frames[0].shape == (28, 56, 3) and small.frames[0].dtype == np.uint8


def test_a_stated_rate_replaces_the_containers(tmp_path):
    path = str(clip(tmp_path / "a.mp4", 30, 10))
    got = read(path, FrameSampling(None, 1.0, 384), fps=2.0)
    assert len(got.frames) == 15  # 30 frames at 2 a second are 15 s
    assert got.seconds[-1] == 14.5


def test_a_short_clip_gives_all_frames(tmp_path):
    got = read(str(clip(tmp_path / "a.mp4", 3, 5)))
    assert got.frame_numbers == (0, 1, 2) and numbers_seen(got.frames) == [0, 1, 2]


def test_bad_clips_say_why(tmp_path):
    (tmp_path / "text.mp4").write_text("no clip")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = clip(tmp_path / "whole.mp4", 40, 10).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index was at the end
    for name, reason in (
        ("none.mp4", "missing_file"),
        (".", "missing_file"),
        ("text.mp4", "bad_video"),
        ("empty.mp4", "bad_video"),
        ("cut.mp4", "bad_video"),
    ):
        with pytest.raises(SampleError) as error:
            read(str(tmp_path / name))
        assert error.value.reason == reason, name


def cut_clip(path, share: float) -> str:
    """60 frames with a complete index, but only a share of the file's bytes."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 1
        rng = np.random.default_rng(0)
        for _ in range(60):
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return str(path)


def test_a_clip_that_lacks_a_few_frames_is_sampled_from_what_is_there(tmp_path):
    path = cut_clip(tmp_path / "a.mp4", 0.97)
    got = read(path, FrameSampling(3, None, 384))
    assert len(got.frames) == 3
    assert got.frame_numbers[0] == 0 and 56 <= got.frame_numbers[-1] <= 58


def test_a_clip_that_ends_early_is_refused(tmp_path):
    path = cut_clip(tmp_path / "a.mp4", 0.9)
    with pytest.raises(SampleError, match="only 5. of 60 frames"):
        read(path, FrameSampling(3, None, 384))


def test_the_time_limit_holds_in_a_thread(tmp_path):
    path = str(clip(tmp_path / "a.mp4", 50, 10))
    caught = []

    def work():
        try:
            read(path, timeout_s=1e-4)
        except SampleError as error:
            caught.append(error.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert caught == ["video_timeout"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(SampleError, match="missing_file"):
        read(str(tmp_path / "pipe.mp4"))


def test_a_clip_can_be_refused_before_it_is_decoded(tmp_path):
    path = str(clip(tmp_path / "a.mp4", 30, 10))

    def refuse(frames, height, width):
        assert (frames, height, width) == (8, 48, 64)
        raise SampleError("too_long", "no")

    with pytest.raises(SampleError, match="too_long"):
        read(path, target_size=refuse)
