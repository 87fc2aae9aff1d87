"""The files of configs/: they load, every field can be overridden, and mistakes are sentences."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from ov2_jax.config.build import experiment_from
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.hf import model_config_to_hf
from ov2_jax.config.sizes import model_config
from ov2_jax.config.start import with_checkpoint_model
from ov2_jax.core.checkpoint_dir import HF, PARAMS
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.images import smart_resize
from ov2_jax.data.encoding.video import FrameSampling
from ov2_jax.data.packing.placement import fits_alone
from ov2_jax.data.sample import SampleSize
from ov2_jax.sharding.mesh import MeshConfig, make_mesh
from tests.programs import PATIENCE, REPOSITORY

CONFIGS = sorted(REPOSITORY.glob("configs/*.py"))
# Model, steps, text rows of a step and their tokens, weight decay, beta2.
RECIPES = {
    "sft_4b": ("4b", 13745, 16, 10240, 0.0, 0.99),
    "instruct_8b": ("8b", 5607, 132, 32000, 0.0, 0.99),
    "midtrain_8b": ("8b", 70313, 128, 32768, 0.01, 0.95),
    "midtrain_30b_a3b": ("30b-a3b", 70313, 128, 32768, 0.01, 0.95),
    "longvideo_8b": ("8b", 10000, 32, 98304, 0.0, 0.99),
}


def load(name: str, *overrides: str) -> ConfigDict:
    """The config as `python -m ov2_jax.train` gets it; config_flags reads sys.argv by itself."""
    argv = ["train", f"--config={REPOSITORY / 'configs' / name}.py"]
    argv += [f"--config.{override}" for override in overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        values(argv)
    return values.config


def start_checkpoint(folder: Path, size: str) -> Path:
    """As much of a converted checkpoint as is looked at before its parameters are read."""
    (folder / HF).mkdir(parents=True)
    (folder / PARAMS).mkdir()
    (folder / PARAMS / "_METADATA").touch()
    config = model_config_to_hf(model_config(size))
    (folder / HF / "config.json").write_text(json.dumps(config))
    return folder


def recipe(name: str, tmp_path: Path, *overrides: str) -> Experiment:
    needed = (f"init_from={tmp_path}", "data.sources[0].path=samples.jsonl")
    return experiment_from(load(name, *needed, *overrides))


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, type]:
    found = {}
    for name in config:
        if isinstance(config[name], ConfigDict):
            found |= leaves(config[name], f"{prefix}{name}.")
        else:
            found[prefix + name] = config.get_type(name)
    return found


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_every_field_of_every_config_can_be_overridden(name):
    """All at once, through the flags; `load` without overrides shows that the file loads alone."""
    texts = {int: "3", float: "0.5", str: "text", tuple: "(7, 8)", bool: "true"}
    kinds = leaves(load(name))
    assert {"init_from", "seed", "data.num_frames", "model.text.rope_theta"} <= kinds.keys()
    config = load(name, *[f"{field}={texts[kind]}" for field, kind in kinds.items()])
    for field, kind in kinds.items():
        value = config
        for part in field.split("."):
            value = value[part]
        assert value == {int: 3, float: 0.5, str: "text", tuple: (7, 8), bool: True}[kind], field


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_docstring_has_the_command(name):
    text = (REPOSITORY / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m ov2_jax.train --config=configs/{name}.py" in text


def sizes(devices: int) -> dict[str, int]:
    """A mesh that cuts packs over so many devices; a number that divides no width goes to data."""
    fsdp = math.gcd(devices, 256)
    return MeshConfig(data=devices // fsdp, fsdp=fsdp).sizes(devices)


def test_quickstart_needs_no_override():
    experiment_from(load("quickstart")).check_mesh(MeshConfig().sizes(1), 1)


def test_recipes_are_those_of_the_public_scripts(tmp_path):
    for name, (size, *want) in RECIPES.items():
        e = recipe(name, tmp_path)
        decay, beta2 = e.optimizer.weight_decay, e.optimizer.beta2
        assert [e.steps, e.global_rows, e.pack.seq_len, decay, beta2] == want
        assert e.model == model_config(size)
        o = e.optimizer
        assert set(o.train) == {"encoder", "merger", "decoder"}
        assert (o.learning_rate, o.end_learning_rate, o.warmup_fraction) == (1e-5, 1e-6, 0.002)
        assert (o.beta1, o.eps, o.clip_norm) == (0.9, 1e-5, 1)
        assert (e.compute.dtype, e.compute.remat) == ("bfloat16", "full")


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_a_recipe_take_what_its_data_settings_let_through(name, tmp_path):
    e = recipe(name, tmp_path)
    e.pack.check(e.model)
    widths = [w for _, w in e.pack.vision_rows]
    assert all(length % 128 == 0 for length in (e.pack.seq_len, *widths))

    def patches(height: int, width: int, high: int) -> int:
        low = e.data.min_pixels
        h, w = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
        return h * w // 14**2

    # Every aspect, from far too small to far too large.
    sides = [(2**i, 2**k) for i in range(4, 14) for k in range(4, 14) if abs(i - k) < 8]
    assert max(patches(*side, e.data.max_pixels) for side in sides) <= max(widths)
    assert patches(960, 1280, e.data.max_pixels) == 6256
    frame = max(patches(*side, e.data.frame_pixels[1]) for side in [*sides, (1080, 1080)])
    assert frame == 784
    # The longest clip, as windows of 4 frames, with timestamps and a long caption.
    frames = FrameSampling(e.data.num_frames, e.data.target_fps, e.data.max_frames).count(3600)
    windows = [min(4, frames - i) * frame for i in range(0, frames, 4)]
    tokens = frames * (frame // 4 + 12) + 2000
    assert fits_alone(SampleSize(tokens, tuple(windows)), e.pack)


@pytest.mark.parametrize(
    "name, overrides, shards, grad_accums",
    [
        ("sft_4b", (), (1, 2, 4, 8, 16), (16, 8, 4, 2, 1)),
        ("instruct_8b", (), (4, 12, 22, 33, 44, 66, 132), (33, 11, 6, 4, 3, 2, 1)),
        ("instruct_8b", ("global_rows=128",), (8, 32, 64, 128), (16, 4, 2, 1)),
    ],
)
def test_meshes_that_the_docstrings_name(name, overrides, shards, grad_accums, tmp_path):
    for n, grad_accum in zip(shards, grad_accums, strict=True):
        recipe(name, tmp_path, *overrides, f"grad_accum={grad_accum}").check_mesh(sizes(n), 1)


@pytest.mark.parametrize(
    "name, chips, overrides",
    [
        ("sft_4b", 16, ()),
        ("midtrain_8b", 128, ()),
        ("midtrain_8b", 256, ("mesh.context=2",)),
        ("midtrain_30b_a3b", 128, ()),
        ("longvideo_8b", 128, ()),
        (
            "longvideo_8b",
            256,
            (
                *("mesh.context=8", "pack.seq_len=180224", "pack.vision_rows=((24, 25088),)"),
                "data.num_frames=768",
            ),
        ),
    ],
)
def test_slices_that_recipes_are_planned_for(name, chips, overrides, tmp_path):
    e = recipe(name, tmp_path, *overrides)
    e.check_mesh(e.mesh.sizes(chips), 1)
    if e.data.num_frames:  # a clip of all frames at 392 px, 12 tokens a timestamp, a long caption
        windows = (4 * 784,) * (e.data.num_frames // 4)
        tokens = e.data.num_frames * (196 + 12) + 16_000
        assert fits_alone(SampleSize(tokens, windows), e.pack)
        assert e.pack.patch_slots == sum(windows)


@pytest.mark.parametrize("name, shards", [("sft_4b", 32), ("instruct_8b", 8), ("instruct_8b", 128)])
def test_a_batch_that_the_mesh_does_not_divide_is_one_sentence(name, shards, tmp_path):
    e = recipe(name, tmp_path)
    with pytest.raises(ConfigError) as error:
        e.check_mesh(sizes(shards), 1)
    text = str(error.value)
    assert f"global_rows {e.global_rows}" in text and f"{shards} data shards" in text
    assert f"a multiple of {shards} global_rows" in text and "\n" not in text


def test_processes_that_do_not_share_the_mesh_evenly(tmp_path):
    with pytest.raises(ConfigError, match="4 data shards do not divide over 3 processes"):
        recipe("sft_4b", tmp_path, "grad_accum=4").check_mesh(sizes(4), 3)


def test_mesh_of_a_config_takes_all_devices(tmp_path):
    """The tests run on 8 fake devices."""
    e = recipe("sft_4b", tmp_path, "mesh.data=2", "grad_accum=2")
    mesh = make_mesh(e.mesh)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    e.check_mesh(mesh.shape, 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("data.sources[0].path=s.jsonl",), r"Set init_from \(a checkpoint\)"),
        (("init_from={here}",), r"path is ''; it must be a \.json, "),
        (("init_from={here}", "data.sources=()"), r"data\.sources is \(\)"),
        (("init_from={here}", "data.sources=({'file': 's.jsonl'},)"), "has no field file; it has"),
        (("init_from={here}", "data.sources=({'path': 5},)"), "is 5; it must be of type str"),
        (("data.num_frames=8",), "only one of them can rule"),
        (("data.max_pixels=100",), r"data\.max_pixels is 100; it must be at least 3136"),
        (("pack.vision_rows=((2, 8192), (4, 4096))",), "sorted by patches in a row"),
        (("pack.vision_rows=(4096, 8192)",), r"pack\.vision_rows\[0\]"),
        (("pack.rows=3",), "global_rows 16 is not a multiple of pack.rows 3"),
        (("optimizer.train=('vision',)",), "must name at least one of"),
        (("optimizer.merger_learning_rate=0",), "leave it out of optimizer.train"),
        (("loss_reduction=mean",), "loss_reduction is 'mean'"),
        (("compute.remat=half",), "remat is 'half'; it must be one of none, full"),
        (("checkpoint.keep_every=1500",), "must be a multiple of checkpoint.every"),
        (("model.text.hidden_size=100",), "must equal text_config.hidden_size 100"),
        (("workdir=",), "workdir is empty"),
        (("steps=0",), "steps is 0; it must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(overrides, message, tmp_path):
    overrides = [o.replace("{here}", str(tmp_path)) for o in overrides]
    given = " ".join(overrides)
    if "init_from" not in given and "sources" not in given:
        overrides += [f"init_from={tmp_path}", "data.sources[0].path=s.jsonl"]
    with pytest.raises(ConfigError, match=message) as error:
        experiment_from(load("sft_4b", *overrides))
    assert "\n" not in str(error.value)


def test_fields_that_a_config_file_gets_wrong():
    config = load("quickstart")
    with config.unlocked():
        config.data.frames = 3
    with pytest.raises(ConfigError, match="data has no field frames; it has "):
        experiment_from(config)
    config = load("quickstart")
    with config.unlocked(), config.ignore_type():
        config.steps = "many"
    with pytest.raises(ConfigError, match="steps is 'many'; it must be of type int"):
        experiment_from(config)
    config = load("quickstart")
    with config.unlocked():
        del config.model.text["vocab_size"]
    with pytest.raises(ConfigError, match=r"model\.text lacks vocab_size"):
        experiment_from(config)
    with pytest.raises(flags.IllegalFlagValueError, match=r"--config\.steps=many"):
        load("quickstart", "steps=many")


def test_a_checkpoint_of_another_size_is_named(tmp_path):
    four = start_checkpoint(tmp_path / "4b", "4b")
    same, notes = with_checkpoint_model(recipe("sft_4b", four), resuming=False)
    assert same == recipe("sft_4b", four) and not notes
    with pytest.raises(ConfigError, match=r"model\.text\.hidden_size is 4096, the checkpoint's"):
        with_checkpoint_model(recipe("instruct_8b", four), resuming=False)
    with pytest.raises(ConfigError, match="none', which does not exist"):
        with_checkpoint_model(recipe("sft_4b", tmp_path / "none"), resuming=False)
    differing = recipe("sft_4b", four, "model.text.rope_theta=1e6")
    used, notes = with_checkpoint_model(differing, resuming=False)
    assert used.model.text.rope_theta == 5e6
    assert notes == ["model.text.rope_theta is 5000000.0 as in the checkpoint, not 1000000.0."]


def test_command_line_says_one_sentence(tmp_path):
    """The whole program: a mistake ends it with status 1 and a line, before anything is made."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "ov2_jax.train", "--config=configs/instruct_8b.py"]
    command += [f"--config.workdir={workdir}", "--config.data.sources[0].path=s.jsonl"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and not workdir.exists()
    assert done.stderr == (
        "ConfigError: Set init_from (a checkpoint) or tokenizer (a folder), or both.\n"
    )
