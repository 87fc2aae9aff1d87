"""Codec-style video: many frames sparsely, by the bits that their parts cost the video codec.

clip.py      a clip to patches, positions and windows; assets.py: the same from ready-made canvases
select.py    which blocks, from bit costs: equal to the released tool. Its parts: frames.py (which
             frames), block_scores.py (what blocks are worth), groups.py (where groups end)
scores.py    bit costs of a clip, from stock FFmpeg (energy.py) or from a file
settings.py  the parameters for a model and its packs
"""

from ov2_jax.config.codec import CodecConfig
from ov2_jax.data.encoding.codec.assets import Assets, read_pictures, read_positions
from ov2_jax.data.encoding.codec.bad_frames import is_bad_frame
from ov2_jax.data.encoding.codec.clip import CodecClip, read_codec_clip, time_runs
from ov2_jax.data.encoding.codec.scores import FileScores, ScoreSource, StreamScores
from ov2_jax.data.encoding.codec.select import Selection, TooFewFrames, select_patches
from ov2_jax.data.encoding.codec.settings import codec_config

__all__ = [
    "Assets",
    "CodecClip",
    "CodecConfig",
    "FileScores",
    "ScoreSource",
    "Selection",
    "StreamScores",
    "TooFewFrames",
    "codec_config",
    "is_bad_frame",
    "read_codec_clip",
    "read_pictures",
    "read_positions",
    "select_patches",
    "time_runs",
]
