"""Opens a clip with PyAV and reads its packets and frames, within a time limit."""

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av

from ov2_jax.core.errors import describe
from ov2_jax.core.files import open_binary
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import Media, check_exists, decodable

# A container may announce a few frames more than decode (cut at a non-key frame). If more than this
# share is missing, the file is cut off.
MAX_MISSING_SHARE = 0.05
DECODER_THREADS = 2  # more would fight over cores with the other workers
# An 8K frame. A file of some kilobytes can hold frames of any size, and a decoder keeps up to 17 of
# them, so FFmpeg gets the limit too: sizes can change in mid-stream.
MAX_FRAME_PIXELS = 8192 * 4352
# Containers that hold all of their data. For playlists and lists of files (HLS, DASH, concat, SDP,
# ...) FFmpeg would open other files, or wait for the network.
_CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif", "apng"),
    *("mxf", "nut", "rm", "dv", "wtv", "ivf", "obu", "av1", "h264", "hevc", "m4v", "mjpeg", "vc1"),
    *("yuv4mpegpipe", "swf", "nsv", "gxf", "h263", "mj2"),
)
_OPTIONS = {"max_pixels": str(MAX_FRAME_PIXELS), "format_whitelist": ",".join(_CONTAINERS)}


@contextmanager
def open_clip(
    path: Media, timeout_s: float, *, passes: type[Exception] = SampleError
) -> Iterator["ClipReader"]:
    """A reader of the clip. Any exception inside the `with` becomes a SampleError.

    A SampleError and an exception of the class `passes` stay what they are. Raises SampleError
    missing_file, bad_video or video_timeout.
    """
    check_exists(path, "clip")
    reader = ClipReader(path, timeout_s)
    try:
        yield reader
    except (SampleError, passes):
        raise
    except Exception as error:  # PyAV maps FFmpeg's errors onto many classes
        reader.check_time()  # an interrupted read looks like any other broken one
        raise SampleError("bad_video", f"{path}: {describe(error)}") from error


class ClipReader:
    """Reads one clip, once or several times, within one time limit.

    The clock is read between packets, because no signal reaches a worker's thread. Every method
    raises SampleError video_timeout when the time is up.
    """

    def __init__(self, path: Media, timeout_s: float) -> None:
        self.path = path
        self._timeout_s, self._end = timeout_s, time.monotonic() + timeout_s

    def check_time(self) -> None:
        if time.monotonic() > self._end:
            raise SampleError(
                "video_timeout", f"{self.path} took longer than {self._timeout_s:g} s to decode"
            )

    def _open(self) -> av.container.InputContainer:
        self.check_time()
        left = max(self._end - time.monotonic(), 0.001)
        file = decodable(self.path)
        if isinstance(file, str):
            file = f"file:{file}"  # else FFmpeg takes what is before a colon for a protocol
        try:
            return av.open(file, timeout=(left, left), options=_OPTIONS)
        except (av.error.InvalidDataError, av.error.ArgumentError) as error:
            raise SampleError(
                "bad_video",
                f"{self.path} is no clip in a container such as MP4, Matroska or AVI, or its "
                f"header is damaged: {error}",
            ) from error

    @contextmanager
    def stream(self) -> Iterator[av.VideoStream]:
        """The clip's first video stream, closed after the `with`. Raises SampleError bad_video."""
        with self._open() as container:
            if not container.streams.video:
                raise SampleError("bad_video", f"{self.path} has no video stream")
            stream = container.streams.video[0]
            if stream.height * stream.width > MAX_FRAME_PIXELS:
                raise SampleError(
                    "bad_video",
                    f"{self.path} has frames of {stream.width}x{stream.height} pixels; at most "
                    f"{MAX_FRAME_PIXELS} are decoded",
                )
            stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
            yield stream

    def packets(self, stream: av.VideoStream) -> Iterator[av.Packet]:
        for packet in stream.container.demux(stream):
            self.check_time()
            yield packet

    def frames(self, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        """Frames in order, up to the first one that the decoder had to mend.

        A mended frame spoils all frames that refer to it, so the clip counts as cut off there.
        """
        for packet in self.packets(stream):
            for frame in packet.decode():
                if frame.is_corrupt:
                    return
                yield frame

    def count_frames(self, stream: av.VideoStream) -> int:
        """The number in an MP4's index, else the number of packets.

        Other containers state no number, or only in a header field that nothing depends on. The
        index of a fragmented MP4 covers only its first part.
        """
        if "mp4" in stream.container.format.name and stream.frames and not self._has_fragments():
            return stream.frames
        return sum(p.size > 0 and not p.is_discard for p in self.packets(stream))

    def _has_fragments(self) -> bool:
        """Whether an MP4 has a `moof` box in addition to its `moov`."""
        file, at = decodable(self.path), 0
        with open_binary(file) if isinstance(file, str) else file as opened:
            while True:
                self.check_time()
                opened.seek(at)
                head = opened.read(16)
                if len(head) < 8:
                    return False
                size, kind = struct.unpack(">I4s", head[:8])
                if kind == b"moof":
                    return True
                if size == 1 and len(head) == 16:
                    (size,) = struct.unpack(">Q", head[8:])
                if size < 8:  # 0: to the end of the file
                    return False
                at += size
