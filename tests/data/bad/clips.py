"""Clips that are damaged, odd, or larger than they look."""

import io
import os
import struct
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.data.bad.cases import OK, Case, cut, flip, line, npy, sample
from tests.data.bad.pictures import encoded, png

_BAD = ("bad_video",)
_EITHER = ("bad_video", OK)
FRAMES = 24


def clip(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    frames: int = FRAMES,
    size: tuple[int, int] = (64, 96),
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    times: list[int] | None = None,
    pipe: bool = False,
    busy: bool = False,
) -> bytes:
    """Frame i is 4*i + 20 bright, a little textured; times are in tenths of a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        out = _Pipe() if pipe else str(path)
        _write(out, codec, container, frames, size, options or {}, codec_options or {}, times, busy)
        return out.getvalue() if pipe else path.read_bytes()


def _write(
    out: "str | _Pipe",
    codec: str,
    container: str,
    frames: int,
    size: tuple[int, int],
    options: dict[str, str],
    codec_options: dict[str, str],
    times: list[int] | None,
    busy: bool,
) -> None:
    with av.open(out, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=10, options={"threads": "1", **codec_options})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        rng = np.random.default_rng(0)
        noise = rng.integers(-9, 10, (*size, 1))
        for i in range(frames):
            if busy:
                noise = rng.integers(-60, 61, (*size, 1))
            pixels = np.broadcast_to(np.clip(4 * i + 20 + noise, 0, 255), (*size, 3))
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i if times is None else times[i], Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


class _Pipe(io.BytesIO):
    """Cannot be sought in: what is written stays as it is."""

    def seekable(self) -> bool:
        return False


def sound() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def _set(data: bytes, box: bytes, offset: int, value: bytes, which: int = 0) -> bytes:
    """A copy with bytes written `offset` behind a box's name."""
    at = -1
    for _ in range(which + 1):
        at = data.index(box, at + 1)
    at += len(box) + offset
    return data[:at] + value + data[at + len(value) :]


def _turned(data: bytes) -> bytes:
    """The track's matrix turns pictures by 90 degrees."""
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return _set(data, b"tkhd", 40, matrix)


def _huge_frame(side: int) -> bytes:
    """Few kilobytes that decode to a frame of side x side pixels."""
    row = bytes(1 + side // 8)
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as file:
        stream = file.add_stream("png", rate=10)
        stream.height = stream.width = side
        stream.pix_fmt = "monob"
        for i in range(3):
            packet = av.Packet(png(side, side, depth=1, colour=0, data=zlib.compress(row * side)))
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts = packet.dts = i
            packet.is_keyframe = True
            file.mux(packet)
    return out.getvalue()


def _damaged() -> dict[str, tuple[bytes, tuple[str, ...], dict]]:
    files = {
        "mp4": clip(),
        "fast.mp4": clip(options={"movflags": "faststart"}),
        "mkv": clip(container="matroska"),
        "webm": clip("libvpx-vp9", "webm"),
        "avi": clip("mpeg4", "avi"),
        "ts": clip("mpeg2video", "mpegts"),
    }
    cases: dict[str, tuple[bytes, tuple[str, ...], dict]] = {}
    for kind, data in files.items():
        # What a container without an index lost behind a cut is not known.
        known = kind in ("mp4", "fast.mp4")
        for percent in (2, 30, 60, 90):
            cases[f"cut{percent}.{kind}"] = cut(data, percent / 100), _BAD if known else _EITHER, {}
        for seed in range(6):
            cases[f"flip{seed}.{kind}"] = (
                flip(data, seed, bits=12),
                (*_EITHER, "bad_aspect", "too_long"),
                {},
            )
    # H.264's decoder reports most of the frames that it had to mend, not all.
    busy = clip(options={"movflags": "faststart"}, busy=True)
    for seed in range(4):
        cases[f"mended{seed}.mp4"] = flip(busy, seed, 0.3, 0.8, bits=60), _BAD, {}
    return cases


def _odd() -> dict[str, tuple[bytes, tuple[str, ...], dict]]:
    whole = clip()
    fast = clip(options={"movflags": "faststart"})
    avi = clip("mpeg4", "avi")
    first, second = (clip(container="h264", frames=12, size=s) for s in ((64, 96), (96, 64)))
    fragments = {"movflags": "frag_keyframe"}
    eight = {"t": [0, 3, 7, 10, 13, 16, 20, 23], "fallbacks": 0}

    def lie(frames: int) -> bytes:
        """In both places of an AVI's header."""
        return avi.replace(struct.pack("<I", FRAMES), struct.pack("<I", frames), 2)

    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    return {
        "whole.mp4": (whole, (OK,), eight),
        "empty.mp4": (b"", _BAD, {}),
        "zeros.mp4": (bytes(5000), _BAD, {}),
        "text.mp4": (b"no clip at all\n" * 20, _BAD, {}),
        "page.webm": (b"<!DOCTYPE html><html></html>", _BAD, {}),
        "avi_named.mp4": (avi, (OK,), eight),
        "mp4_named.avi": (whole, (OK,), eight),
        "sound.mp4": (sound(), _BAD, {}),
        "one_frame.mp4": (clip(frames=1), (OK,), {"t": [0]}),
        "three_frames.mp4": (clip(frames=3), (OK,), {"t": [0, 1, 2]}),
        "three_frames.mkv": (clip(container="matroska", frames=3), (OK,), {"t": [0, 1, 2]}),
        "odd_size.mkv": (clip("ffv1", "matroska", size=(63, 97)), (OK,), eight),
        "tiny.mkv": (clip("ffv1", "matroska", size=(2, 2)), (OK,), eight),
        "long_side.mkv": (clip("ffv1", "matroska", size=(4, 900)), ("bad_aspect",), {}),
        "turned.mp4": (_turned(whole), (OK,), eight),
        "uneven.mp4": (
            clip(times=[i * i for i in range(FRAMES)]),
            (OK,),
            {"t": list(range(FRAMES))},
        ),
        "uneven.mkv": (
            clip(container="matroska", times=[i + 5 * (i > 9) for i in range(FRAMES)]),
            (OK,),
            eight,
        ),
        "before_zero.mp4": (clip(times=list(range(-12, 12))), _EITHER, {}),
        "before_zero.mkv": (clip(container="matroska", times=list(range(-12, 12))), _EITHER, {}),
        "no_times.h264": (first, (OK,), {"t": [0, 2, 3, 5, 6, 8, 9, 11]}),
        "new_size.h264": (first + second, _EITHER, {}),
        "fragments.mp4": (clip(options=fragments, codec_options={"g": "6"}), (OK,), eight),
        "streamed.mp4": (
            clip(options=fragments, codec_options={"g": "6"}, pipe=True),
            (OK,),
            eight,
        ),
        "only_fragments.mp4": (
            clip(options={"movflags": "frag_keyframe+empty_moov"}, codec_options={"g": "6"}),
            (OK,),
            eight,
        ),
        "says_3_frames.avi": (lie(3), (OK,), eight),
        "says_2_billion_frames.avi": (lie(2**31 - 1), _EITHER, {}),
        "many_samples.mp4": (_set(fast, b"stsz", 4, struct.pack(">II", 1, 2**31 - 1)), _BAD, {}),
        "long_samples.mp4": (_set(fast, b"stsz", 4, struct.pack(">I", 2**31 - 1)), _BAD, {}),
        "many_chunks.mp4": (_set(fast, b"stco", 4, struct.pack(">I", 2**32 - 1)), _EITHER, {}),
        "many_times.mp4": (
            _set(fast, b"stts", 8, struct.pack(">II", 2**31 - 1, 1)),
            (*_EITHER, "too_long"),
            {},
        ),
        "no_times.mp4": (_set(fast, b"stts", 8, struct.pack(">II", FRAMES, 0)), _EITHER, {}),
        "no_clock.mp4": (_set(fast, b"mdhd", 12, bytes(8)), _EITHER, {}),
        "huge_box.mp4": (_set(fast, b"moov", -8, b"\x7f\xff\xff\xff"), _EITHER, {}),
        "no_box.mp4": (_set(fast, b"moov", -8, bytes(4)), _EITHER, {}),
        "no_size.mp4": (_set(fast, b"avc1", 24, bytes(4)), _EITHER, {}),
        "says_65535.mp4": (_set(fast, b"avc1", 24, b"\xff" * 4), _EITHER, {}),
        "no_keys.mp4": (_set(fast, b"avcC", 6, bytes(30)), _BAD, {}),
        "frame_12000.mov": (_huge_frame(12000), _BAD, {}),
        "picture.mp4": (_picture(), _EITHER, {}),
        "bomb.mp4": (png(65500, 65500), _BAD, {}),
        # Texts that make FFmpeg open other files, or wait for the network.
        "list.mp4": (b"ffconcat version 1.0\nfile whole.mp4\n", _BAD, {}),
        "list.ffconcat": (b"ffconcat version 1.0\nfile whole.mp4\n", _BAD, {}),
        "playlist.mp4": (playlist.format("whole.ts").encode(), _BAD, {}),
        "playlist.m3u8": (playlist.format("whole.ts").encode(), _BAD, {}),
        "network.m3u8": (playlist.format("http://127.0.0.1:9/a.ts").encode(), _BAD, {}),
        "session.sdp": (
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\n"
            b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            _BAD,
            {},
        ),
        "frame_%d.png": (_picture(), _EITHER, {}),
        "10:30 clip.mp4": (whole, (OK,), eight),
    }


def _picture() -> bytes:
    return encoded(Image.new("RGB", (84, 56), (90, 90, 90)), "PNG")


def clip_cases(folder: Path) -> list[Case]:
    """Writes the files below `folder`/clips; each is read as uniform frames and codec-style."""
    clips = folder / "clips"
    clips.mkdir()
    (clips / "whole.ts").write_bytes(clip(container="mpegts"))
    files = {**_damaged(), **_odd()}
    for name, (data, _, _) in files.items():
        (clips / name).write_bytes(data)
    os.mkfifo(clips / "pipe.mp4")
    (clips / "folder.mp4").mkdir()
    (clips / "link.mp4").symlink_to("nowhere.mp4")
    (clips / "loop.mp4").symlink_to("loop.mp4")
    (clips / "closed.mp4").write_bytes(files["whole.mp4"][0])
    (clips / "closed.mp4").chmod(0)
    closed = (OK,) if os.access(clips / "closed.mp4", os.R_OK) else _BAD
    missing = ("missing_file",)
    more = {
        "pipe.mp4": missing,
        "folder.mp4": missing,
        "link.mp4": missing,
        "loop.mp4": missing,
        "closed.mp4": closed,
    }
    files |= {name: (b"", wants, {}) for name, wants in more.items()}
    cases = []
    for name, (_, wants, facts) in files.items():
        row = sample("<video>?", id=name, video=f"clips/{name}")
        cases.append(Case(f"clip {name}", wants, line(row), facts=facts))
    for name, (_, wants, _) in files.items():
        row = sample("<video>?", id=name, video=f"clips/{name}")
        # A canvas of a source in the gap between the sizes may be wider than frames are.
        if "bad_aspect" in wants:  # canvases have no limit
            wants = (*wants, OK)
        cases.append(Case(f"codec {name}", wants, line(row), video="codec"))
    for name, (data, wants) in _bit_costs().items():
        (clips / name).write_bytes(data)
        row = sample("<video>?", video="clips/whole.mp4", bit_cost=f"clips/{name}")
        cases.append(Case(f"bit costs {name}", wants, line(row), video="codec"))
    for name in ("pipe.mp4", "nowhere.npz"):
        row = sample("<video>?", video="clips/whole.mp4", bit_cost=f"clips/{name}")
        cases.append(Case(f"bit costs {name}", missing, line(row), video="codec"))
    return cases


def _bit_costs() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    def npz(**arrays: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.savez(out, **arrays)
        return out.getvalue()

    good = npz(bit_cost=np.ones((FRAMES, 4, 6), np.float32))
    bad = ("bad_record",)
    return {
        "good.npz": (good, (OK,)),
        "empty.npz": (b"", bad),
        "cut.npz": (cut(good, 0.5), bad),
        "zip.npz": (b"PK\x03\x04" + bytes(50), bad),
        "pickled.npz": (npz(bit_cost=np.array([{}] * 8, object).reshape(2, 2, 2)), bad),
        "other_name.npz": (npz(costs=np.ones((FRAMES, 4, 6))), bad),
        "flat.npz": (npz(bit_cost=np.ones(5)), bad),
        "texts.npz": (npz(bit_cost=np.full((FRAMES, 4, 6), "a")), bad),
        "few_frames.npz": (npz(bit_cost=np.ones((3, 4, 6))), _BAD),
        "array.npz": (npy(np.ones((FRAMES, 4, 6))), bad),
    }
