"""Read cycles and collectives from the text of a compiled program.

XLA for TPU notes beside an instruction the cycles that it expects of it. A step of a
round is one turn of the outermost loop. Loops within it count as often as they run; of
the branches for several cuts the mean counts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# The bytes that leave a device, for each byte of the result, on a ring of d devices.
_ON_THE_RING = {
    "all-reduce": lambda d: 2 * (d - 1) / d,
    "all-gather": lambda d: (d - 1) / d,
    "reduce-scatter": lambda d: d - 1,
    "all-to-all": lambda d: (d - 1) / d,
    "collective-permute": lambda d: 1,
}
_BYTES = {"pred": 1, "bf16": 2, "s8": 1, "u8": 1, "f16": 2, "s64": 8, "u64": 8}  # or 4
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]+)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_NAME = re.compile(r"[\w.\-]+")
_BRANCH_LIST = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """An instruction of a computation."""

    opcode: str
    result: str  # its type
    text: str


class Collective(NamedTuple):
    """All collectives of one kind and dtype."""

    kind: str
    dtype: str


class Cost(NamedTuple):
    """The cost of a computation; see `_cost` for the branch that counts."""

    cycles: float
    counts: Mapping[Collective, float]
    nbytes: Mapping[Collective, float]  # of the results

    def link_bytes(self, devices: int) -> float:
        """Return the bytes that leave each of several devices."""
        return sum(
            _ON_THE_RING[collective.kind](devices) * size
            for collective, size in self.nbytes.items()
        )


class ProgramCost(NamedTuple):
    """The cost of a program with a loop over the steps of a round."""

    step: Cost
    rest: Cost  # once, before and after the loop; with the average if one can be due


Computations = Mapping[str, Sequence[Instruction]]


def program_cost(text: str) -> ProgramCost:
    """Return what XLA expects of a step, and of what lies around the loop of steps.

    Args:
      text: a compiled module, as XLA prints it.

    Raises:
      ValueError: there is no loop.
    """
    computations, entry = _parse(text)
    loops = [i for i in computations[entry] if i.opcode == "while"]
    if not loops:
        raise ValueError("the program has no loop over the steps")
    # XLA notes no cycles for a GPU: there the loop with the longest text counts.
    bodies = {i: _body(computations, i) for i in loops}
    loop = max(
        loops, key=lambda i: (bodies[i].cycles, len(computations[_called(i) or ""]))
    )
    others = [i for i in computations[entry] if i is not loop]
    rest = _total(_cost(computations, i, longest=True) for i in others)
    return ProgramCost(bodies[loop], rest)


def _parse(text: str) -> tuple[Computations, str]:
    """Return the instructions of each computation, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith("HloModule"):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            current.append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> Instruction:
    """Split a line ``%name = TYPE opcode(...)``."""
    right = line.partition(" = ")[2]
    end = _end_of_type(right)
    return Instruction(right[end:].partition("(")[0].strip(), right[:end], line)


def _end_of_type(text: str) -> int:
    """Return where the type at the start of a text ends; brackets may hold spaces."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return place
    return len(text)


def _called(i: Instruction) -> str | None:
    """Return the computation that an instruction calls, other than by branches."""
    found = _CALLED.search(i.text)
    return found[1] if found else None


def _body(computations: Computations, i: Instruction, *, longest: bool = False) -> Cost:
    """Return the cost of the computation that an instruction calls."""
    inner = computations.get(_called(i) or "", ())
    return _total(_cost(computations, j, longest=longest) for j in inner)


def _cost(computations: Computations, i: Instruction, *, longest: bool) -> Cost:
    """Return the cost of an instruction with all that it calls.

    Args:
      computations: the computations of the module.
      i: the instruction.
      longest: count the longest branch of a conditional instead of the mean.
    """
    cycles = _CYCLES.search(i.text)
    own = Cost(float(cycles[1]) if cycles else 0.0, *_collectives(i))
    if i.opcode == "conditional":
        return _conditional(computations, i, longest=longest)
    if i.opcode == "while":
        body = _body(computations, i, longest=longest)
        return _scale(body, _trips(computations, i))
    if i.opcode in ("call", "async-start", "fusion"):
        inner = _body(computations, i, longest=longest)
        # The cycles of a fusion are noted beside it.
        return _total([own, inner._replace(cycles=0.0) if cycles else inner])
    return own


def _conditional(computations: Computations, i: Instruction, *, longest: bool) -> Cost:
    """Return the cost of the longest branch, or the mean of all that are alike.

    A branch that does almost nothing is for clients without samples; it does not count.
    """
    listed = _BRANCH_LIST.search(i.text)
    names = _NAME.findall(listed[1]) if listed else _BRANCHES.findall(i.text)
    branches = [
        _total(_cost(computations, j, longest=longest) for j in computations[name])
        for name in names
    ]
    most = max(branches, key=lambda cost: (cost.cycles, sum(cost.nbytes.values())))
    if longest:
        return most
    alike = [cost for cost in branches if cost.cycles >= most.cycles / 20]
    return _scale(_total(alike), 1 / len(alike))


def _trips(computations: Computations, loop: Instruction) -> float:
    """Return how often a loop runs: what XLA notes, or the end in its condition.

    A loop whose end the program computes counts once.
    """
    noted = _TRIPS.search(loop.text)
    if noted:
        return float(noted[1])
    condition = _CONDITION.search(loop.text)
    texts = [i.text for i in computations.get(condition[1] if condition else "", ())]
    called = [name for text in texts for name in _CALLED.findall(text)]
    texts += [i.text for name in called for i in computations.get(name, ())]
    ends = _CONSTANT.findall("\n".join(texts))
    return float(ends[0]) if len(ends) == 1 else 1.0


def _collectives(i: Instruction) -> tuple[Counter[Collective], Counter[Collective]]:
    """Return how many collectives an instruction is, and the bytes of their results."""
    kind = i.opcode.removesuffix("-start")
    counts: Counter[Collective] = Counter()
    nbytes: Counter[Collective] = Counter()
    if kind not in _ON_THE_RING:
        return counts, nbytes
    arrays = _ARRAY.findall(i.result)
    if i.opcode != kind and kind != "all-reduce":  # its type begins with the operands
        arrays = arrays[len(arrays) // 2 :]
    for dtype, shape in arrays:
        size = _BYTES.get(dtype, 4)
        for length in shape.split(","):
            size *= int(length)
        nbytes[Collective(kind, dtype)] += size
    for collective in nbytes:
        counts[collective] = 1
    return counts, nbytes


def _total(costs: Iterable[Cost]) -> Cost:
    cycles, counts, nbytes = 0.0, Counter[Collective](), Counter[Collective]()
    for cost in costs:
        cycles += cost.cycles
        counts.update(cost.counts)
        nbytes.update(cost.nbytes)
    return Cost(cycles, counts, nbytes)


def _scale(cost: Cost, factor: float) -> Cost:
    return Cost(
        cost.cycles * factor,
        {key: value * factor for key, value in cost.counts.items()},
        {key: value * factor for key, value in cost.nbytes.items()},
    )
