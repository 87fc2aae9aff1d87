"""The planner: what a recipe needs, the report, and the program with its errors."""

import dataclasses
import html.parser
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.accelerators import parse_accelerator
from launch.errors import LaunchError
from launch.planner import hlo, libtpu, measure, memory, search, show, work
from launch.planner.chips import CHIPS
from launch.planner.command import parse_slice
from launch.planner.compiling import CompileError, run_in_process, shared_arguments
from launch.planner.experiment import experiment_to_plan
from launch.planner.report import report
from ov2_jax.sharding.mesh import make_mesh
from ov2_jax.training.monitoring.flops import train_flops
from ov2_jax.training.program import abstract_batch, lower_train_step
from ov2_jax.training.start import abstract_train_state
from tests.programs import PATIENCE, REPOSITORY
from tests.tiny import config_of

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def small(**changes):
    return experiment_to_plan(config_of(Path("run"), Path("none.jsonl"), **changes))


def test_a_plan_needs_no_data_and_no_checkpoint():
    config = config_of(Path("run"), Path("x.jsonl"))
    with config.unlocked(), config.ignore_type():
        config.workdir, config.tokenizer, config.data.sources = "", None, ({"path": ""},)
    assert experiment_to_plan(config).steps == small().steps
    assert config.data.sources == ({"path": ""},)  # the caller's config does not change


def test_filling_follows_the_config_and_the_flags():
    e = small()  # 6 frames of at most 8 x 28 x 28 pixels: 32 patches, windows of 4 frames
    frame = e.data.max_pixels // 14**2
    frame = max(n for n in range(frame + 1) if int(n**0.5) ** 2 == n and int(n**0.5) % 2 == 0)
    fill = work.filling(e, sample=None, window=None)
    assert (fill.window, fill.clip) == (4 * frame, 6 * frame)
    assert fill.sample == e.pack.seq_len  # a clip and its text are longer than a row here
    fill = work.filling(e, sample=50, window=20)
    assert fill.samples(128) == [50, 50, 28] and fill.windows(64) == [20, 20, 20, 4]
    assert fill.windows(20) == [20]


def test_model_flops_are_those_of_the_formula():
    for train in (("encoder", "merger", "decoder"), ("merger",), ("decoder",)):
        e = small(**{"optimizer.train": train})
        fill = work.filling(e, sample=50, window=20)
        step = work.step_work(e, fill)
        assert step.tokens == 8 * 128 and step.patches == 8 * 3 * 64
        assert step.squared_samples == 8 * (2 * 50**2 + 28**2)
        assert step.squared_windows == 8 * 3 * (3 * 20**2 + 4**2)
        model = work.model_flops(e, step)
        assert np.isclose(model.total, train_flops(e.model, step, train))


def test_blocks_that_attention_visits():
    assert work.row_blocks([1024], 512, causal=False) == 4
    assert work.row_blocks([1024], 512, causal=True) == 3
    assert work.row_blocks([512, 512], 512, causal=True) == 2
    assert work.row_blocks([700, 324], 512, causal=False) == 4  # the border lies within a block
    assert work.row_blocks([700], 512, causal=False) == 4  # padded to whole blocks
    one = work.kernel_flops(1, 512, 512, 16 * 64, work.FORWARD_MATMULS)
    assert one == 2 * 2 * 512 * 512 * 16 * 64


def test_kernels_at_whole_blocks_cost_what_the_windows_need():
    def cost(remat, **filling):
        e = small(**{"pack.vision_rows": ((2, 1024),), "pack.seq_len": 512, "compute.remat": remat})
        fill = work.Filling(**filling, clip=512)
        model = work.model_flops(e, work.step_work(e, fill)).attention
        kernels = work.attention_kernel_flops(e, fill)
        return {part: kernels[part] / model[part] for part in model}

    whole = {"sample": 512, "window": 512}
    # Forward 2 matmuls of 2, backward 7 where the formula has 4; causal: the block is not halved.
    for remat, matmuls in (("attention", 9), ("none", 9), ("full", 11), ("up", 11)):
        found = cost(remat, **whole)
        assert np.isclose(found["encoder"], matmuls / 6)
        assert np.isclose(found["decoder"], 2 * matmuls / 6)
    # A window of 3 x 256 and one of 256 share blocks of 512: 2 x 2 blocks are visited. These are 16
    # squares of 256, and the windows need 3^2 + 1.
    assert np.isclose(cost("none", sample=512, window=768)["encoder"], 16 / 10 * 9 / 6)


def test_the_least_bytes_of_weights():
    e = small()
    mesh = make_mesh(dataclasses.replace(e.mesh, data=2, fsdp=4))
    params = abstract_train_state(e, mesh).params
    found = work.least_weight_bytes(e, params, dict(mesh.shape))
    cut = whole = 0
    for leaf in jax.tree.leaves(params):
        if any(leaf.sharding.spec):
            cut += leaf.size
        else:
            whole += leaf.size
    assert found["all-gather"] == 2 * cut * 2 * 3 / 4
    assert found["reduce-scatter"] == cut * 2 * 3 / 4
    assert np.isclose(found["all-reduce"], 2 * (cut / 4) * 2 / 2 + 2 * whole * 2 * 7 / 8)
    frozen = small(**{"optimizer.train": ("merger",)})
    less = work.least_weight_bytes(frozen, params, dict(mesh.shape))
    encoder = sum(
        leaf.size for leaf in jax.tree.leaves(params["encoder"]) if any(leaf.sharding.spec)
    )
    assert less["all-gather"] == found["all-gather"] - encoder * 2 * 3 / 4  # no gradient comes here
    assert 0 < less["reduce-scatter"] < found["reduce-scatter"] / 2


@pytest.fixture(scope="module")
def plan():
    """Of a real train step, compiled for the 8 fake devices."""
    e = small()
    mesh = make_mesh(e.mesh)
    program = lower_train_step(e, mesh).compile()
    compiled = measure.Compiled(program.as_text(), program.memory_analysis(), None, 1.5)
    state, batch = abstract_train_state(e, mesh), abstract_batch(e, mesh)
    held = memory.Allocations(
        0, 0, 0, [memory.Buffer(2**20, "f32[4,8]", "gradients", "<dot & co>")]
    )
    module = hlo.parse(compiled.text)
    measured = {
        "topology": "v6e:2x4",
        "trace_seconds": 0.5,
        "compile_seconds": compiled.seconds,
        "memory": measure.memory_of(compiled, held, state, batch, CHIPS["v6e"].usable_bytes),
        **measure.count_module(e, module, dict(mesh.shape), state.params, sample=64, window=32),
    }
    return report(measured, "small", "python -m launch.plan <it>") | {"search": [], "libtpu": "1"}


def test_report_of_a_real_step(plan):
    assert plan["chips"] == 8 and plan["memory"]["fits"]
    state = small()
    assert plan["memory"]["kinds"]["moments"] > plan["memory"]["kinds"]["parameters"] > 0
    # On a CPU attention loops over as many blocks as the data has; every other loop is counted.
    assert all("trip count of the loop" in note for note in plan["notes"])
    assert 1 < plan["ratios"]["matmuls"]["ratio"] < 1.3
    assert not plan["attention_kernels"]
    assert plan["ratios"]["weights"]["ratio"] > 0.9
    first, second, ceiling = plan["throughput"]
    assert first["mfu"] == 0.4 and np.isclose(first["days"] / second["days"], 5 / 4)
    assert np.isclose(ceiling["step_seconds"], max(plan["bounds"].values()))
    assert np.isclose(second["tokens_per_second"] * second["step_seconds"], 8 * 128)
    assert np.isclose(first["days"] * 86400, state.steps * first["step_seconds"])


def test_more_memory_than_there_is_does_not_fit(plan):
    plan = plan | {"memory": plan["memory"] | {"fits": False, "reason": "out of <memory>"}}
    assert show.verdict(plan).startswith("does not fit: buffers ")
    assert "out of &lt;memory&gt;" in show.html(plan)


class _Page(html.parser.HTMLParser):
    """Raises if tags do not close in order."""

    void = {"meta", "link", "br", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_files_of_a_plan(plan, tmp_path, capsys):
    row = {"mesh": {"fsdp": 8}, "remat": "full", "fits": True, "gib": 1.0, "step_seconds": 0.5}
    failed = {"mesh": {"fsdp": 4}, "remat": "none", "fits": False, "error": "it <broke>"}
    plan = plan | {"search": [row | {"error": None}, failed]}
    paths = show.write(plan, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == ["plan.html", "plan.json"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(plan))
    text = paths[1].read_text()
    page = _Page()
    page.feed(text)
    assert not page.open and page.links == ["data:,"] and page.seen.count("table") >= 5
    assert "it &lt;broke&gt;" in text and "&lt;dot &amp; co&gt;" in text and "<it>" not in text
    show.print_plan(plan)
    printed = capsys.readouterr().out
    assert "fits: buffers " in printed and "MFU at most" in printed and "it <broke>" in printed


def test_every_number_of_the_table_of_chips_is_a_chip_that_can_be_named():
    assert {
        parse_accelerator(f"{name}:4x4x4" if name == "v5p" else f"{name}:4x4").version
        for name in CHIPS
    } == {"v5e", "v5p", "v6e"}
    assert all(chip.usable_bytes <= chip.hbm_bytes for chip in CHIPS.values())


def test_candidates_of_a_search():
    e = small(global_rows=16)
    tpu = parse_accelerator("v6e:2x4")
    tried, more = search.candidates(e, tpu, 100)
    assert not more and len({str(c) for c in tried}) == len(tried)
    assert all(np.prod(list(c.mesh.values())) == 8 for c in tried)
    assert tried[0].remat == "full" and tried[0].mesh["fsdp"] == 8
    assert "--config.mesh.fsdp=8" in tried[0].arguments()
    assert search.candidates(e, tpu, 1) == (tried[:1], len(tried) - 1)
    with pytest.raises(LaunchError, match="no mesh of 8 chips divides global_rows 1"):
        search.candidates(small(global_rows=1, **{"grad_accum": 1}), tpu, 5)


def test_ranks_of_a_search():
    fits = {"error": None, "fits": True, "gib": 3.0}
    rows = [
        {"error": "broken", "fits": False},
        {"error": None, "fits": False, "gib": 40.0},
        fits | {"step_seconds": 2.0},
        {"error": None, "fits": False, "gib": 35.0},
        fits | {"step_seconds": 1.0},
    ]
    assert search.rank(rows) == [rows[4], rows[2], rows[3], rows[1], rows[0]]


def test_environment_of_the_compiling_process():
    tpu = parse_accelerator("v6e:2x4")
    base = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "HOME": "/h"}
    env = libtpu.compile_environment(tpu, base)
    assert env["JAX_PLATFORMS"] == "cpu" and env["HOME"] == "/h" and "XLA_FLAGS" not in env
    assert "scoped_vmem_limit" in env["LIBTPU_INIT_ARGS"]  # as a run has it
    libtpu.use_cpu_only(base)
    assert base["JAX_PLATFORMS"] == "cpu"


def test_the_planner_imports_no_transformers():
    """Its import takes seconds, and a plan needs no tokenizer."""
    code = "import sys, launch.planner.command, launch.planner.measure; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "transformers" not in done.stdout.decode().split()


def test_arguments_that_the_compiling_process_gets():
    given = ["--config=c.py", "--out", "dir", "--search", "--topology=v6e:2x4", "--candidates=3"]
    given += ["--config.steps=3", "--out=dir", "--noseearch"]
    assert shared_arguments(given) == [
        *("--config=c.py", "--topology=v6e:2x4", "--config.steps=3", "--noseearch")
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("v7x:2x2", r"accelerator is 'v7x:2x2'; it must be one of the GPUs"),
        ("v5p:3x4x4", r"v5p comes as 2x2x1"),
        ("h100", r"'h100', a GPU; the compiler for GPUs needs one"),
        ("2xv5p:4x4x4", "several slices cannot be planned"),
        ("v5p:4x4x4,v5p:4x4x4", "several slices cannot be planned"),
    ],
)
def test_topologies_that_cannot_be_planned(text, message):
    with pytest.raises(LaunchError, match=message) as error:
        parse_slice(text)
    assert "\n" not in str(error.value)


def test_a_compiling_process_that_dies_is_one_sentence():
    tpu = parse_accelerator("v6e:2x4")
    with pytest.raises(CompileError, match=r"The compiling process ended with 1: .*unknown") as e:
        run_in_process(tpu, ["--config=configs/quickstart.py", "--topology=v6e:2x4", "--unknown"])
    assert "\n" not in str(e.value)


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.plan", "--config=configs/quickstart.py", *arguments]
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--topology=v9:2x2",), "LaunchError: accelerator is 'v9:2x2'; it must be one of "),
        (("--topology=v6e:2x4",), "ConfigError: global_rows 8 makes 1 packs of pack.rows 8, "),
        (("--topology=v6e:2x4", "--config.mesh.fsdp=3"), "ConfigError: mesh {"),
    ],
)
def test_command_line_says_one_sentence(arguments, message):
    done = program(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_a_missing_libtpu_is_one_sentence():
    done = program("--topology=v6e:2x4", "--config.global_rows=64")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("LaunchError: libtpu") and libtpu.INSTALL in done.stderr


@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu here: pip install 'ov2_jax[plan]'")
def test_a_plan_for_a_tpu(tmp_path):
    arguments = ["--config.global_rows=64", "--config.model.vision.num_hidden_layers=1"]
    arguments += ["--config.model.text.num_hidden_layers=2", f"--out={tmp_path}"]
    done = program("--topology=v6e:2x4", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["memory"]["fits"] and found["chips"] == 8 and not found["notes"]
    # Without remat each matmul of the formula is there once, but for the gradient of the pixels.
    matmuls, pixels = found["ratios"]["matmuls"], found["work"]["step"]["patches"] * 3 * 14**2
    assert matmuls["done"] == pytest.approx(matmuls["needed"] - 2 * 128 * pixels, rel=1e-6)
    assert found["collectives"]["total"] > 0 and f"{tmp_path}/plan.html" in done.stdout


@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu here: pip install 'ov2_jax[plan]'")
def test_what_does_not_fit_is_told_with_its_memory(tmp_path):
    """The compiler refuses the program; its dump still lists the buffers."""
    arguments = ["--config.global_rows=64", "--config.model.vision.num_hidden_layers=1"]
    arguments += ["--config.model.text.num_hidden_layers=1", f"--out={tmp_path}"]
    arguments += ["--config.pack.vision_rows=((1600, 4096),)"]
    done = program("--topology=v5e:2x4", *arguments)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert done.returncode == 1 and "does not fit" in done.stdout
    assert (
        found["memory"]["buffers"] > 16e9 and "exceeds available HBM" in found["memory"]["reason"]
    )
