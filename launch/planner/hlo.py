"""An optimized HLO program as data, read from its text in one pass.

XLA has no stable Python API for compiled programs, but its text has one instruction per line (only
the attributes of kernels may continue on further lines):

    [ROOT] %name = TYPE opcode(%operand, ...), attribute=value, ..., metadata={...}

and a computation is a header line that ends in `{`, its instructions, and a line `}`. Computations
come before those that use them, the entry last, with an empty line after each.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits of an element; all else (token, opaque, s32 synchronisation flags) holds no data.
_BITS = {"pred": 8, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\](?:\{[^}]*?S\((\d+)\)\})?")
_PARENTHESIS = re.compile(r"[()]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.match(r"(?:s|u|f|bf)(\d+)", dtype)  # f8e4m3fn: the first number is its size
    return int(number[1]) if number else 0


class Array(NamedTuple):
    """The type of an array; memory space 0 is HBM, others are on the chip or are flags."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        return self.elements * _bits(self.dtype) // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result, tuples flattened
    operands: tuple[str, ...]
    inside: str  # the text between its parentheses; a constant's value
    attributes: str  # the text after them, with metadata and backend_config

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @property
    def op_name(self) -> str:
        """Where it comes from in the Python program; empty if the compiler dropped the name."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The computation or word that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def called(self) -> list[str]:
        """Computations that run once for each run of this (`loops` handles those of a while)."""
        if self.opcode in ("fusion", "call", "call-start", "custom-call", "async-start"):
            found = _CALLS.findall(self.attributes)
        elif self.opcode == "conditional":
            found = _TRUE_FALSE.findall(self.attributes)
        else:
            return []
        for names in _BRANCHES.findall(self.attributes):
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return found


class Computation:
    """Instructions by name, in the order of the text, which is the order of the schedule."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self.root: Instruction | None = None

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def parameters(self) -> list[Instruction]:
        found = [i for i in self if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside))


class Module(NamedTuple):
    computations: dict[str, Computation]  # each after those that it uses
    entry: str


def _closing(text: str, start: int) -> int:
    """The position where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]!r}")


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type, a tuple's flattened."""
    found = []
    for dtype, dims, space in _ARRAY.findall(text):
        sizes = tuple(int(d.strip(" <=")) for d in dims.split(",") if d.strip())
        found.append(Array(dtype, sizes, int(space or 0)))
    return tuple(found)


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode, inside = line[end:opening].strip(), line[opening + 1 : closing]
    names = () if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(inside))
    return Instruction(
        start[2], opcode, arrays_of(line[at:end]), names, inside, line[closing + 1 :]
    )


def parse(text: str) -> Module:
    """Raises ValueError if the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = Computation(header[2])
                entry = current.name if header[1] else entry
        elif line.startswith("}") and not "".join(lines[number + 1 : number + 2]):
            computations[current.name] = current
            current = None
        elif start := _LINE.match(line):
            instruction = _instruction(line, start)
            current.instructions[instruction.name] = instruction
            current.root = instruction if start[1] else current.root
        elif current.instructions:
            # A kernel's attributes continue on this line.
            _, last = current.instructions.popitem()
            longer = last._replace(attributes=f"{last.attributes}\n{line}")
            current.instructions[last.name] = longer
            current.root = longer if current.root is last else current.root
    if entry is None or entry not in computations:
        raise ValueError("the text is no HLO program: it has no ENTRY computation")
    return Module(computations, entry)
