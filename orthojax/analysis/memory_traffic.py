"""What a compiled program reads from and writes to main memory (HBM), from its HLO text.

On a TPU most arrays of a small net stay in on-chip memory, where they cost no bandwidth; XLA's
"bytes accessed" does not tell the two apart.
"""

import math
import re

from orthojax.analysis.hlo import Instruction, Module

# These move nothing: views, bookkeeping, and calls of what is counted itself.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("while", "conditional", "call", "async-start", "async-update", "async-done"),
    *("partition-id", "replica-id"),
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")


def memory_traffic(module: Module) -> int:
    """Bytes that a program's execution moves between main memory and the chip, on one device.

    Arrays that the compiler has placed in another memory space (`S(1)` and on, in a layout) count
    nothing. Padding that a layout adds counts, since it is moved too. Of an array that is only
    sliced, the slices count; of one updated in place, the updates. Loops count as in `Module.walk`.
    """
    return _Traffic(module).total()


def array_bytes(shape: str, anywhere: bool = False) -> list[int]:
    """Bytes of an array, or of each in a tuple, with the padding of its tiles.

    Args:
      shape: as it stands in HLO text.
      anywhere: count arrays in other memory spaces too; else they have 0 bytes.

    Example:
      >>> array_bytes("(f32[8,16]{1,0:T(8,128)}, bf16[5,256]{1,0:T(8,128)(2,1)S(1)}, pred[3])")
      [4096, 0, 3]
    """
    sizes = []
    for kind, width, dimensions, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        if space and space[1] != "0" and not anywhere:
            sizes.append(0)
            continue
        extents = [int(size) for size in dimensions.split(",") if size]
        tile = re.search(r"T\(([\d,]+)\)", layout)
        if tile:
            order = [int(axis) for axis in layout[1:].partition(":")[0].split(",") if axis]
            extents = [extents[axis] for axis in reversed(order)]  # the fastest one last
            tiles = [int(size) for size in tile[1].split(",")]
            extents = [1] * (len(tiles) - len(extents)) + extents
            tiles = [1] * (len(extents) - len(tiles)) + tiles
            extents = [-(-e // t) * t for e, t in zip(extents, tiles, strict=True)]
        sizes.append(math.prod(extents) * (8 if kind == "pred" else int(width)) // 8)
    return sizes


class _Traffic:
    def __init__(self, module: Module):
        self.module = module
        self.users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in module.instructions.values():
            for place, operand in enumerate(instruction.operands):
                self.users.setdefault(operand, []).append((instruction, place))

    def total(self) -> int:
        return sum(
            times * (self._reads(instruction) + self._writes(instruction))
            for instruction, times in self.module.walk(fusions=False)
            if instruction.opcode not in _FREE and "AllocateBuffer" not in instruction.attributes
        )

    def _reads(self, instruction: Instruction) -> int:
        if instruction.opcode.endswith("-done"):
            return 0  # what its -start has read
        return sum(
            self._read(instruction, place, sum(array_bytes(self.module.instructions[name].shape)))
            for place, name in enumerate(instruction.operands)
        )

    def _read(self, user: Instruction, place: int, whole: int) -> int:
        """Bytes that an instruction reads of an operand that has `whole` in main memory."""
        if not whole:
            return 0
        if user.opcode == "fusion":
            inner = self._parameter(user.called[0], place)
            parts = (self._read(*use, whole) for use in self.users.get(inner, []))
            return min(whole, sum(parts))
        if user.opcode == "bitcast":
            return min(whole, sum(self._read(*use, whole) for use in self.users.get(user.name, [])))
        if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
            return min(whole, sum(array_bytes(user.shape, anywhere=True)))
        if user.opcode == "slice-start":
            return min(whole, array_bytes(user.shape, anywhere=True)[1])
        if user.opcode == "dynamic-update-slice" and place == 0:
            return 0
        return whole

    def _writes(self, instruction: Instruction) -> int:
        if instruction.opcode.endswith("-start"):
            return 0  # its -done has the result
        return self._written(instruction, array_bytes(instruction.shape))

    def _written(self, instruction: Instruction, whole: list[int]) -> int:
        """Bytes of a result, the arrays of which have `whole` in main memory."""
        if not sum(whole):
            return 0
        operands = instruction.operands
        if instruction.opcode == "fusion":
            root = self.module.computations[instruction.called[0]].root
            return self._written(self.module.instructions[root], whole)
        if instruction.opcode == "tuple":
            parts = zip(operands, whole, strict=True)
            return sum(self._written(self.module.instructions[o], [size]) for o, size in parts)
        if instruction.opcode == "bitcast":
            return self._written(self.module.instructions[operands[0]], whole)
        if instruction.opcode == "dynamic-update-slice":
            update = self.module.instructions[operands[1]].shape
            return min(sum(whole), sum(array_bytes(update, anywhere=True)))
        return sum(whole)

    def _parameter(self, computation: str, number: int) -> str:
        """Name of a computation's parameter."""
        for name in self.module.computations[computation].instructions:
            instruction = self.module.instructions[name]
            if instruction.opcode == "parameter" and instruction.arguments == str(number):
                return name
        raise KeyError(f"{computation} has no parameter {number}")
