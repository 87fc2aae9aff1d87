"""What the launchers make of a job: the JobSet and the scripts, and how these behave."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import gke, slurm, tpu_vm
from launch.accelerators import parse_accelerator
from launch.errors import LaunchError
from launch.platforms.job import Gke, Job, Mount, Slurm, TpuVm, load_job
from ov2_jax.core.exit_codes import BROKEN, INTERRUPTED
from tests.programs import PATIENCE, REPOSITORY

ODD = '/it\'s $(touch pwned) `x` "q" ${HOME}; && |'  # a path that an unquoted shell would run
TPU = Job(
    name="long-video",
    config="configs/instruct_8b.py",
    workdir="/bucket" + ODD,
    accelerator="v5p:4x4x8",
    slices=2,
    image="docker.pkg.dev/p/train/ov2:tpu",
    overrides={"data.sources": ({"path": "/bucket/$(id).jsonl"},), "steps": 7},
    environment={"TPU_STDERR_LOG_LEVEL": None, "NOTE": "a 'b' $(c)"},
    restarts=5,
    grace_seconds=240,
    mounts=(Mount("gs://my-bucket/ov2", "/bucket"), Mount("pvc:media", "/media", read_only=True)),
    gke=Gke(namespace="train", service_account="trainer", queue="tpus", spot=True),
)
VM = dataclasses.replace(
    TPU,
    slices=1,
    mounts=TPU.mounts[:1],
    tpu_vm=TpuVm(zone="us-east5-a", project="my-project", spot=True),
)
GPU = Job(
    name="sft",
    config="configs/sft_4b.py",
    workdir="/shared" + ODD,
    accelerator="h100",
    nodes=4,
    overrides={"data.sources": ({"path": "/shared/$(id).jsonl"},)},
    restarts=2,
    slurm=Slurm(hours=1.5, partition="gpu", options=("--exclusive",), setup=""),
)


def tools(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH has only these programs and a few that scripts need."""
    folder.mkdir()
    for name in {"bash", "sleep", "grep", "cut", "cat"} - set(programs):
        (folder / name).symlink_to(shutil.which(name))
    for name, text in programs.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": str(folder)}


def module(name: str, *arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"launch.{name}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)


# --- GKE ------------------------------------------------------------------------------------------


def test_gke_tpu():
    jobset = yaml.safe_load(gke.text(TPU))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    meta = jobset["metadata"]
    assert (meta["name"], meta["namespace"]) == ("long-video", "train")
    assert meta["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    exclusive = meta["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert [r["action"] for r in policy["rules"]] == ["FailJobSet"]
    (workers,) = jobset["spec"]["replicatedJobs"]
    assert workers["replicas"] == 2
    job = workers["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4 * 4 * 8 // 4
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert not {INTERRUPTED, BROKEN, 137, 143} & set(rule["onExitCodes"]["values"])
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 240
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env["JAX_PLATFORMS"] == "tpu,cpu" and "--xla_tpu" in env["LIBTPU_INIT_ARGS"]
    assert "TPU_STDERR_LOG_LEVEL" not in env and "JAX_PROCESS_ID" not in env
    volumes = {v["name"]: v for v in pod["volumes"]}
    places = {m["mountPath"]: m for m in container["volumeMounts"]}
    csi = volumes[places["/bucket"]["name"]]["csi"]
    assert csi["driver"] == "gcsfuse.csi.storage.gke.io"
    assert csi["volumeAttributes"]["bucketName"] == "my-bucket"
    assert "only-dir=ov2" in csi["volumeAttributes"]["mountOptions"]
    media = volumes[places["/media"]["name"]]["persistentVolumeClaim"]
    assert media == {"claimName": "media", "readOnly": True} and places["/media"]["readOnly"]


def kubernetes_expands(text: str, variables: dict[str, str]) -> str:
    """Kubernetes' rule for commands and values: $$ is a $, $(NAME) a variable that is known."""
    out, i = "", 0
    while i < len(text):
        if text[i : i + 2] == "$$":
            out, i = out + "$", i + 2
        elif text[i : i + 2] == "$(" and (name := text[i + 2 :].split(")")[0]) in variables:
            out, i = out + variables[name], i + len(name) + 3
        else:
            out, i = out + text[i], i + 1
    return out


def test_gke_takes_nothing_for_a_variable():
    job = dataclasses.replace(TPU, workdir="/bucket/$(NOTE)/$$(NOTE)$")
    pod = gke.manifest(job)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    seen = [kubernetes_expands(word, {"NOTE": "!", "id": "!"}) for word in container["command"]]
    assert seen == job.command() and seen[-1] == "--config.distributed"
    values = {e["name"]: kubernetes_expands(e["value"], {"c": "!"}) for e in container["env"]}
    assert values["NOTE"] == "a 'b' $(c)"


def test_gke_gpu():
    job = dataclasses.replace(
        GPU, image="registry/ov2:cuda", mounts=(Mount("pvc:shared", "/shared"),)
    )
    jobset = yaml.safe_load(gke.text(job))
    (workers,) = jobset["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert workers["replicas"] == 1 and spec["completions"] == spec["parallelism"] == 4
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == "sft-workers-0-0.sft:55527"
    assert env["JAX_NUM_PROCESSES"] == "4"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]
    assert "exclusive" not in str(jobset["metadata"])


def test_one_host_is_not_distributed():
    job = dataclasses.replace(TPU, accelerator="v6e:2x2", slices=1)
    spec = gke.manifest(job)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["completions"] == 1
    command = spec["template"]["spec"]["containers"][0]["command"]
    assert "--config.distributed" not in command


# --- shell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [slurm.script(GPU), tpu_vm.script(VM)], ids=["slurm", "tpu_vm"])
def test_shell_is_shell(script, tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(script)
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr
    if shutil.which("shellcheck"):
        result = subprocess.run(
            ["shellcheck", "--severity=warning", path], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout


def test_slurm_options():
    lines = slurm.script(GPU).splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [x.removeprefix("#SBATCH ") for x in lines if x.startswith("#SBATCH ")]
    want = "--job-name=sft --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=90"
    want += " --signal=TERM@300 --requeue --open-mode=append --partition=gpu --exclusive"
    assert set(want.split()) <= set(options)
    image = dataclasses.replace(GPU, image="r/i:t", mounts=(Mount("/a", "/b", read_only=True),))
    assert "--container-image=r/i:t --container-mounts=/a:/b:ro" in slurm.script(image)


_SRUN = """
printf '%s\\0' "$@" >srun.arguments
printf '%s' "$NOTE" >note
trap 'exit {status}' TERM
echo started >&2
{what}
exit {status}
"""


@pytest.mark.parametrize(
    "status, starts, again",
    [(0, 0, False), (1, 0, False), (INTERRUPTED, 0, True), (INTERRUPTED, 2, False)]
    + [(BROKEN, 1, True), (137, 0, True)],
)
def test_slurm_requeues_what_a_restart_helps(tmp_path, status, starts, again):
    env = tools(
        tmp_path / "bin",
        srun=_SRUN.format(status=status, what=""),
        scontrol='echo "$@" >requeued',
    )
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    env |= {"SLURM_RESTART_COUNT": str(starts)}
    job = dataclasses.replace(GPU, environment={"NOTE": ODD})
    result = subprocess.run(["bash", "-c", slurm.script(job)], env=env, cwd=tmp_path)
    assert result.returncode == status
    assert (tmp_path / "requeued").exists() is again
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    words = (tmp_path / "srun.arguments").read_text().split("\0")[:-1]
    assert words[words.index("python") :] == job.command()
    assert (tmp_path / "note").read_text() == ODD and not (tmp_path / "pwned").exists()


def test_slurm_script_outlasts_a_signal(tmp_path):
    """It gets SIGTERM while the training saves, and still requeues itself."""
    env = tools(
        tmp_path / "bin",
        srun=_SRUN.format(status=INTERRUPTED, what="until [ -e signalled ]; do sleep 0.05; done"),
        scontrol='echo "$@" >requeued',
    )
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    command = ["bash", "-c", slurm.script(GPU)]
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "started\n"
    process.terminate()
    (tmp_path / "signalled").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED and (tmp_path / "requeued").exists()


_GCLOUD = """
printf '%s\\0' "$@" >>calls
printf '\\n' >>calls
case "$*" in
  *describe*) [ -e made ] && echo "$(cat made)" ;;
  *"queued-resources create"*) echo ACTIVE >made ;;
  *"docker wait"*)
    mapfile -t lines <statuses
    echo "status=0"; echo "status=${lines[0]}"
    printf '%s\\n' "${lines[@]:1}" >statuses ;;
esac
exit 0
"""


@pytest.mark.parametrize(
    "statuses, status", [("0", 0), ("75 70 0", 0), ("137 1", 1), ("75 75 75", INTERRUPTED)]
)
def test_tpu_vm_runs_and_restarts(tmp_path, statuses, status):
    """The script with a gcloud that only records its calls."""
    (tmp_path / "statuses").write_text(statuses.replace(" ", "\n") + "\n")
    env = tools(tmp_path / "bin", gcloud=_GCLOUD, sleep="exit 0")
    job = dataclasses.replace(VM, restarts=2)
    result = subprocess.run(
        ["bash", "-c", tpu_vm.script(job)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == status, result.stderr
    calls = [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().split("\n")[:-1]]
    assert not (tmp_path / "statuses").read_text().strip()
    (create,) = (c for c in calls if "create" in c)
    for word in (
        "--accelerator-type=v5p-256",
        "--spot",
        "--zone=us-east5-a",
        "--node-id=long-video",
    ):
        assert word in create
    starts = [c[-1] for c in calls if "docker run" in c[-1]]
    assert len(starts) == len(statuses.split())
    words = shlex.split(starts[0])
    assert words[words.index("python") :] == job.command()
    assert "--stop-timeout=240" in words and "--env=NOTE=a 'b' $(c)" in words
    assert "--volume=/mnt/my-bucket:/bucket" in words and "--only-dir=ov2" in words
    assert not (tmp_path / "pwned").exists()


# --- submitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, job, tool",
    [("slurm", "sft_4b_h100", "sbatch"), ("gke", "instruct_8b_v5p", "kubectl")]
    + [("tpu_vm", "instruct_8b_v5p", "bash")],
)
def test_submitting(tmp_path, name, job, tool):
    path = f"--job=launch/jobs/{job}.py"
    nothing = tools(tmp_path / "nothing")
    dry = module(name, path, "--set=steps=11", "--dry-run", env=nothing)
    assert dry.returncode == 0 and "--config.steps=11" in dry.stdout, dry.stderr
    assert tool in dry.stderr and "Traceback" not in dry.stderr
    if tool == "bash":
        return  # a shell is always there
    missing = module(name, path, env=nothing)
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"LaunchError: {tool} is not installed here")
    assert len(missing.stderr.splitlines()) == 1
    there = tools(tmp_path / "bin", **{tool: f"cat >{tmp_path}/got; exit 9"})
    assert module(name, path, "--set=steps=11", env=there).returncode == 9
    assert (tmp_path / "got").read_text() == dry.stdout


_DRY_RUN = """
import runpy, sys
sys.argv = ["launch", *sys.argv[2:]]
try:
    runpy.run_module("launch.MODULE", run_name="__main__")
finally:
    slow = {"jax", "numpy", "transformers"} & set(sys.modules)
    assert not slow, slow
"""


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("slurm", ("--job=launch/jobs/sft_4b_h100.py", "--dry-run")),
        ("gke", ("--job=launch/jobs/instruct_8b_v5p.py", "--dry-run")),
        ("tpu_vm", ("--job=launch/jobs/instruct_8b_v5p.py", "--dry-run")),
        ("local", ("--platform=cuda", "--processes=2", "--", "x")),
    ],
)
def test_launchers_start_without_jax(name, arguments):
    """Importing it takes seconds, and a login node may have none."""
    command = [sys.executable, "-c", _DRY_RUN.replace("MODULE", name), "launch", *arguments]
    # The GPUs do not suffice, so launch.local starts nothing.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    output = "need 2 GPUs" if name == "local" else "Would be given to"
    assert output in done.stderr and "AssertionError" not in done.stderr, done.stderr


def test_jobs_in_the_repository_are_jobs():
    paths = sorted((REPOSITORY / "launch/jobs").glob("*.py"))
    assert len(paths) >= 2
    for path in paths:
        job = load_job(str(path), ["steps=3", "data.sources=()"])
        assert job.overrides["steps"] == "3" and (REPOSITORY / job.config).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "Run_1"}, "name is 'Run_1'; use a-z, 0-9 and -"),
        ({"name": "a" * 41}, "at most 40"),
        ({"name": "a\nb"}, "name is"),
        ({"workdir": "runs"}, "workdir is 'runs'; .* absolute path"),
        ({"workdir": "/a\nb"}, "one line of printable text"),
        ({"accelerator": "v9"}, "accelerator is 'v9'; .*GPUs a100, .*v5e, v5p, v6e"),
        ({"accelerator": "v5p:4x4"}, "v5p comes as .*multiples of 4"),
        ({"accelerator": "v5p:8x4x4"}, "A <= B <= C"),
        ({"accelerator": "v5p:64x64x64"}, "at most 8960 chips"),
        ({"accelerator": "v6e:3x4"}, "v6e comes as 1x1, .*16x16"),
        ({"nodes": 16}, "nodes is 16, but v5p:4x4x8 has 32 hosts"),
        ({"slices": 0}, "slices is 0"),
        ({"restarts": -1}, "restarts is -1"),
        ({"image": "a b"}, "image is 'a b'"),
        ({"overrides": {"a b": 1}}, "overrides has 'a b'"),
        ({"overrides": {"workdir": "/x"}}, "the job sets it itself"),
        ({"environment": {"A B": "1"}}, "environment has 'A B'"),
        ({"environment": {"A": "1\n2"}}, r"environment\['A'\] is '1\\n2'"),
        ({"environment": {"JAX_PROCESS_ID": "1"}}, "set by the launcher"),
        ({"mounts": (Mount("/a", "/x"), Mount("/b", "/x"))}, "mounts has a folder twice"),
        ({"gke": Gke(namespace="A")}, "gke.namespace is 'A'"),
        ({"slurm": Slurm(partition="a b")}, "slurm.partition is 'a b'"),
        ({"slurm": Slurm(options=("--x=1\n#SBATCH",))}, r"slurm.options\[0\] is"),
        ({"slurm": Slurm(hours=0.01)}, "less than grace_seconds"),
        ({"tpu_vm": TpuVm("z", "p", spot=True, reserved=True)}, "choose one"),
    ],
)
def test_a_job_that_cannot_work_is_one_sentence(changes, message):
    with pytest.raises(LaunchError, match=message) as error:
        dataclasses.replace(TPU, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mount("gs://B", "/x"), "is no gs://BUCKET"),
        (lambda: Mount("bucket", "/x"), "must be gs://BUCKET, pvc:CLAIM"),
        (lambda: Mount("/x", "y"), "must be an absolute path"),
        (lambda: dataclasses.replace(GPU, slices=2), "use nodes"),
        (lambda: slurm.script(TPU), "but Slurm has GPUs only"),
        (lambda: slurm.script(dataclasses.replace(GPU, mounts=TPU.mounts)), "mounts has 'gs://"),
        (
            lambda: slurm.script(dataclasses.replace(GPU, mounts=(Mount("/a", "/b"),))),
            "without image",
        ),
        (lambda: gke.text(GPU), "image is not set; GKE runs containers"),
        (lambda: tpu_vm.script(TPU), "tpu_vm is not set"),
        (lambda: tpu_vm.script(dataclasses.replace(VM, slices=2)), "slices is 2"),
        (
            lambda: tpu_vm.script(dataclasses.replace(VM, mounts=TPU.mounts)),
            "which only GKE mounts",
        ),
        (lambda: tpu_vm.script(GPU), "which is no TPU"),
        (lambda: load_job("no.py"), "--job is 'no.py', which is no file"),
        (lambda: load_job("launch/gke.py"), "must define JOB"),
        (lambda: load_job("launch/jobs/sft_4b_h100.py", ["steps"]), "write it as FIELD=VALUE"),
        (lambda: load_job("launch/jobs/sft_4b_h100.py", ["a b=1"]), "overrides has 'a b'"),
    ],
)
def test_what_a_platform_cannot_do_is_one_sentence(make, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(LaunchError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, hosts, chips, gcloud",
    [
        ("v5p:4x4x8", 32, 4, "v5p-256"),
        ("v5p:2x2x1", 1, 4, "v5p-8"),
        ("v6e:16x16", 64, 4, "v6e-256"),
        ("v6e:1x1", 1, 1, "v6e-1"),
        ("v5e:4x4", 4, 4, "v5litepod-16"),
    ],
)
def test_slices(name, hosts, chips, gcloud):
    tpu = parse_accelerator(name)
    assert (tpu.hosts, tpu.chips_per_host, tpu.gcloud_type) == (hosts, chips, gcloud)
