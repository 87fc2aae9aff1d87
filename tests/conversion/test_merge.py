"""Building a start checkpoint from an encoder, a merger and a Qwen3."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from conversion import from_hf
from conversion.errors import ConversionError
from conversion.formats.safetensors_io import SafetensorsFolder
from conversion.keys import key_table
from conversion.merge import make_plan, write
from ov2_jax.config.hf import load_config
from ov2_jax.config.model import VisionConfig
from tests.conversion.folders import (
    BFLOAT16,
    FLOAT32,
    QWEN_SPECIAL,
    random_bits,
    tokenizer_files,
    write_weights,
)
from tests.golden_cases import GOLDEN
from tests.tiny import SMALL, SMALL_MOE

ENCODER = GOLDEN / "encoder" / "hf"
VISION = VisionConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    out_hidden_size=48,
)
MERGED = dataclasses.replace(SMALL, vision=VISION)


def arrays(folder):
    weights = SafetensorsFolder(folder)
    return {name: np.array(weights.array(name)) for name in weights.tensors}


def qwen(folder, *, of=SMALL, tied=False, dtype=BFLOAT16, special=QWEN_SPECIAL, **config):
    """A random Qwen3 folder in the transformers 4 form."""
    folder.mkdir()
    text = dataclasses.asdict(of.text)
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": tied,
        "eos_token_id": 152,
        "max_position_embeddings": 40960,
    }
    (folder / "config.json").write_text(json.dumps(raw | text | config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [152, 150]}')
    (folder / "LICENSE").write_text("Apache")
    tokenizer_files(folder, special)
    tensors = {}
    for seed, entry in enumerate(key_table(of)):
        if entry.path[0] == "decoder" and not (tied and entry.key == "lm_head.weight"):
            name = entry.key.replace("model.language_model.", "model.")
            tensors[name] = random_bits(entry.hf_shape, dtype, seed)
    write_weights(folder, tensors)
    return folder


def merger(folder, prefix):
    folder.mkdir()
    tensors = {
        prefix + entry.key.removeprefix("model.visual.merger."): random_bits(
            entry.hf_shape, BFLOAT16, seed
        )
        for seed, entry in enumerate(key_table(MERGED))
        if entry.path[0] == "merger"
    }
    write_weights(folder, tensors)
    return folder


def test_every_tensor_is_where_it_belongs(tmp_path):
    llm = qwen(tmp_path / "llm")
    adapter = merger(tmp_path / "adapter", "model.mm_projector.")
    plan = make_plan(ENCODER, llm, adapter)
    write(plan, llm, tmp_path / "out", max_shard_bytes=200_000)
    out, text = arrays(tmp_path / "out"), arrays(llm)
    vision, projector = arrays(ENCODER), arrays(adapter)
    assert {v.dtype for v in out.values()} == {BFLOAT16}  # the language model's
    assert load_config(tmp_path / "out") == MERGED_WITH_IDS

    def same(name, expected):
        assert out.pop(name).tobytes() == expected.astype(BFLOAT16).tobytes(), name

    for i in range(2):
        for kind in ("weight", "bias"):
            where = f"encoder.layers.{i}.self_attn."
            parts = [vision.pop(f"{where}{x}_proj.{kind}") for x in "qkv"]
            same(f"model.visual.{where}qkv.{kind}", np.concatenate(parts))
            same(f"model.visual.{where}proj.{kind}", vision.pop(f"{where}out_proj.{kind}"))
    for name, value in vision.items():
        if not name.startswith(("head.", "layernorm_post.")):
            same(f"model.visual.{name}", value)
    for name, value in projector.items():
        same(name.replace("model.mm_projector", "model.visual.merger"), value)
    for name, value in text.items():
        renamed = "model.language_model." + name.removeprefix("model.")
        same(renamed if name.startswith("model.") else name, value)
    assert not out
    from_hf.convert(tmp_path / "out", tmp_path / "orbax")


MERGED_WITH_IDS = dataclasses.replace(
    MERGED,
    image_token_id=155,
    video_token_id=156,
    vision_start_token_id=153,
    vision_end_token_id=154,
)


def test_the_folder_around_the_weights(tmp_path):
    llm = qwen(tmp_path / "llm")
    write(make_plan(ENCODER, llm), llm, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (llm / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == 40960
    assert config["text_config"]["eos_token_id"] == 152
    assert not config["tie_word_embeddings"] and not config["text_config"]["tie_word_embeddings"]
    assert "architectures" not in config["text_config"]
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("lmms-lab-encoder/")
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert (processor["patch_size"], processor["merge_size"]) == (14, 2)
    assert "<|image_pad|>" in (out / "chat_template.jinja").read_text()


def test_the_chat_template_is_the_references_text(tmp_path):
    llm = qwen(tmp_path / "llm")
    write(make_plan(ENCODER, llm), llm, tmp_path / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(own, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_a_tied_head_is_copied(tmp_path):
    llm = qwen(tmp_path / "llm", tied=True)
    write(make_plan(ENCODER, llm), llm, tmp_path / "out")
    out = arrays(tmp_path / "out")
    embedding = out["model.language_model.embed_tokens.weight"]
    assert out["lm_head.weight"].tobytes() == embedding.tobytes()
    assert not load_config(tmp_path / "out").tie_word_embeddings


def test_a_fresh_merger_is_seeded_noise(tmp_path):
    llm = qwen(tmp_path / "llm", dtype=FLOAT32)
    plan = make_plan(ENCODER, llm, merge_size=3)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(plan, llm, tmp_path / name, seed=seed)
        found.append({k: v for k, v in arrays(tmp_path / name).items() if "visual.merger" in k})
    a, b, c = found
    kernel = a["model.visual.merger.mlp.0.weight"]
    assert kernel.shape == (576, 576)
    assert abs(kernel.std() - 0.02) < 1e-3 and abs(kernel.mean()) < 1e-3
    assert not a["model.visual.merger.mlp.0.bias"].any()
    assert (a["model.visual.merger.ln_q.weight"] == 1).all()
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(kernel, c["model.visual.merger.mlp.0.weight"])


def test_compiled_prefix_and_rope_buffers(tmp_path):
    llm = qwen(tmp_path / "llm")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_bytes((ENCODER / "config.json").read_bytes())
    tensors = {
        k.replace("encoder.", "encoder._orig_mod.", 1): v for k, v in arrays(ENCODER).items()
    }
    tensors["video_rope.inv_freq_t"] = np.ones(4, np.float32)
    write_weights(odd, tensors)
    plan = make_plan(odd, llm)
    encoder = next(part for part in plan.parts if part.title == "encoder")
    assert "video_rope.inv_freq_t" in encoder.dropped and "head.probe" in encoder.dropped
    write(plan, llm, tmp_path / "odd_out")
    write(make_plan(ENCODER, llm), llm, tmp_path / "out")
    one, two = arrays(tmp_path / "odd_out"), arrays(tmp_path / "out")
    assert all(one[k].tobytes() == two[k].tobytes() for k in two)


def test_every_bad_key_of_every_part_is_named(tmp_path):
    llm = qwen(tmp_path / "llm")
    tensors = arrays(llm)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, BFLOAT16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:10]
    (llm / "model.safetensors").unlink()
    write_weights(llm, tensors)
    adapter = merger(tmp_path / "adapter", "model.projector.")
    with pytest.raises(ConversionError) as error:
        make_plan(ENCODER, llm, adapter)
    for part in (
        "llm: keys that are missing (1):\n  model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight: is [10, 48], must be [160, 48]",
        "merger: keys with no place in the model (6)",
        "merger: keys that are missing (6)",
    ):
        assert part in str(error.value)


def test_a_mixture_of_experts_is_merged_in_either_form(tmp_path):
    older = qwen(tmp_path / "older", of=SMALL_MOE, model_type="qwen3_moe")
    newer = qwen(tmp_path / "newer", of=SMALL_MOE, model_type="qwen3_moe")
    raw = json.loads((newer / "config.json").read_text())
    raw["num_local_experts"] = raw.pop("num_experts")
    (newer / "config.json").write_text(json.dumps(raw))
    for llm in (older, newer):
        out = tmp_path / f"{llm.name}_merged"
        write(make_plan(ENCODER, llm), llm, out)
        assert load_config(out).text == SMALL_MOE.text
        raw = json.loads((out / "config.json").read_text())
        assert raw["model_type"] == "llava_onevision2_moe"
        assert raw["auto_map"]["AutoConfig"].endswith("_moe.LlavaOnevision2MoeConfig")
        merged, text = arrays(out), arrays(llm)
        for name, value in text.items():
            renamed = name.replace("model.", "model.language_model.", 1)
            assert merged[renamed].tobytes() == value.tobytes(), name
        assert sum(".experts." in name for name in merged) == 2 * 6 * 3
    tensors = {k: v for k, v in text.items() if "experts.4.down" not in k}
    (newer / "model.safetensors").unlink()
    write_weights(newer, tensors)
    with pytest.raises(ConversionError, match=r"keys that are missing \(2\).*\n.*experts.4.down"):
        make_plan(ENCODER, newer)


def test_wrong_folders_are_refused(tmp_path):
    llm = qwen(tmp_path / "llm")
    with pytest.raises(ConversionError, match="full model already"):
        make_plan(GOLDEN / "dense_p14m2" / "hf", llm)
    with pytest.raises(ConversionError, match="model_type 'onevision_encoder'"):
        make_plan(ENCODER, ENCODER)
    older = qwen(tmp_path / "older", model_type="qwen2")
    with pytest.raises(ConversionError, match="'qwen2'; a Qwen3 is needed"):
        make_plan(ENCODER, older)
    plain = qwen(tmp_path / "plain", special=QWEN_SPECIAL[:5])
    with pytest.raises(ConversionError, match=r"lacks special tokens.*\n.*image_pad"):
        make_plan(ENCODER, plain)
    (plain / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match="no tokenizer.json"):
        make_plan(ENCODER, plain)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    llm = qwen(tmp_path / "llm")
    command = [sys.executable, "-m", "conversion.merge", f"--encoder={ENCODER}", f"--llm={llm}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}", "--dry-run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "fresh: 6 keys" in done.stdout
    assert "bfloat16" in done.stdout and "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists()
