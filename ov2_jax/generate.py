"""Answers a question about pictures, clips or text.

python -m ov2_jax.generate --checkpoint=DIR --image=cat.jpg --prompt="What is this?"

--checkpoint is a training work directory (its newest step), one of its step folders, a converted
checkpoint or a Hugging Face folder. --image and --video can be repeated; <image> and <video> in the
prompt mark their places, otherwise they come first. Several --prompt are answered as one batch.
"""

import argparse
import dataclasses
import sys

from absl import logging

from conversion.errors import ConversionError
from ov2_jax.config.data import DataConfig
from ov2_jax.core.errors import CheckpointError, ConfigError, DataError
from ov2_jax.data.encoding.encode import SampleEncoder
from ov2_jax.data.rejected import SampleError
from ov2_jax.generation.generator import Sampling
from ov2_jax.generation.load import open_checkpoint


def with_marks(prompt: str, images: int, videos: int) -> str:
    """Puts marks for all media before a prompt that has none of its own."""
    if "<image>" in prompt or "<video>" in prompt:
        return prompt
    return "<image>\n" * images + "<video>\n" * videos + prompt


def media_settings(data: DataConfig, args: argparse.Namespace) -> DataConfig:
    """The checkpoint's own settings with what the command line says otherwise."""
    if args.num_frames is not None and args.target_fps is not None:
        raise ConfigError("--num-frames and --target-fps exclude each other.")
    changes = {}
    if args.num_frames is not None:
        changes |= {"num_frames": args.num_frames, "target_fps": None}
    if args.target_fps is not None:
        changes |= {"target_fps": args.target_fps, "num_frames": None}
    if args.max_pixels is not None:
        low = min(data.min_pixels, args.max_pixels)
        changes |= {"max_pixels": args.max_pixels, "min_pixels": low}
        changes |= {"frame_max_pixels": None, "frame_min_pixels": None}
    codec = {"num_sampled_frames": args.num_frames, "max_pixels": args.max_pixels}
    codec = {name: value for name, value in codec.items() if value is not None}
    changes["codec"] = dataclasses.replace(data.codec, **codec)
    return dataclasses.replace(data, **changes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m ov2_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint or Hugging Face folder")
    add("--prompt", required=True, action="append", help="the question; several make a batch")
    add("--image", default=[], action="append", help="a picture; may be given several times")
    add("--video", default=[], action="append", help="a clip; may be given several times")
    add("--system", help="system prompt instead of the default one")
    add("--video-input", default="uniform", choices=["uniform", "codec"], help="how clips are read")
    add("--num-frames", type=int, help="frames of every clip; with codec, those looked at")
    add("--target-fps", type=float, help="frames a second of every clip")
    add("--max-pixels", type=int, help="largest area of a picture, frame or canvas")
    add("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, help="nucleus of the draw, at a temperature above 0")
    add("--seed", type=int, default=0, help="of the draw")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the computation")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax tells its whole life at INFO
    try:
        generator, data = open_checkpoint(args.checkpoint, dtype=args.dtype)
        encoder = SampleEncoder(media_settings(data, args), generator.config, generator.tokenizer)
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompts = []
        for text in args.prompt:
            question = with_marks(text, len(args.image), len(args.video))
            messages = [*system, {"role": "user", "content": question}]
            prompts.append(
                encoder.encode_prompt(
                    messages, args.image, args.video, video_input=args.video_input
                )
            )
        sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
        for answer in generator(prompts, sampling):
            print(answer)
    except (ConfigError, DataError, SampleError, CheckpointError, ConversionError) as e:
        sys.exit(f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    main()
