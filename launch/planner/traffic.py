"""Bytes that a program moves between HBM and the chip, estimated from its instructions.

Every instruction outside of fusions reads its operands and writes its result once, if these are in
HBM. If a fusion only takes a slice of an operand (a layer of a stack), the slice counts; if it
updates a slice of its result, the update counts. Kernels that read an operand several times are not
seen, so the true number is somewhat higher.
"""

from launch.planner.collectives import KINDS
from launch.planner.hlo import Computation, Instruction, Module
from launch.planner.loops import Runs

# Operations that move nothing, or whose work is counted in the computations that they call.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "optimization-barrier"),
    *("add-dependency", "domain", "opt-barrier"),
}


def _hbm(this: Instruction) -> int:
    return sum(a.bytes for a in this.arrays if a.space == 0)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for this in computation:
        for name in this.operands:
            users.setdefault(name, []).append(this)
    return users


def _read(parameter: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Bytes that a fusion reads of a parameter: the slices, if it only takes slices of it."""
    whole, total = _hbm(parameter), 0
    if not whole:
        return 0
    waiting = list(users.get(parameter.name, []))
    seen = {parameter.name}
    while waiting:
        this = waiting.pop()
        if this.opcode in ("dynamic-slice", "slice", "gather") and this.operands[0] in seen:
            total += this.bytes
        elif this.opcode == "dynamic-update-slice" and this.operands[0] in seen:
            continue  # written in place
        elif this.opcode in ("tuple", "custom-call", *KINDS):
            continue  # passed on; a collective counts at its start
        elif this.opcode == "bitcast":
            seen.add(this.name)
            waiting += users.get(this.name, [])
        else:
            return whole
    return min(whole, total)


def _written(root: Instruction, where: Computation) -> int:
    """Bytes that a fusion writes: the update, if it updates a slice in place."""
    while root.opcode == "bitcast" and root.operands[0] in where.instructions:
        root = where[root.operands[0]]
    if root.opcode == "parameter":
        return 0  # passed on
    if root.opcode == "tuple":
        return sum(_written(where[name], where) for name in root.operands)
    if root.opcode == "dynamic-update-slice":
        return where[root.operands[1]].bytes
    return _hbm(root)


def _fusion(this: Instruction, module: Module) -> int:
    callee = module.computations[this.called()[0]]
    users = _users(callee)
    read = sum(_read(p, users) for p in callee.parameters())
    if not sum(a.bytes for a in this.arrays if a.space == 0):
        return read  # its result stays on the chip
    return read + (_written(callee.root, callee) if callee.root else _hbm(this))


def _moved(this: Instruction, where: Computation, module: Module) -> int:
    if this.opcode in _FREE or this.opcode.endswith("-done"):
        return 0
    if this.opcode == "fusion":
        return _fusion(this, module)
    if this.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _hbm(this)
    if this.opcode == "dynamic-update-slice":
        return 2 * where[this.operands[1]].bytes
    operands = sum(_hbm(where[name]) for name in this.operands if name in where.instructions)
    if this.opcode.endswith("-start"):  # its tuple repeats the operands
        return sum(a.bytes for a in this.arrays if a.space == 0)
    return operands + _hbm(this)


def hbm_bytes(module: Module, runs: Runs) -> float:
    """HBM bytes of one call of the program, on one device."""
    total = 0.0
    for computation in module.computations.values():
        times = runs.times.get(computation.name, 0)
        if times and computation.name not in runs.fused:
            total += times * sum(_moved(this, computation, module) for this in computation)
    return total
