"""Damaged and odd inputs: what a case is, and the child process that reads them one by one.

`python -m tests.data.bad.cases FOLDER START` reads the cases of FOLDER/cases.json from number START
on and prints an outcome a line. A case that hangs ends the process with a traceback, and one that
crashes ends it as well; the tests then continue with the next case and name the one that failed.
"""

import faulthandler
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SECONDS = 20  # a case that takes longer hangs
OK = "ok"


class Case(NamedTuple):
    """A sample (`line`: its JSON) or a whole file of samples (`file`: its bytes, `name` its name).

    `wants`: the outcomes that are right, reasons or OK; of a file's rows: those that may occur.
    `facts`: what a good outcome must be, see `facts_of`; of a file: `rows`, the exact outcomes, or
    `has`, those that must be among them.
    """

    name: str
    wants: tuple[str, ...]
    line: bytes = b""
    file: bytes | None = None
    facts: dict[str, Any] = {}
    video: str = "uniform"


def sample(question: str, answer: str = "A", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **fields}


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def flip(data: bytes, seed: int, first: float = 0.0, last: float = 1.0, bits: int = 8) -> bytes:
    """So many flipped bits between two places of the file, as shares of it."""
    rng = np.random.default_rng(seed)
    damaged = bytearray(data)
    for at in rng.integers(int(first * len(data)), max(int(last * len(data)), 1), bits):
        damaged[at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


# --- the child ------------------------------------------------------------------------------------


def make_encoder() -> Any:
    from ov2_jax.data.encoding.sample_encoder import SampleEncoder
    from tests.tiny import tiny_model, tokenizer

    return SampleEncoder(config(()), tiny_model(), tokenizer(), pack())


def config(sources: tuple[Any, ...], **changes: Any) -> Any:
    from ov2_jax.config.codec import CodecConfig
    from tests.tiny import data_config

    codec = CodecConfig(
        num_sampled_frames=16,
        group_size=8,
        images_per_group=2,
        min_group_frames=4,
        max_group_frames=8,
        max_pixels=10_000,
    )
    return data_config(sources=sources, codec=codec, decode_timeout_s=10.0, **changes)


def pack() -> Any:
    from ov2_jax.config.pack import PackConfig

    return PackConfig(rows=1, seq_len=1024, vision_rows=((16, 80), (4, 2048)))


def facts_of(encoded: Any) -> dict[str, Any]:
    """What is compared of a good sample; `grey` is the mean brightness."""
    return {
        "id": encoded.id,
        "windows": encoded.windows.tolist(),
        "t": sorted(set(encoded.patch_positions[:, 0].tolist())),
        "grey": round(float(encoded.patches.mean())) if encoded.patches.size else None,
        "fallbacks": encoded.uniform_fallbacks,
    }


def _peak_kib(*, anew: bool = False) -> int:
    """The most memory so far; with `anew`, counting starts again. Only Linux has it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.read_text().partition("VmHWM:")[2].split()[0])


def _outcome(encoder: Any, raw: Any) -> dict[str, Any]:
    from ov2_jax.data.rejected import Rejected
    from ov2_jax.data.sample import SampleLength

    result = encoder(raw)
    if isinstance(result, Rejected):
        return {"outcome": result.reason, **result._asdict()}
    measured = encoder.measure(raw)
    length = list(measured[4:6]) if isinstance(measured, SampleLength) else measured.detail
    wanted = [len(result.tokens), tuple(result.windows.tolist())]
    return {"outcome": OK, "measured": length == wanted or str(length), **facts_of(result)}


def main(folder: Path, start: int) -> None:
    from ov2_jax.config.data import SourceConfig
    from ov2_jax.core.errors import DataError
    from ov2_jax.data.sources.index import RecordSource

    encoder = make_encoder()
    sources: dict[str, Any] = {}
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        if number < start:
            continue
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        before, began = _peak_kib(anew=True), time.monotonic()
        try:
            if case["line"] is None:
                rows = RecordSource([SourceConfig(str(folder / case["path"]))])
                result = {"rows": [_outcome(encoder, rows[i]) for i in range(len(rows))]}
            else:
                path = case["path"]
                if path not in sources:
                    sources[path] = RecordSource(
                        [SourceConfig(str(folder / path), video=case["video"])]
                    )
                result = _outcome(encoder, sources[path][case["line"]])
        except DataError as error:
            result = {"stops": str(error)}
        except Exception as error:  # nothing else may come out
            result = {"outcome": f"raised {type(error).__name__}: {error}"}
        result |= {"mib": (_peak_kib() - before) / 1024, "s": time.monotonic() - began}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"number": number, **result}), flush=True)


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
