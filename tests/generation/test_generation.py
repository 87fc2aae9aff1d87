"""Generation: the cache against whole forward passes, packing against single prompts, the CLIs."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion import to_hf
from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.packing.build import build_pack
from ov2_jax.data.packing.placement import place_pack
from ov2_jax.data.sample import SampleSize
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.generation.generator import Generator, Sampling, choose_tokens, prompt_batch
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.quickstart import TOKENIZER
from ov2_jax.training.start import random_params
from tests.programs import REPOSITORY
from tests.tiny import ANSWERING

FLOAT32 = ComputeConfig(dtype="float32", remat="none")
STOP = 2  # <|im_end|>


@pytest.fixture(scope="module")
def model() -> LlavaOnevision2:
    graph = nnx.split(LlavaOnevision2(ANSWERING, rngs=nnx.Rngs(0), compute=FLOAT32))[0]
    return nnx.merge(graph, random_params(ANSWERING, 4))


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(
        ANSWERING, random_params(ANSWERING, 4), load_tokenizer(TOKENIZER, ANSWERING), FLOAT32
    )


@pytest.fixture(scope="module")
def encoder(generator) -> SampleEncoder:
    data = DataConfig(sources=(), num_frames=6, min_pixels=784, max_pixels=6272)
    return SampleEncoder(data, ANSWERING, generator.tokenizer)


@pytest.fixture(scope="module")
def prompts(encoder):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((56, 84), (28, 56))]
    ask = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    return [
        encoder.encode_prompt(ask("<image>\nWhat shape is it?"), pictures[:1]),
        encoder.encode_prompt(ask("Repeat: left blue")),
        encoder.encode_prompt(ask("<image>\n<image>\nWhich picture has more shapes?"), pictures),
    ]


def greedy_without_cache(model, prompt, steps: int) -> list[int]:
    run = jax.jit(lambda batch: model.decoder.logits(model(batch)[0]))
    new: list[int] = []
    while len(new) < steps and STOP not in new:
        tokens = np.concatenate([prompt.tokens, np.array(new, np.int32)])
        longer = prompt._replace(tokens=tokens, loss_mask=np.zeros(len(tokens), bool))
        batch, lengths = prompt_batch([longer], ANSWERING)
        new.append(int(jnp.argmax(run(batch)[0, lengths[0] - 1])))
    return new


def test_cached_batch_equals_whole_forward_passes(model, generator, prompts):
    """Prompts of different lengths in one batch, against one prompt at a time and no cache."""
    answers = generator(prompts, Sampling(12))
    for prompt, answer in zip(prompts, answers, strict=True):
        new = greedy_without_cache(model, prompt, 12)
        assert len(set(new)) > 2, "the random model says the same token again and again"
        want = generator.tokenizer.decode([t for t in new if t != STOP])
        assert answer == want


def test_packed_rows_from_the_packer_equal_single_prompts(encoder, data):
    """The whole pipeline: files, encoder, placement, pack; every token's logits as if alone."""
    # Logits of about 1, as the bound is for; the generating model's are ten times that.
    config = dataclasses.replace(
        ANSWERING, text=dataclasses.replace(ANSWERING.text, initializer_range=0.15)
    )
    graph = nnx.split(LlavaOnevision2(config, rngs=nnx.Rngs(0), compute=FLOAT32))[0]
    model = nnx.merge(graph, random_params(config, 0))
    records = RecordSource([SourceConfig(str(data))])
    samples = [encoder(records[i]) for i in range(24)]
    samples = [s for s in samples if not hasattr(s, "reason")]
    pack = PackConfig(rows=4, seq_len=192, vision_rows=((6, 32), (6, 64)))
    sizes = [SampleSize(len(s.tokens), tuple(s.windows.tolist())) for s in samples]
    placements = place_pack(sizes, pack)
    batch, _ = build_pack(samples, placements, pack, ANSWERING)
    run = jax.jit(lambda batch: model.decoder.logits(model(batch)[0]))
    packed = run(jax.tree.map(lambda x: x[None], batch))
    assert len(placements) > 10 and len({p.row for p in placements}) == 4
    for place in placements:
        sample = samples[place.sample]
        alone, lengths = prompt_batch([sample], ANSWERING)
        n = lengths[0]
        got = packed[place.row, place.offset : place.offset + n]
        np.testing.assert_allclose(got, run(alone)[0, :n], atol=2e-5, rtol=0)
        assert np.abs(got).max() > 0.3


def test_nucleus_and_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4000))

    def draw(temperature, top_p):
        args = jnp.float32(temperature), jnp.float32(top_p)
        return np.bincount(choose_tokens(logits, jax.random.key(0), *args), minlength=4) / 4000

    np.testing.assert_allclose(draw(1, 1), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(draw(1, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(1, 0.4), [1, 0, 0, 0])
    np.testing.assert_allclose(draw(0, 1), [1, 0, 0, 0])
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(draw(0.5, 1), squares / squares.sum(), atol=0.03)


@pytest.mark.parametrize(
    "sampling, message",
    [
        (Sampling(0), "max_new_tokens is 0"),
        (Sampling(temperature=-1.0), "temperature is -1.0"),
        (Sampling(top_p=0.0), "top_p is 0.0"),
    ],
)
def test_sampling_that_cannot_work_is_refused(generator, prompts, sampling, message):
    with pytest.raises(ConfigError, match=message):
        generator(prompts, sampling)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, finished):
    folder = tmp_path_factory.mktemp("export") / "hf"
    to_hf.convert(finished, folder)
    return folder


def cli(module: str, **arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"ov2_jax.{module}"]
    for name, value in arguments.items():
        for one in value if isinstance(value, list) else [value]:
            command.append(f"--{name.replace('_', '-')}={one}")
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_generate_takes_a_run_and_a_hugging_face_folder(finished, exported, data):
    heldout = data.parent / "heldout"
    asked = {
        "prompt": ["Which way does it move?", "What happens?"],
        "video": str(next((heldout / "motion").iterdir())),
        "image": str(next((heldout / "shape").iterdir())),
        "max_new_tokens": 5,
        "num_frames": 2,
        "dtype": "float32",
    }
    from_run, from_hf = (cli("generate", checkpoint=c, **asked) for c in (finished, exported))
    assert from_run.returncode == from_hf.returncode == 0, from_run.stderr + from_hf.stderr
    assert from_run.stdout == from_hf.stdout and len(from_run.stdout.splitlines()) >= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"checkpoint": "no/such"}, "no/such does not exist"),
        ({"image": "no/such.jpg"}, "missing_file"),
        ({"num_frames": 2, "target_fps": 1.0}, "exclude each other"),
    ],
)
def test_generate_says_what_is_wrong(finished, arguments, message):
    result = cli("generate", **{"checkpoint": str(finished), "prompt": "What is it?", **arguments})
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert message in last and "Traceback" not in result.stderr


def test_evaluate_counts_by_task_and_writes_answers(tmp_path, exported, data):
    out = tmp_path / "answers.jsonl"
    lines = (data.parent / "heldout.jsonl").read_text().splitlines()
    broken = json.dumps({**json.loads(lines[0]), "image": "missing.jpg", "task": "shape"})
    (data.parent / "with_broken.jsonl").write_text("\n".join([*lines, broken]) + "\n")
    result = cli(
        "evaluate",
        checkpoint=str(exported),
        data=str(data.parent / "with_broken.jsonl"),
        out=str(out),
        max_new_tokens=4,
        batch_size=3,
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 8 and answers[-1]["got"] is None
    assert all(a["right"] == (a["got"] == a["expected"]) for a in answers)
    right = sum(a["right"] for a in answers)
    assert f"({right} of 8)" in result.stdout.splitlines()[-1]
