"""Codec-style video: many frames sparsely, by the bits that their parts cost the video codec.

select.py  which blocks, from bit costs: equal to the released tool
energy.py  bit costs from what stock FFmpeg tells while it decodes; scores.py: other sources of them
clip.py    a clip to patches, positions and windows; assets.py: the same from ready-made canvases
"""

from ov2_jax.config.codec import CodecConfig
from ov2_jax.data.encoding.codec.assets import Assets, read_pictures, read_positions
from ov2_jax.data.encoding.codec.bad import is_bad_frame
from ov2_jax.data.encoding.codec.clip import CodecClip, read_codec_clip, time_runs
from ov2_jax.data.encoding.codec.scores import FileScores, ScoreSource, StreamScores
from ov2_jax.data.encoding.codec.select import Selection, TooFewFrames, select_patches

__all__ = [
    "Assets",
    "CodecClip",
    "CodecConfig",
    "FileScores",
    "ScoreSource",
    "Selection",
    "StreamScores",
    "TooFewFrames",
    "is_bad_frame",
    "read_codec_clip",
    "read_pictures",
    "read_positions",
    "select_patches",
    "time_runs",
]
