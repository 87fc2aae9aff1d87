"""Answers a question about pictures, clips or text.

python -m ov2_jax.generate --checkpoint=DIR --image=cat.jpg --prompt="What is this?"

--checkpoint is a training work directory (its newest step), one of its step folders, a converted
checkpoint or a Hugging Face folder. --image and --video can be repeated; <image> and <video> in the
prompt mark their places, otherwise they come first. Several --prompt are answered as one batch.
"""

import dataclasses

from absl import app, flags, logging

from conversion.errors import ConversionError
from ov2_jax.checkpoint_dir import CheckpointError
from ov2_jax.data.encode import SampleEncoder
from ov2_jax.data.errors import DataError, SampleError
from ov2_jax.generation.generator import Sampling
from ov2_jax.generation.load import open_checkpoint
from ov2_jax.model.config import ConfigError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Checkpoint or Hugging Face folder.")
_IMAGE = flags.DEFINE_multi_string("image", [], "A picture; may be given several times.")
_VIDEO = flags.DEFINE_multi_string("video", [], "A clip; may be given several times.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "The question; several make a batch.")
_SYSTEM = flags.DEFINE_string("system", None, "System prompt instead of the default one.")
_NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames of every clip.", lower_bound=1)
_TARGET_FPS = flags.DEFINE_float("target_fps", None, "Frames a second of every clip.")
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", None, "Largest area of a picture or frame.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus of the draw, at a temperature above 0.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Weights and compute.")


def with_marks(prompt: str, images: int, videos: int) -> str:
    """Puts marks for all media before a prompt that has none of its own."""
    if "<image>" in prompt or "<video>" in prompt:
        return prompt
    return "<image>\n" * images + "<video>\n" * videos + prompt


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)  # Orbax tells its whole life at INFO
    try:
        generator, data = open_checkpoint(_CHECKPOINT.value, dtype=_DTYPE.value)
        changes = {}
        if _NUM_FRAMES.value is not None:
            changes |= {"num_frames": _NUM_FRAMES.value, "target_fps": None}
        if _TARGET_FPS.value is not None:
            changes |= {"target_fps": _TARGET_FPS.value, "num_frames": None}
        if _MAX_PIXELS.value is not None:
            limit = {"max_pixels": _MAX_PIXELS.value, "frame_max_pixels": None}
            changes |= limit | {"min_pixels": min(data.min_pixels, _MAX_PIXELS.value)}
        if _NUM_FRAMES.value is not None and _TARGET_FPS.value is not None:
            raise ConfigError("--num_frames and --target_fps exclude each other.")
        encoder = SampleEncoder(
            dataclasses.replace(data, **changes), generator.config, generator.tokenizer
        )
        system = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
        prompts = []
        for text in _PROMPT.value:
            question = with_marks(text, len(_IMAGE.value), len(_VIDEO.value))
            messages = [*system, {"role": "user", "content": question}]
            prompts.append(encoder.encode_prompt(messages, _IMAGE.value, _VIDEO.value))
        sampling = Sampling(_MAX_NEW_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value)
        for answer in generator(prompts, sampling):
            print(answer)
    except (ConfigError, DataError, SampleError, CheckpointError, ConversionError) as e:
        raise SystemExit(f"{type(e).__name__}: {e}") from e


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "prompt"])
    app.run(main)
