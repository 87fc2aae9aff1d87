"""Hugging Face -> Orbax -> Hugging Face: bit-identical, restorable by Orbax, careful with input."""

import dataclasses
import json
import pathlib
import struct
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion import from_hf, load, to_hf
from conversion.errors import ConversionError
from conversion.formats import orbax_io, regions
from conversion.formats.hf_weights import HFWeights
from conversion.formats.safetensors_io import SafetensorsFolder, parse_shard_size
from conversion.keys import key_table, leaves
from tests.conversion.folders import (
    BFLOAT16,
    FLOAT32,
    make_folder,
    random_bits,
    raw_config,
    same_tensors,
    write_weights,
)
from tests.golden_cases import GOLDEN
from tests.tiny import SMALL, SMALL_MOE

WITH_HEAD = dataclasses.replace(SMALL.vision, use_head=True, spatial_merge_size=2)
TIED_RMS = dataclasses.replace(
    SMALL,
    tie_word_embeddings=True,
    vision=dataclasses.replace(SMALL.vision, use_head=True, layer_norm_type="rms_norm"),
)


@pytest.mark.parametrize("case", ["dense_p14m2", "dense_p16m3_tied", "moe", "encoder"])
def test_golden_folders_survive(case, tmp_path):
    from_hf.convert(GOLDEN / case / "hf", tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    same_tensors(GOLDEN / case / "hf", tmp_path / "hf")


@pytest.mark.parametrize(
    "config",
    [SMALL, TIED_RMS, SMALL_MOE, WITH_HEAD],
    ids=["full", "tied rms head", "experts", "encoder"],
)
@pytest.mark.parametrize(
    ("chunk_bytes", "block_bytes", "expected_pieces"),
    [(1000, 7000, {"strip"}), (40_000, 50_000, {"layers", "layer"})],
)
def test_any_bits_in_mixed_dtypes_survive(
    config, chunk_bytes, block_bytes, expected_pieces, tmp_path, monkeypatch
):
    monkeypatch.setattr(regions, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(regions, "BLOCK_BYTES", block_bytes)

    def dtype(key):
        if "proj" in key:
            return BFLOAT16
        return np.dtype(np.float16) if "norm" in key else FLOAT32

    hf = make_folder(tmp_path / "hf", config, dtype, max_shard_bytes=100_000)
    assert (hf / "model.safetensors.index.json").exists()
    from_hf.convert(hf, tmp_path / "orbax")
    to_hf.convert(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=70_000)
    same_tensors(hf, tmp_path / "back")
    arrays = orbax_io.open_params(tmp_path / "orbax" / "params", leaves(config))
    pieces = set()
    for path, array in arrays.items():
        if "layers" in path and path[-1] == "kernel":
            chunk = array.chunk_layout.read_chunk.shape
            whole = chunk[1:] == array.shape[1:]
            pieces.add("layers" if chunk[0] > 1 else "layer" if whole else "strip")
    assert expected_pieces <= pieces


def test_zeros_and_negative_zeros_are_stored(tmp_path):
    # A chunk of zeros is left out by default, and Orbax would take it for lost.
    hf = make_folder(tmp_path / "hf", SMALL)
    tensors = {e.key: np.zeros(e.hf_shape, FLOAT32) for e in key_table(SMALL)}
    tensors["model.visual.layernorm_pre.bias"] -= 0.0
    tensors["model.visual.layernorm_pre.weight"] *= -1.0
    (hf / "model.safetensors").unlink()
    write_weights(hf, tensors)
    from_hf.convert(hf, tmp_path / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax" / "params")
    assert np.signbit(restored["encoder"]["layernorm_pre"]["scale"]).all()
    to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    same_tensors(hf, tmp_path / "back")


def test_orbax_restores_it_onto_a_mesh_in_another_dtype(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL, lambda key: BFLOAT16)
    from_hf.convert(hf, tmp_path / "orbax")
    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))

    def target(leaf):
        # Any axis that the devices divide: restoring must not depend on how it was chunked.
        axes = [i for i, n in enumerate(leaf.shape) if n % mesh.size == 0]
        spec = [None] * len(leaf.shape)
        if axes:
            spec[axes[-1]] = "fsdp"
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=sharding)

    table = leaves(SMALL)
    targets = unflatten_dict({path: target(leaf) for path, leaf in table.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten_dict(checkpointer.restore(tmp_path / "orbax" / "params", targets))
    weights = HFWeights(hf)
    for path, leaf in table.items():
        assert restored[path].sharding == target(leaf).sharding
        expected = weights.read(path).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(restored[path]), expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # signalling NaNs among the random bits
@pytest.mark.parametrize("chunk_bytes", [None, 5000])
def test_a_training_checkpoint_exports(chunk_bytes, tmp_path):
    hf = make_folder(tmp_path / "start", SMALL, lambda key: BFLOAT16)
    _, params = load.load_hf_params(hf, dtype="float32", sharding=_one_device())
    work = tmp_path / "work"
    (work / "hf").mkdir(parents=True)
    (work / "hf" / "config.json").write_text(json.dumps(raw_config(SMALL)))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), params)
    with ocp.CheckpointManager(work / "checkpoints") as manager:
        for step in (3, 12):
            tree = jax.tree.map(lambda x, s=step: x if s == 12 else 0 * x, params)
            manager.save(
                step, args=ocp.args.Composite(params=ocp.args.PyTreeSave(tree, save_args=save_args))
            )
    to_hf.convert(work, tmp_path / "latest", dtype="bfloat16")
    values, back = SafetensorsFolder(hf), SafetensorsFolder(tmp_path / "latest")
    for name in values.tensors:  # NaNs may lose their payload on the way through float32
        np.testing.assert_array_equal(
            values.array(name).astype(np.float32), back.array(name).astype(np.float32)
        )
    config = json.loads((tmp_path / "latest" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    to_hf.convert(work / "checkpoints" / "3", tmp_path / "third")
    third = SafetensorsFolder(tmp_path / "third")
    assert {t.dtype.name for t in third.tensors.values()} == {"float32"}
    assert not np.nan_to_num(third.array("lm_head.weight")).any()


def _one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_loading_gives_the_same_numbers_as_converting(tmp_path):
    hf = GOLDEN / "dense_p14m2" / "hf"
    config, params = load.load_hf_params(hf, dtype="bfloat16")
    assert jax.tree.structure(params) == jax.tree.structure(load.param_shapes(config))
    from_hf.convert(hf, tmp_path / "orbax", dtype="bfloat16")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax" / "params")
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    per_leaf = jax.tree.map(lambda _: whole, params)
    for sharding in (whole, per_leaf):
        _, sharded = load.load_hf_params(hf, dtype="bfloat16", sharding=sharding)
        jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, sharded))


# --- side files -----------------------------------------------------------------------------------


def test_side_files_travel_and_weights_do_not(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL, max_shard_bytes=100_000)
    config = raw_config(SMALL) | {
        "auto_map": {
            "AutoConfig": "configuration_llava_onevision2.LlavaOnevision2Config",
            "AutoModelForCausalLM": "own.Model",
        }
    }
    (hf / "config.json").write_text(json.dumps(config))
    sides = {
        "generation_config.json": '{"do_sample": true}',
        "preprocessor_config.json": '{"patch_size": 14}',
        "own.py": "class Model: pass",
        "LICENSE": "free",
        "chat_template.jinja": "<|image_pad|>",
    }
    for name, text in sides.items():
        (hf / name).write_text(text)
    (hf / "trainer_state.json").write_text("{}")
    from_hf.convert(hf, tmp_path / "orbax")
    made = to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    assert made == ["config.json"]
    for name, text in sides.items():
        assert (tmp_path / "back" / name).read_text() == text
    names = {p.name for p in (tmp_path / "back").iterdir()}
    assert names == {*sides, "config.json", "model.safetensors"}
    auto_map = json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "own.Model"  # its code is there
    released = "lmms-lab-encoder/LLaVA-OneVision-2-8B-Instruct--"
    for name in ("AutoConfig", "AutoModelForImageTextToText"):
        assert auto_map[name].startswith(released)


def test_template_replaces_the_checkpoints_side_files(tmp_path):
    from_hf.convert(make_folder(tmp_path / "hf", SMALL), tmp_path / "orbax")
    template = make_folder(tmp_path / "template", SMALL)
    (template / "own.py").write_text("x = 1")
    to_hf.convert(tmp_path / "orbax", tmp_path / "back", template=template)
    assert (tmp_path / "back" / "own.py").exists()
    same_tensors(tmp_path / "hf", tmp_path / "back")
    text = dataclasses.replace(SMALL.text, vocab_size=161)
    wrong = make_folder(tmp_path / "wrong", dataclasses.replace(SMALL, text=text))
    with pytest.raises(ConversionError, match=r"decoder.lm_head.kernel: is \[48, 160\]"):
        to_hf.convert(tmp_path / "orbax", tmp_path / "no", template=wrong)
    assert not (tmp_path / "no").exists()


# --- bad input ------------------------------------------------------------------------------------


def test_every_bad_key_is_listed_and_nothing_is_written(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL)
    tensors = {k: np.array(v) for k, v in _arrays(hf).items()}
    tensors["model.visual.extra.weight"] = np.zeros(3, FLOAT32)
    del tensors["model.language_model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    tensors["model.visual.layernorm_pre.bias"] = np.zeros(64, np.int32)
    (hf / "model.safetensors").unlink()
    write_weights(hf, tensors)
    with pytest.raises(ConversionError) as error:
        from_hf.convert(hf, tmp_path / "orbax")
    for part in (
        "model.visual.extra.weight",
        "model.language_model.norm.weight",
        "lm_head.weight: is [48, 160], must be [160, 48]",
        "model.visual.layernorm_pre.bias: is int32",
    ):
        assert part in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def _arrays(folder):
    weights = SafetensorsFolder(folder)
    return {name: weights.array(name) for name in weights.tensors}


def test_a_tied_checkpoint_with_a_head_says_why(tmp_path):
    tensors = _arrays(make_folder(tmp_path / "untied", SMALL))
    hf = tmp_path / "hf"
    hf.mkdir()
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    (hf / "config.json").write_text(json.dumps(raw_config(tied)))
    write_weights(hf, tensors)
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        from_hf.convert(hf, tmp_path / "orbax")


def test_layers_of_different_dtypes_need_a_choice(tmp_path):
    hf = make_folder(
        tmp_path / "hf", SMALL, lambda key: BFLOAT16 if "layers.1.mlp.up" in key else FLOAT32
    )
    with pytest.raises(ConversionError, match=r"decoder.layers.mlp.up_proj.kernel: bfloat16, fl"):
        from_hf.convert(hf, tmp_path / "orbax")
    from_hf.convert(hf, tmp_path / "orbax", dtype="float32")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def _lie(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[48]', b'"shape":[47]', 1))


def _no_json(path):
    path.write_bytes(struct.pack("<Q", 4) + b"oops")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is cut off"),
        (_lfs, "LFS"),
        (_lie, "damaged"),
        (_no_json, "malformed"),
        (lambda p: p.unlink(), "no \\*.safetensors"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL)
    damage(hf / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        from_hf.convert(hf, tmp_path / "orbax")


def test_an_index_must_agree_with_its_files(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL, max_shard_bytes=100_000)
    index = hf / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = raw["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(raw))
    with pytest.raises(ConversionError, match="disagrees.*\n.*lm_head"):
        from_hf.convert(hf, tmp_path / "orbax")
    raw["weight_map"]["lm_head.weight"] = first
    index.write_text(json.dumps(raw))
    (hf / first).unlink()
    with pytest.raises(ConversionError, match=f"not there.*\n.*{first}"):
        from_hf.convert(hf, tmp_path / "orbax")


def test_an_existing_destination_is_left_alone(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("precious")
    with pytest.raises(ConversionError, match="already exists"):
        from_hf.convert(hf, tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConversionError, match="remote"):
        from_hf.convert(hf, "gs://bucket/dir")


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    hf = make_folder(tmp_path / "hf", SMALL)
    read = HFWeights.read

    def broken(self, path, region=None):
        if path[-2:] == ("lm_head", "kernel"):
            raise OSError("disk trouble")
        return read(self, path, region)

    monkeypatch.setattr(HFWeights, "read", broken)
    with pytest.raises(OSError, match="disk trouble"):
        from_hf.convert(hf, tmp_path / "orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def _command(module, *arguments):
    command = [sys.executable, "-m", f"conversion.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_there_and_back_by_the_command_line(tmp_path):
    hf = make_folder(tmp_path / "hf", SMALL, lambda key: BFLOAT16)
    done = _command("from_hf", f"--src={hf}", f"--dst={tmp_path / 'orbax'}")
    assert done.returncode == 0, done.stderr
    there = [f"--src={tmp_path / 'orbax'}", f"--dst={tmp_path / 'back'}"]
    done = _command("to_hf", *there, "--max-shard-size=100KB")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "Written or completed here: config.json, preprocessor_config.json.\n"
        f"{tmp_path / 'back'} is ready for transformers' from_pretrained.\n"
    )
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    same_tensors(hf, tmp_path / "back")


def test_an_error_is_one_sentence_and_status_1(tmp_path):
    done = _command("from_hf", f"--src={GOLDEN}", f"--dst={tmp_path / 'b'}")
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: ") and "Traceback" not in done.stderr
    there = [f"--src={tmp_path}", f"--dst={tmp_path / 'b'}"]
    done = _command("to_hf", *there, "--max-shard-size=5XB")
    assert done.returncode == 1
    assert done.stderr == (
        "ConversionError: --max-shard-size is '5XB'; it must be a size such as 5GB or 512MiB.\n"
    )


def test_help_is_the_docstring():
    done = _command("from_hf", "--help")
    assert to_lines(from_hf.__doc__) <= to_lines(done.stdout)
    assert "--dst" in done.stdout and "bfloat16" in done.stdout


def to_lines(text):
    return {line.strip() for line in text.splitlines()}


def test_shard_sizes():
    given = {"5GB": 5e9, "512MiB": 2**29, "1.5 kb": 1500, "700": 700, ".5GiB": 2**29}
    assert {text: parse_shard_size(text) for text in given} == given
    for wrong in ("", "GB", "-5GB", "0", "0.1", "1e9", "5GB5", "5TB"):
        with pytest.raises(ConversionError, match="such as 5GB or 512MiB"):
            parse_shard_size(wrong)


# --- memory ---------------------------------------------------------------------------------------


def _anonymous_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    # 240 MB of weights, of which one stacked array is 67 MB, in blocks of 2 MB.
    monkeypatch.setattr(regions, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(regions, "BLOCK_BYTES", 2**21)
    text = dataclasses.replace(
        SMALL.text, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8
    )
    vision = dataclasses.replace(SMALL.vision, out_hidden_size=1024)
    config = dataclasses.replace(SMALL, text=text, vision=vision)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(raw_config(config)))
    noise = random_bits((4096 * 1024,), BFLOAT16, 0)
    write_weights(
        hf,
        {e.key: np.resize(noise, e.hf_shape) for e in key_table(config)},
        max_shard_bytes=100_000_000,
    )
    size = SafetensorsFolder(hf).nbytes
    assert size > 200e6

    peak, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], _anonymous_bytes())
            time.sleep(0.005)

    from_hf.convert(GOLDEN / "encoder" / "hf", tmp_path / "warm")  # libraries' own memory
    watcher = threading.Thread(target=watch)
    before = _anonymous_bytes()
    watcher.start()
    try:
        from_hf.convert(hf, tmp_path / "orbax")
        to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    finally:
        stop.set()
        watcher.join()
    grown = peak[0] - before
    assert 0 < grown < size / 2, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    same_tensors(hf, tmp_path / "back")
