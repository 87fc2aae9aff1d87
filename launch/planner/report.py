"""The plan: counts of a compiled program next to what is needed and what the chip can do.

Bounds are seconds of a step: compute at the chip's peak, HBM and interconnect at their published
bandwidth with all links busy. A step takes at least the longest of them, which bounds the MFU
(model FLOPs over what the chips could do in that time). If nothing overlaps it takes their sum.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from launch.accelerators import parse_accelerator
from launch.planner.chips import CHIPS, Chip

RATES = (0.4, 0.5)  # shares of the peak for which throughput is reported
_DAY = 86400.0


class Ratio(NamedTuple):
    """Work done by the program and work needed, both of a step in one unit."""

    done: float
    needed: float

    @property
    def ratio(self) -> float | None:
        return self.done / self.needed if self.needed else None


def _ratio(done: float, needed: float) -> dict[str, float | None]:
    pair = Ratio(done, needed)
    return {"done": pair.done, "needed": pair.needed, "ratio": pair.ratio}


def report(measured: Mapping[str, Any], title: str, command: str) -> dict[str, Any]:
    """The plan as plain data: `measured` (by measure.count_program) and what follows from it."""
    chip = CHIPS[parse_accelerator(measured["topology"]).version]
    chips, work, flops = measured["chips"], measured["work"], measured["flops"]
    attention_model = sum(work["attention"].values())
    model = sum(work["matmuls"].values()) + attention_model
    # Attention without a kernel is in the program's matmuls; kernels are counted by their grid.
    has_kernels = any(k["attention"] for k in flops["kernels"])
    attention = flops["attention"] * chips
    if has_kernels:
        attention += sum(work["kernels"].values())
    ratios = {
        "matmuls": _ratio(flops["matmuls"] * chips, sum(work["matmuls"].values())),
        "attention": _ratio(attention, attention_model),
        "weights": _ratio(_sent(measured, "weights"), sum(measured["least"].values())),
    }
    bounds = _bounds(measured, chip, flops["matmuls"] + attention / chips)
    slowest = max(bounds.values())
    ceiling = model / (chips * chip.flops * slowest)
    return {
        **measured,
        "title": title,
        "command": command,
        "chip": chip._asdict(),
        "model_flops": {
            "total": model,
            "vision": work["matmuls"]["encoder"] + work["matmuls"]["merger"],
            "vision attention": work["attention"].get("encoder", 0.0),
            "text": work["matmuls"]["decoder"],
            "text attention": work["attention"].get("decoder", 0.0),
        },
        "attention_kernels": has_kernels,
        "ratios": ratios,
        "bounds": bounds,
        "mfu_ceiling": ceiling,
        "mfu_without_overlap": model / (chips * chip.flops * sum(bounds.values())),
        "throughput": [_throughput(measured, model, chip, rate) for rate in RATES]
        + [_throughput(measured, model, chip, ceiling) | {"ceiling": True}],
        "assumptions": _assumptions(measured, has_kernels),
    }


def _sent(measured: Mapping[str, Any], part: str) -> float:
    return sum(row["bytes"] for row in measured["collectives"]["parts"][part])


def _bounds(measured: Mapping[str, Any], chip: Chip, flops: float) -> dict[str, float]:
    return {
        "compute": flops / chip.flops,
        "hbm": measured["hbm_bytes"] / chip.hbm_bandwidth,
        "ici": measured["collectives"]["total"] / chip.ici_bandwidth,
    }


def _throughput(
    measured: Mapping[str, Any], model: float, chip: Chip, mfu: float
) -> dict[str, Any]:
    seconds = model / (measured["chips"] * chip.flops * mfu)
    step, fill = measured["work"]["step"], measured["work"]["filling"]
    clips = min(step["tokens"] // fill["sample"], step["patches"] // max(1, fill["clip"]))
    return {
        "mfu": mfu,
        "step_seconds": seconds,
        "tokens_per_second": step["tokens"] / seconds,
        "patches_per_second": step["patches"] / seconds,
        "clips_per_second": clips / seconds,
        "days": measured["work"]["steps"] * seconds / _DAY,
    }


def _assumptions(measured: Mapping[str, Any], has_kernels: bool) -> list[str]:
    fill = measured["work"]["filling"]
    found = [
        f"Every slot is filled: text rows with samples of {fill['sample']:,} tokens, vision rows "
        f"with windows of {fill['window']:,} patches (--sample, --window). A clip is "
        f"{fill['clip']:,} patches, the longest that the config allows.",
        "HBM traffic is estimated from the program's instructions; the bound by the interconnect "
        "assumes that all links of a chip are busy. Neither is measured.",
    ]
    if has_kernels:
        found.append(
            "Attention kernels are counted by the blocks of scores that they visit for these "
            "samples and windows."
        )
    return found
