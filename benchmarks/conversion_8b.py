"""Memory and speed of a full-size conversion, there and back.

    python benchmarks/conversion_8b.py --dir=/big/disk [--size=8b] [--keep]

Makes a Hugging Face folder of random bfloat16 bits, converts it to Orbax and back in processes of
their own, samples the anonymous memory of these processes (RssAnon: memory that the kernel cannot
drop; mapped files are not in it), and compares every tensor bit by bit. 8b is 17.05 GB, and --dir
needs room for three copies of it; they are removed at the end unless --keep is given.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
from absl import flags

from conversion.formats.safetensors_io import (
    SafetensorsFolder,
    SafetensorsWriter,
    TensorSpec,
    weight_dtype,
)
from conversion.keys import key_table, parameter_count
from ov2_jax.config.hf import model_config_to_hf
from ov2_jax.config.sizes import SIZES, model_config
from ov2_jax.core.program import Given, run

PIECE = 64 * 2**20  # bytes made or compared at a time


def make(folder: pathlib.Path, size: str) -> int:
    """Writes the folder; returns its bytes of weights."""
    config = model_config(size)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config)))
    specs = [TensorSpec(e.key, e.hf_shape, weight_dtype("bfloat16")) for e in key_table(config)]
    rng = np.random.Generator(np.random.SFC64(0))
    with SafetensorsWriter(folder, specs) as writer:
        for spec in specs:
            flat = writer.array(spec.name).reshape(-1).view(np.uint16)
            for start in range(0, len(flat), PIECE // 2):
                piece = flat[start : start + PIECE // 2]
                words = rng.integers(0, 2**64, -(-len(piece) // 4), np.uint64)
                piece[:] = words.view(np.uint16)[: len(piece)]
    return 2 * parameter_count(config)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it is gone."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in status else 0


def run_conversion(module: str, src: pathlib.Path, dst: pathlib.Path) -> tuple[float, float, int]:
    """Runs a conversion; returns its seconds, the seconds until all is on disk, and peak bytes."""
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", module, f"--src={src}", f"--dst={dst}"])
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    done = time.monotonic()
    if process.returncode:
        sys.exit(f"{module} failed")
    os.sync()
    return done - start, time.monotonic() - start, peak


def differing(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """Names of the tensors that differ in dtype, shape or bits, or that one folder lacks."""
    one, two = SafetensorsFolder(a), SafetensorsFolder(b)
    wrong = sorted(one.tensors.keys() ^ two.tensors.keys())
    for name in one.tensors.keys() & two.tensors.keys():
        x, y = one.array(name), two.array(name)
        same = x.dtype == y.dtype and x.shape == y.shape
        if same:
            x, y = (z.reshape(-1).view(np.uint8) for z in (x, y))
            same = all(
                np.array_equal(x[i : i + PIECE], y[i : i + PIECE]) for i in range(0, len(x), PIECE)
            )
        if not same:
            wrong.append(name)
    return wrong


def _define_flags() -> None:
    flags.DEFINE_string("dir", None, "Where to work; needs room for 3 models.", required=True)
    flags.DEFINE_enum("size", "8b", list(SIZES), "The model's size.")
    flags.DEFINE_bool("keep", False, "Leave the folders there.")


def main(given: Given) -> int:
    root = pathlib.Path(given.dir) / f"conversion_{given.size}"
    hf, orbax, back = root / "hf", root / "orbax", root / "back"
    try:
        start = time.monotonic()
        nbytes = make(hf, given.size)
        print(f"{given.size}: {nbytes / 1e9:.2f} GB made in {time.monotonic() - start:.0f} s")
        for module, src, dst in (
            ("conversion.from_hf", hf, orbax),
            ("conversion.to_hf", orbax, back),
        ):
            seconds, synced, peak = run_conversion(module, src, dst)
            print(
                f"{module}: {seconds:.0f} s ({nbytes / seconds / 1e9:.2f} GB/s), on disk after "
                f"{synced:.0f} s; peak RssAnon {peak / 2**30:.2f} GiB"
            )
        files = sum(1 for path in orbax.rglob("*") if path.is_file())
        print(f"Orbax checkpoint: {files} files")
        wrong = differing(hf, back)
        print("bit-identical: " + (f"NO, {wrong}" if wrong else "every tensor"))
        return 1 if wrong else 0
    finally:
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    run(main, _define_flags)
