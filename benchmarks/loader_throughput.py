"""How fast the host makes pictures, clips and packed rows.

    python benchmarks/loader_throughput.py [--parts=images,clips,rows] [--rounds=5]

Makes its own JPEGs and H.264 clips in a temporary folder, of a texture as noisy as photographs, and
prints a JSON line for each measurement.

images  the pipeline of a training sample (file, decode, resize, patches, tokens) against
        transformers' Qwen-VL processor on the same files; pixels are compared first.
clips   16 uniform frames, and codec-style reading, against PyAV that only decodes to RGB.
rows    the whole loader with pictures, clips and text, with threads and with worker processes.

The two sides of a ratio alternate file by file; those of `images` have a process each. Each file
counts with its median round, in CPU time (all threads of the process) and wall time. So ratios are
right on a busy machine too; seconds and the rates of worker processes are right on a quiet one.
"""

import json
import math
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import av
import numpy as np
from absl import flags
from PIL import Image

from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.program import Given, run
from ov2_jax.data.encoding.clip_reader import DECODER_THREADS
from ov2_jax.data.encoding.codec import CodecConfig, read_codec_clip
from ov2_jax.data.encoding.images import smart_resize
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.encoding.video import FrameSampling, read_clip, select_frames
from ov2_jax.data.loader.loader import make_loader
from ov2_jax.quickstart import TOKENIZER

MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28  # the defaults, of the released models too
FRAME_PIXELS = 200_704  # 256 tokens a frame
SIZES = {  # (height, width)
    "960x1280": [(960, 1280)] * 4,
    # Pictures of instruction data, documents, and a camera's.
    "mix": [(480, 640), (427, 640), (333, 500), (768, 1024), (1280, 960), (1654, 1169)]
    + [(1080, 1920), (224, 224), (640, 480), (3024, 4032)],
}
CLIPS = {"720p 10 s": (720, 1280, 300), "360p 30 s": (360, 640, 900)}
FPS, FRAMES = 30, 16
PARTS = ["images", "clips", "rows"]
QUESTION = [{"role": "user", "content": "<image>\nWhat is here?"}]


def texture(height: int, width: int, seed: int) -> Image.Image:
    """Noise in octaves: its JPEG of quality 90 has about 2.5 bits a pixel, like photographs."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for size, strength in ((1, 4), (2, 6), (4, 10), (16, 25), (64, 40), (256, 60)):
        shape = height // size + 2, width // size + 2
        grey = rng.standard_normal(shape).astype(np.float32)
        for channel in range(3):
            noise = grey + 0.3 * rng.standard_normal(shape).astype(np.float32)
            large = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(large)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_jpegs(folder: pathlib.Path, sizes: Iterable[tuple[int, int]]) -> list[str]:
    paths = [folder / f"{seed}_{h}x{w}.jpg" for seed, (h, w) in enumerate(sizes)]
    for seed, (path, (height, width)) in enumerate(zip(paths, sizes, strict=True)):
        texture(height, width, seed).save(path, quality=90)
    return [str(path) for path in paths]


def write_clip(path: pathlib.Path, height: int, width: int, frames: int) -> str:
    """A camera that moves over a texture, a piece of another one that moves too, and grain."""
    ground = np.asarray(texture(height + 256, width + 256, 1))
    thing = np.asarray(texture(height // 4, width // 4, 2))
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4, (height + 64, width + 64, 1)).round().astype(np.int16)
    with av.open(str(path), "w") as container:
        options = {"crf": "23", "preset": "veryfast", "g": "120"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(frames):
            y, x = (round(128 + 120 * f(i / 100)) for f in (math.sin, math.cos))
            picture = ground[y : y + height, x : x + width].copy()
            top, left = (7 * i % (side * 3 // 4) for side in (height, width))
            picture[top : top + height // 4, left : left + width // 4] = thing
            down, right = rng.integers(0, 64, 2)
            noise = grain[down : down + height, right : right + width]
            picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def timed(read: Callable[[str], object], file: str) -> tuple[float, float]:
    """(CPU, wall) seconds; CPU of all threads of the process."""
    cpu, wall = time.process_time(), time.perf_counter()
    read(file)
    return time.process_time() - cpu, time.perf_counter() - wall


def alternate(
    sides: dict[str, Callable[[str], tuple[float, float]]], files: list[str], rounds: int
) -> dict[str, tuple[float, float]]:
    """(CPU, wall) seconds of each side for all files, each file's median round."""
    spent: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for seconds in spent.values():
            seconds.append([])
        for file in files:
            for name, side in sides.items():
                spent[name][-1].append(side(file))
    return {name: tuple(np.median(x, axis=0).sum(0).tolist()) for name, x in spent.items()}


class Apart:
    """A side in a process of its own: the heap that one side leaves would speed up the other."""

    def __init__(self, make: Callable[[], Callable[[str], object]]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()

    def __call__(self, file: str) -> tuple[float, float]:
        self._pipe.send(file)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(make: Callable[[], Callable[[str], object]], pipe: Connection) -> None:
    read = make()
    while (file := pipe.recv()) is not None:
        pipe.send(timed(read, file))


def report(**values: object) -> None:
    rounded = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(rounded), flush=True)


def small_model() -> ModelConfig:
    """Patches and windows are those of the released models; nothing is computed with it."""
    sizes = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return ModelConfig(
        vision=VisionConfig(hidden_size=32, out_hidden_size=32, **sizes),
        text=TextConfig(
            vocab_size=512, hidden_size=32, num_key_value_heads=1, head_dim=32, **sizes
        ),
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )


def hf_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = small_model().vision
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=1,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
    )


def hf_reader() -> Callable[[str], np.ndarray]:
    processor = hf_processor()

    def read(path: str) -> np.ndarray:
        with Image.open(path) as image:
            return processor(images=image, return_tensors="np")["pixel_values"]

    return read


def our_reader() -> Callable[[str], np.ndarray]:
    data = DataConfig(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    encoder = SampleEncoder(data, small_model(), load_tokenizer(TOKENIZER, small_model()))
    return lambda path: encoder.encode_prompt(QUESTION, [path]).patches


def bench_images(folder: pathlib.Path, rounds: int) -> None:
    hf, ours, processor = hf_reader(), our_reader(), hf_processor()
    area = small_model().vision.patch_size ** 2
    mean, deviation = (np.repeat(x, area) for x in (processor.image_mean, processor.image_std))
    sides = {"ours": Apart(our_reader), "hf": Apart(hf_reader)}
    for name, sizes in SIZES.items():
        (folder / name).mkdir()
        files = write_jpegs(folder / name, sizes)
        for file in files:
            if not np.array_equal(ours(file), np.rint((hf(file) * deviation + mean) * 255)):
                raise SystemExit(f"{file}: pixels differ from the Hugging Face processor's")
        seconds = alternate(sides, files, rounds)
        report(
            part="images",
            files=name,
            megabytes=sum(pathlib.Path(file).stat().st_size for file in files) / 1e6,
            per_core=len(files) / seconds["ours"][0],
            hf_per_core=len(files) / seconds["hf"][0],
            ratio_cpu=seconds["hf"][0] / seconds["ours"][0],
            ratio_wall=seconds["hf"][1] / seconds["ours"][1],
        )
    for side in sides.values():
        side.close()


def to_rgb(path: str, numbers: Iterable[int] | None) -> int:
    """Decodes up to the last number; converts these frames to RGB arrays, or all."""
    wanted = None if numbers is None else set(numbers)
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = DECODER_THREADS
        count = 0
        for number, frame in enumerate(container.decode(stream)):
            if wanted is None or number in wanted:
                count += frame.to_ndarray(format="rgb24").size > 0
            if wanted is not None and number == max(wanted):
                break
    return count


def target_size(frames: int, height: int, width: int) -> tuple[int, int]:
    return smart_resize(height, width, factor=28, min_pixels=MIN_PIXELS, max_pixels=FRAME_PIXELS)


def bench_clips(folder: pathlib.Path, rounds: int) -> None:
    config = CodecConfig()
    for name, (height, width, frames) in CLIPS.items():
        path = write_clip(folder / f"{height}.mp4", height, width, frames)
        numbers = select_frames(frames, FRAMES)
        sides = {
            "uniform": lambda file: read_clip(
                file, FrameSampling(FRAMES, None, FRAMES), timeout_s=600, target_size=target_size
            ),
            "codec": lambda file: read_codec_clip(file, config, timeout_s=600),
            "pyav_same": lambda file, numbers=numbers: to_rgb(file, numbers),
            "pyav_all": lambda file: to_rgb(file, None),
        }
        timers = {side: partial(timed, read) for side, read in sides.items()}
        seconds = alternate(timers, [path], rounds)
        cpu = {side: spent for side, (spent, _) in seconds.items()}
        report(
            part="clips",
            clip=name,
            kbit_per_s=pathlib.Path(path).stat().st_size * 8 / 1000 / (frames / FPS),
            uniform_per_core=1 / cpu["uniform"],
            codec_per_core=1 / cpu["codec"],
            pyav_same_per_core=1 / cpu["pyav_same"],
            uniform_over_pyav_same=cpu["uniform"] / cpu["pyav_same"],
            codec_over_uniform=cpu["codec"] / cpu["uniform"],
            codec_over_pyav_all=cpu["codec"] / cpu["pyav_all"],
        )


def write_mixture(folder: pathlib.Path, samples: int) -> pathlib.Path:
    """Of ten samples six have a picture, one a clip of 8 s in 360p, three are text."""
    pictures = write_jpegs(folder, [size for size in SIZES["mix"][:-1] for _ in range(2)])
    clips = [write_clip(folder / f"{i}.mp4", 360, 640, 240) for i in range(2)]
    rng = np.random.default_rng(0)
    words = ["which", "color", "is", "the", "large", "circle", "left", "of", "a", "red", "square"]
    path = folder / "train.jsonl"
    with path.open("w") as file:
        for i in range(samples):
            question, answer = (" ".join(rng.choice(words, n)) for n in rng.integers(8, 120, 2))
            record = {}
            if i % 10 < 6:
                record["image"] = pictures[i % len(pictures)]
                question = f"<image>\n{question}"
            elif i % 10 == 6:
                record["video"] = clips[i // 10 % len(clips)]
                question = f"<video>\n{question}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({**record, "conversations": turns}) + "\n")
    return path


def bench_rows(folder: pathlib.Path, rounds: int, workers: list[int], steps: int) -> None:
    model, path = small_model(), write_mixture(folder, 1000)
    tokenizer = load_tokenizer(TOKENIZER, model)
    pack = PackConfig(rows=4, seq_len=8192, vision_rows=((16, 5120), (2, 8192)))
    best: dict[int, dict[str, float]] = {}
    for number in range(rounds):
        for count in workers if number % 2 == 0 else reversed(workers):
            data = DataConfig(
                sources=(SourceConfig(str(path)),),
                frame_max_pixels=FRAME_PIXELS // 2,
                num_frames=FRAMES,
                num_workers=count,
                lookahead=64,
                shuffle=True,
            )
            options = {"packs_per_step": 1, "seed": 0, "rejects_path": folder / "rejected.jsonl"}
            loader = make_loader(data, pack, model, tokenizer, **options)
            try:
                for _ in range(4):  # past the start of the workers and the buffers' first filling
                    next(loader)
                cpu, wall = time.process_time(), time.perf_counter()
                infos = [next(loader)[1] for _ in range(steps)]
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            finally:
                loader.close()
            if count in best and best[count]["wall"] <= wall:
                continue
            best[count] = {
                "wall": wall,
                "cpu": cpu,
                "rows": steps * pack.rows,
                "samples": sum(info.samples for info in infos),
                "tokens": sum(info.tokens for info in infos),
                "patches": sum(info.patches for info in infos),
                "filled": sum(info.tokens for info in infos) / (steps * pack.token_slots),
            }
    for count in workers:
        values = best[count]
        rates = {
            f"{name}_per_s": values[name] / values["wall"]
            for name in ("rows", "samples", "tokens", "patches")
        }
        if not count:  # the CPU time of worker processes is not this process's
            rates["rows_per_core"] = values["rows"] / values["cpu"]
            rates["patches_per_core"] = values["patches"] / values["cpu"]
        against = {f"over_{other}": best[other]["wall"] / values["wall"] for other in workers[:2]}
        report(part="rows", workers=count, **rates, filled=values["filled"], **against)


def _define_flags() -> None:
    flags.DEFINE_list("parts", PARTS, "Parts to measure.")
    flags.register_validator(
        "parts", lambda parts: set(parts) <= set(PARTS), f"The parts are {', '.join(PARTS)}."
    )
    flags.DEFINE_integer("rounds", 5, "Rounds of each measurement.", lower_bound=1)
    flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes to compare.")
    flags.register_validator(
        "workers", lambda workers: all(n.isdigit() for n in workers), "These are whole numbers."
    )
    flags.DEFINE_integer("steps", 12, "Steps of a measurement of rows.", lower_bound=1)


def main(given: Given) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for part in given.parts:
            (root / part).mkdir()
        if "images" in given.parts:
            bench_images(root / "images", given.rounds)
        if "clips" in given.parts:
            bench_clips(root / "clips", given.rounds)
        if "rows" in given.parts:
            workers = [int(n) for n in given.workers]
            bench_rows(root / "rows", given.rounds, workers, given.steps)


if __name__ == "__main__":
    run(main, _define_flags)
