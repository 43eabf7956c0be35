"""What a compiled program sends between devices, from its HLO text; what is in a loop as often as the loop runs.

What only a branch sends is left out: further rounds of tokens to their experts, which a balanced router has no need of.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}  # others: 4
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:to_apply|body|calls|\w+_computations?)=\{?([^,})]+(?:, %[^,})]+)*)")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)")


class Collective(NamedTuple):
    """
    Attributes:
      shape: of what it gives, or of what a reduce-scatter takes, as HLO writes it.
      nbytes: of the largest array of that, on one device.
      times: how often it runs in a step.
      devices: among how many; 0 if that is not said.
    """

    kind: str
    shape: str
    nbytes: int
    times: int
    devices: int

    @property
    def sent(self) -> float:
        """Bytes that a device has to send in a step, at the least: of n shares all but its own, for an all-reduce twice."""
        others = 1 - 1 / self.devices if self.devices else 1.0
        return self.nbytes * self.times * others * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """Of an optimized module (`jax.stages.Compiled.as_text`), the ones with the most bytes first."""
    bodies: dict[str, list[str]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            body = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        else:
            body.append(line)
    counted: Counter[tuple[str, str, int]] = Counter()

    def walk(name: str, times: int) -> None:
        shapes: dict[str, str] = {}
        for line in bodies.get(name, []):
            if not (found := OPERATION.match(line)):
                continue
            result, written, operation, operands = found.groups()
            shape = shapes[result] = re.sub(r"\{[^}]*\}", "", written)
            kind = operation.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # so XLA for TPUs writes one: what is summed, and then a slice of it
            if kind in KINDS:
                taken = [shapes[one] for one in re.findall(r"%([\w.\-]+)", operands) if one in shapes]
                counted[kind, ", ".join(taken) if kind == "reduce-scatter" and taken else shape, _devices(line)] += times
            if operation == "conditional":
                continue
            loop = _trips(line, bodies) if operation == "while" else 1
            for called in CALLED.findall(line):
                for other in called.split(", "):
                    walk(other.strip("% "), times * loop)

    walk(entry, 1)
    found = [Collective(kind, shape, _largest(shape), times, devices) for (kind, shape, devices), times in counted.items()]
    return sorted(found, key=lambda one: -one.nbytes * one.times)


def _largest(shape: str) -> int:
    arrays = re.findall(r"([a-z]+\d+|pred)\[([\d,]*)\]", shape)
    return max((WIDTHS.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays), default=0)


def _devices(line: str) -> int:
    """Written as lists of devices, as the shape of such lists, or as the axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if shaped := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(shaped[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return 0


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler notes it, or the constant that its condition compares with."""
    if noted := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    return max((int(n) for one in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", one)), default=1)
