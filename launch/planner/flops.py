"""Matmul FLOPs of a compiled program on one device; every turn of a loop counts.

A multiply-add counts 2. A `dot` costs 2 x result x contracted sizes. TPU programs have convolutions
instead, in which a batch axis of a matmul may be a spatial axis with a window that is mostly
dilation and padding: only positions that meet an element count, as in XLA's own cost analysis.
Elementwise operations are left out, because matmuls hide them.
"""

import functools
import re
from typing import NamedTuple

from launch.planner.hlo import Computation, Instruction, Module
from launch.planner.loops import Runs

_DIMS = re.compile(r"(lhs|rhs)_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GROUPS = re.compile(r"(feature|batch)_group_count=(\d+)")
_COST = re.compile(r'"flops":\s*"?(\d+(?:\.\d+)?(?:e\+?\d+)?)"?')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

# Operations of attention, which is counted apart from matmuls, by its kernel's grid.
ATTENTION = re.compile(r"\battention\b|splash|bqjhd,bkjd->bjhqk|bjhqk,bkjd->bqjhd")


class Matmul(NamedTuple):
    """A matmul instruction or a custom call, and its cost in one call of the program."""

    name: str
    op_name: str
    shape: str  # of the result, for example bf16[4096,12288]
    times: int
    flops: float  # all times together
    kernel: bool = False  # a custom call

    @property
    def attention(self) -> bool:
        return bool(ATTENTION.search(self.op_name) or (self.kernel and ATTENTION.search(self.name)))

    @property
    def phase(self) -> str:
        """forward, recomputed (for the backward pass) or backward."""
        if "rematted_computation" in self.op_name:
            return "recomputed"
        return "backward" if "transpose(" in self.op_name else "forward"


def _shape(this: Instruction) -> str:
    array = this.arrays[0]
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"


def _dot(where: Computation, this: Instruction) -> int:
    contracting = dict(_DIMS.findall(this.attributes))
    left = where[this.operands[0]].arrays[0].dims
    contracted = 1
    for axis in contracting.get("lhs", "").split(","):
        contracted *= left[int(axis)] if axis else 1
    return 2 * this.arrays[0].elements * contracted


@functools.lru_cache(maxsize=4096)
def _meetings(
    size: int, window: int, stride: int, low: int, high: int, base: int, dilation: int
) -> int:
    """Pairs of an output and a window position, of one spatial axis, that meet an element.

    `base` dilates the input, `dilation` the window.
    """
    dilated = (size - 1) * base + 1 if size else 0
    span = (window - 1) * dilation + 1
    outputs = (low + dilated + high - span) // stride + 1
    count = 0
    for position in range(window):
        # Outputs o with 0 <= o * stride + position * dilation - low < dilated, on an element.
        shift = position * dilation - low
        first = max(0, -(shift // stride) if shift < 0 else 0)
        last = min(outputs - 1, (dilated - 1 - shift) // stride)
        if last < first:
            continue
        if base == 1:
            count += last - first + 1
        else:
            count += sum((o * stride + shift) % base == 0 for o in range(first, last + 1))
    return count


def _numbers(window: str, name: str, default: int, axes: int) -> list[tuple[int, ...]]:
    found = re.search(rf"\b{name}=(\S+)", window)
    if not found:
        return [(default,)] * axes
    return [tuple(int(n) for n in part.split("_")) for part in found[1].split("x")]


def _convolution(where: Computation, this: Instruction) -> int:
    left, right = (where[name].arrays[0].dims for name in this.operands[:2])
    labels = _LABELS.search(this.attributes)
    if labels is None:
        raise ValueError(f"the convolution {this.name} has no dim_labels")
    in_labels, kernel_labels, _ = labels.groups()
    window_text = _WINDOW.search(this.attributes)
    window = window_text[1] if window_text else ""
    axes = sum(label.isdigit() for label in in_labels)
    size, stride = _numbers(window, "size", 1, axes), _numbers(window, "stride", 1, axes)
    pad = _numbers(window, "pad", 0, axes)
    base, dilation = (_numbers(window, f"{s}_dilate", 1, axes) for s in ("lhs", "rhs"))
    groups = {kind: int(n) for kind, n in _GROUPS.findall(this.attributes)}
    meetings = 1
    for axis in range(axes):
        low, high = pad[axis][0], pad[axis][-1]
        meetings *= _meetings(
            left[in_labels.index(str(axis))],
            size[axis][0],
            stride[axis][0],
            low,
            high,
            base[axis][0],
            dilation[axis][0],
        )
    batch = left[in_labels.index("b")] // groups.get("batch", 1)
    # The kernel's input features are already those of one feature group.
    features = right[kernel_labels.index("i")] * right[kernel_labels.index("o")]
    return 2 * batch * features * meetings


def matmuls(module: Module, runs: Runs) -> list[Matmul]:
    """Every dot, convolution and kernel that runs, the costliest first.

    A kernel is a custom call that is not the compiler's own. It counts the FLOPs that it states, or
    0 if it states none.
    """
    found = []
    for computation in module.computations.values():
        times = runs.times.get(computation.name, 0)
        if not times:
            continue
        for this in computation:
            if this.opcode == "dot":
                flops: float = _dot(computation, this)
            elif this.opcode == "convolution":
                flops = _convolution(computation, this)
            elif this.opcode == "custom-call" and _is_kernel(this):
                stated = _COST.search(this.attributes)
                flops = float(stated[1]) if stated else 0.0
            else:
                continue
            kernel = this.opcode == "custom-call"
            row = Matmul(this.name, this.op_name, _shape(this), times, flops * times, kernel)
            found.append(row)
    return sorted(found, key=lambda row: -row.flops)


def _is_kernel(this: Instruction) -> bool:
    target = _TARGET.search(this.attributes)
    return target is not None and target[1] in ("tpu_custom_call", "__gpu$xla.gpu.triton")
