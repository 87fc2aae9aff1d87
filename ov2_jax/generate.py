"""Answers a question about pictures, clips or text.

    python -m ov2_jax.generate --checkpoint=DIR --image=cat.jpg --prompt="What is this?"

--checkpoint is the work directory of a training run (its newest step), one of its step folders, a
converted checkpoint or a Hugging Face folder. --image and --video can be repeated; <image> and
<video> in the prompt mark their places, otherwise they come first. Several --prompt are answered as
one batch.
"""

import dataclasses

from absl import flags, logging

from ov2_jax.config.data import DataConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.core.program import Given, run
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.generation.generator import Sampling
from ov2_jax.generation.load import open_checkpoint


def with_marks(prompt: str, images: int, videos: int) -> str:
    """Puts a mark for every picture and clip before a prompt that has none."""
    if "<image>" in prompt or "<video>" in prompt:
        return prompt
    return "<image>\n" * images + "<video>\n" * videos + prompt


def media_settings(data: DataConfig, given: Given) -> DataConfig:
    """The checkpoint's own settings, with those that the command line overrides."""
    if given.num_frames is not None and given.target_fps is not None:
        raise ConfigError("--num-frames and --target-fps exclude each other.")
    changes = {}
    if given.num_frames is not None:
        changes |= {"num_frames": given.num_frames, "target_fps": None}
    if given.target_fps is not None:
        changes |= {"target_fps": given.target_fps, "num_frames": None}
    if given.max_pixels is not None:
        low = min(data.min_pixels, given.max_pixels)
        changes |= {"max_pixels": given.max_pixels, "min_pixels": low}
        changes |= {"frame_max_pixels": None, "frame_min_pixels": None}
    codec = {"num_sampled_frames": given.num_frames, "max_pixels": given.max_pixels}
    codec = {name: value for name, value in codec.items() if value is not None}
    changes["codec"] = dataclasses.replace(data.codec, **codec)
    return dataclasses.replace(data, **changes)


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Checkpoint or Hugging Face folder.", required=True)
    flags.DEFINE_multi_string("prompt", None, "A question; several make a batch.", required=True)
    flags.DEFINE_multi_string("image", [], "A picture; may be given several times.")
    flags.DEFINE_multi_string("video", [], "A clip; may be given several times.")
    flags.DEFINE_string("system", None, "System prompt instead of the default one.")
    flags.DEFINE_enum("video-input", "uniform", ["uniform", "codec"], "How clips are read.")
    flags.DEFINE_integer("num-frames", None, "Frames of a clip; with codec, frames looked at.")
    flags.DEFINE_float("target-fps", None, "Frames a second of a clip.")
    flags.DEFINE_integer("max-pixels", None, "Largest area of a picture, frame or canvas.")
    flags.DEFINE_integer("max-new-tokens", 256, "Longest answer, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "Of the draw; 0 is greedy.")
    flags.DEFINE_float("top-p", 1.0, "Nucleus of the draw, at a temperature above 0.")
    flags.DEFINE_integer("seed", 0, "Of the draw.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the computation.")


def main(given: Given) -> None:
    generator, data = open_checkpoint(given.checkpoint, dtype=given.dtype)
    encoder = SampleEncoder(media_settings(data, given), generator.config, generator.tokenizer)
    system = [] if given.system is None else [{"role": "system", "content": given.system}]
    prompts = []
    for text in given.prompt:
        question = with_marks(text, len(given.image), len(given.video))
        messages = [*system, {"role": "user", "content": question}]
        prompts.append(
            encoder.encode_prompt(messages, given.image, given.video, video_input=given.video_input)
        )
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p, given.seed)
    for answer in generator(prompts, sampling):
        print(answer)


if __name__ == "__main__":
    run(main, _define_flags, verbosity=logging.ERROR)
