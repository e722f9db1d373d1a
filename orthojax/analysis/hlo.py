"""Reading a compiled program's HLO text: what calls what, how often, and what it sends."""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?^\}$", re.MULTILINE | re.DOTALL)
_DEFINITION = re.compile(r"^ *(ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_SETS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        return _NAME.findall(self.arguments)

    def attribute(self, key: str) -> str:
        """What `key=` names, without its percent sign."""
        return re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)[1]

    @property
    def called(self) -> list[str]:
        """The computations that it executes (not the ones that a reduction applies)."""
        names = _CALLED.findall(self.attributes)
        for group in _CALLED_SETS.findall(self.attributes):
            names += _NAME.findall(group)
        return [*names, self.attribute("to_apply")] if self.opcode == "call" else names


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program: its text, the names of its instructions, that of its result."""

    text: str
    instructions: list[str]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name.
      instructions: of all computations, by name; XLA gives no name twice.
      entry: the computation that the program starts with.
      devices: how many run it together.
    """

    computations: dict[str, Computation]
    instructions: dict[str, Instruction]
    entry: str
    devices: int

    def walk(
        self, name: str | None = None, times: int = 1, fusions: bool = True
    ) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that a computation executes, itself or by a call, and how often.

        Loops count as often as they turn, those of which that is not known (`trip_count`) once;
        of a conditional all branches count.

        Args:
          name: of the computation; None is the program.
          times: how often the computation itself is executed.
          fusions: whether to go on to what fusions are made of.
        """
        for key in self.computations[name or self.entry].instructions:
            instruction = self.instructions[key]
            yield instruction, times
            if instruction.opcode == "fusion" and not fusions:
                continue
            turns = self.trip_count(instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                yield from self.walk(called, times * (1 if turns is None else turns), fusions)

    def loops(self, name: str | None = None) -> Iterator[Instruction]:
        """The loops that a computation, None for the program, executes outside of other loops."""
        for key in self.computations[name or self.entry].instructions:
            instruction = self.instructions[key]
            if instruction.opcode == "while":
                yield instruction
            else:
                for called in instruction.called:
                    yield from self.loops(called)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` turns, or None where the text does not tell.

        XLA:CPU and XLA:GPU state it. For TPUs it is read from the counter: an element of what the
        loop carries that starts as a constant, grows by one, and is compared with another.
        """
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if stated:
            return int(stated[1])
        condition, body = (self.computations[loop.attribute(k)] for k in ("condition", "body"))
        test, carried = self.instructions[condition.root], self.instructions[loop.operands[0]]
        new = self.instructions[body.root]
        if (test.opcode, carried.opcode, new.opcode) != ("compare", "tuple", "tuple"):
            return None
        counter, bound = test.operands
        element = self._element(counter)
        if element is None or test.attribute("direction") != "LT":
            return None
        first, last = self._constant(carried.operands[element]), self._constant(bound)
        grown = self._source(new.operands[element])
        if grown.opcode != "add" or self._element(grown.operands[0]) != element:
            return None
        if first is None or last is None or self._constant(grown.operands[1]) != 1:
            return None
        return max(0, last - first)

    def payload(self, collective: Instruction) -> int:
        """Bytes of what a collective reduces, gathers or sends: the whole of it, on one device."""
        size = sum(shape_bytes(self.instructions[name].shape) for name in collective.operands)
        gathers = collective.opcode.startswith("all-gather")
        return size * (self.group_size(collective) if gathers else 1)

    def group_size(self, collective: Instruction) -> int:
        """How many devices take part in it together."""
        text = collective.attributes
        if axes := re.search(r"replica_groups=\w+\[(.*?)\] ?\{(.*?)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes[2]))
        if grid := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
            return int(grid[2])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
            return listed[1].count(",") + 1
        return self.devices

    def _source(self, name: str) -> Instruction:
        """What a value is a copy of."""
        instruction = self.instructions[name]
        while instruction.opcode in ("copy", "bitcast", "reshape"):
            instruction = self.instructions[instruction.operands[0]]
        return instruction

    def _constant(self, name: str) -> int | None:
        source = self._source(name)
        known = source.opcode == "constant" and re.fullmatch(r"-?\d+", source.arguments)
        return int(source.arguments) if known else None

    def _element(self, name: str) -> int | None:
        """Which element of its computation's parameter a value is."""
        source = self._source(name)
        if source.opcode != "get-tuple-element":
            return None
        of = self.instructions[source.operands[0]]
        return int(source.attribute("index")) if of.opcode == "parameter" else None


def parse(text: str) -> Module:
    """Reads the text of a compiled program, `jax.stages.Compiled.as_text()`.

    Example:
      >>> import jax
      >>> program = parse(jax.jit(lambda x: 2 * x).lower(1.0).compile().as_text())
      >>> sum(instruction.opcode == "multiply" for instruction, _ in program.walk())
      1
    """
    entry, computations, instructions = "", {}, {}
    for found in _COMPUTATION.finditer(text):
        names, root = [], ""
        for is_root, name, definition in _DEFINITION.findall(found[0]):
            instructions[name] = _instruction(name, definition)
            names.append(name)
            root = name if is_root else root
        computations[found[2]] = Computation(found[0], names, root)
        entry = found[2] if found[1] else entry
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return Module(computations, instructions, entry, math.prod(map(int, counts)))


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple, without the padding of a layout.

    Example:
      >>> shape_bytes("(f32[8,16]{1,0:T(8,128)}, bf16[4], pred[], u32[]{:S(2)})")
      525
    """
    bits = 0
    for kind, width, dimensions in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        bits += count * (8 if kind == "pred" else int(width))
    return bits // 8


def _instruction(name: str, definition: str) -> Instruction:
    is_tuple = definition.startswith("(")
    end = _closing(definition, 0) + 1 if is_tuple else definition.index(" ")
    shape, rest = definition[:end], definition[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    return Instruction(name, shape, rest[:start], rest[start + 1 : stop], rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for place in re.compile(r"[()]").finditer(text, start):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    raise ValueError(f"a parenthesis is never closed in {text[:80]!r}")
