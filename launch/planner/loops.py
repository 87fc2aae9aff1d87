"""How often each computation of a program runs.

On some backends a loop's trip count is in its backend_config (`known_trip_count`). Otherwise it
follows from the counter: its start, what the body adds, and the bound in the condition. A loop of
unknown trip count is reported, and its body is counted once.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from launch.planner.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)"?')
# Operations whose result is their operand's value.
_SAME = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}


class Runs(NamedTuple):
    """How often computations run in one call of the program."""

    times: dict[str, int]
    fused: frozenset[str]  # computations inside fusions: their values never reach memory
    trips: dict[str, int | None]  # by the name of the while instruction
    notes: list[str]  # for the report: loops and branches that could not be counted exactly


class _Value(NamedTuple):
    """`element` of the loop's state (None: a plain number) plus `plus`."""

    element: int | None
    plus: int


def _resolve(
    module: Module,
    where: Computation,
    name: str,
    arguments: list["_Value | None"] | None,
    element: int | None = None,
    depth: int = 0,
) -> _Value | None:
    """Expresses a scalar by an element of the loop's state; None if that is not possible.

    `arguments` are the values of a fusion's operands. They are None in the loop's own computation,
    whose parameter 0 is the state. `element` picks one of a fusion's results.
    """
    if depth > 40:
        return None
    this = where.instructions.get(name)
    if this is None:
        return None

    def of(operand: str) -> _Value | None:
        return _resolve(module, where, operand, arguments, depth=depth + 1)

    if this.opcode == "constant":
        return _Value(None, int(this.inside)) if re.fullmatch(r"-?\d+", this.inside) else None
    if this.opcode == "parameter" and arguments is not None:
        index = int(this.inside)
        return arguments[index] if index < len(arguments) else None
    if this.opcode == "get-tuple-element":
        index = int(this.attribute("index") or 0)
        source = where.instructions.get(this.operands[0])
        if source is None:
            return None
        if source.opcode == "parameter" and arguments is None:
            return _Value(index, 0)
        if source.opcode == "tuple":
            return of(source.operands[index])
        if source.opcode == "fusion":
            return _resolve(module, where, source.name, arguments, index, depth + 1)
        return None
    if this.opcode in _SAME:
        return of(this.operands[0])
    if this.opcode in ("add", "subtract"):
        a, b = of(this.operands[0]), of(this.operands[1])
        if a is None or b is None or (a.element is not None and b.element is not None):
            return None
        if this.opcode == "subtract":
            return None if b.element is not None else _Value(a.element, a.plus - b.plus)
        return _Value(b.element if a.element is None else a.element, a.plus + b.plus)
    if this.opcode == "fusion":
        callee = module.computations[this.called()[0]]
        root = callee.root
        if root is None:
            return None
        name = (
            root.operands[element] if root.opcode == "tuple" and element is not None else root.name
        )
        inner = [of(operand) for operand in this.operands]
        return _resolve(module, callee, name, inner, depth=depth + 1)
    return None


def _comparison(
    module: Module, condition: Computation
) -> tuple[str, _Value | None, _Value | None] | None:
    """(direction, left, right) of a condition's comparison."""
    root, where, arguments = condition.root, condition, None
    while root is not None and root.opcode == "fusion":
        arguments = [_resolve(module, where, operand, arguments) for operand in root.operands]
        where = module.computations[root.called()[0]]
        root = where.root
    while root is not None and root.opcode in _SAME:
        root = where.instructions.get(root.operands[0])
    if root is None or root.opcode != "compare":
        return None
    left, right = (_resolve(module, where, name, arguments) for name in root.operands[:2])
    return root.attribute("direction") or "", left, right


def trip_count(module: Module, where: Computation, loop: Instruction) -> int | None:
    """Turns of a while loop, or None if the text does not determine them."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    direction, left, right = compared
    if left is None or right is None:
        return None
    flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
    if left.element is None or (right.element is not None and _moves(module, body, right.element)):
        left, right, direction = right, left, flipped.get(direction, "")
    if left.element is None:
        return None
    step = _step(module, body, left.element)
    start = _start(module, where, loop, left.element)
    limit = right.plus
    if right.element is not None:  # the bound is an element of the state
        fixed = _start(module, where, loop, right.element)
        if fixed is None or _moves(module, body, right.element):
            return None
        limit += fixed
    if not step or start is None:
        return None
    return _turns(start + left.plus, limit, step, direction)


def _turns(start: int, limit: int, step: int, direction: str) -> int | None:
    if direction in ("GT", "GE"):
        start, limit, step = -start, -limit, -step
        direction = {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        whole = step and (limit - start) % step == 0 and (limit - start) // step >= 0
        return (limit - start) // step if whole else None
    if direction == "LE":
        limit += 1
    elif direction != "LT":
        return None
    return max(0, math.ceil((limit - start) / step)) if step > 0 else None


def _next(module: Module, body: Computation, element: int) -> _Value | None:
    root = body.root
    if root is None or root.opcode != "tuple":
        return None
    return _resolve(module, body, root.operands[element], None)


def _step(module: Module, body: Computation, element: int) -> int | None:
    after = _next(module, body, element)
    return after.plus if after is not None and after.element == element else None


def _moves(module: Module, body: Computation, element: int) -> bool:
    return _step(module, body, element) != 0


def _start(module: Module, where: Computation, loop: Instruction, element: int) -> int | None:
    state = where.instructions.get(loop.operands[0])
    while state is not None and state.opcode in _SAME:
        state = where.instructions.get(state.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    value = _resolve(module, where, state.operands[element], None)
    return value.plus if value is not None and value.element is None else None


def runs(module: Module) -> Runs:
    """Walks from the entry down; visits every computation once."""
    times: dict[str, int] = defaultdict(int)
    times[module.entry] = 1
    fused: set[str] = set()
    trips: dict[str, int | None] = {}
    notes: list[str] = []
    for computation in reversed(module.computations.values()):
        count = times.get(computation.name, 0)
        if not count:
            continue
        for this in computation:
            if this.opcode == "while":
                turns = trip_count(module, computation, this)
                trips[this.name] = turns
                if turns is None:
                    turns = 1
                    notes.append(
                        f"The trip count of the loop {this.name} ({this.op_name or 'unnamed'}) is "
                        "unknown; its body is counted once."
                    )
                times[this.attribute("body") or ""] += count * turns
                times[this.attribute("condition") or ""] += count * (turns + 1)
                continue
            called = this.called()
            if this.opcode == "conditional" and called:
                notes.append(
                    f"Each branch of the conditional {this.name} ({this.op_name or 'unnamed'}) is "
                    "counted as if it always ran."
                )
            for name in called:
                times[name] += count
                if this.opcode == "fusion" or computation.name in fused:
                    fused.add(name)
    return Runs(dict(times), frozenset(fused), trips, notes)
