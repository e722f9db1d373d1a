"""What a net consists of, stage by stage: shapes, layers, parameters, operations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax import checks
from orthojax.describe import describe
from orthojax.sites import weights_only

_HEADINGS = ("stage", "output", "layers", "parameters", "multiply-adds")


@dataclasses.dataclass(frozen=True)
class StageSummary:
    """One part of a net.

    Attributes:
      name: of the submodule.
      output: shape of its output for one image.
      layers: convolutions and dense layers, those of shortcuts too.
      parameters: their number, those of batch normalization too.
      multiply_adds: multiply-accumulate operations of its layers, forward, for one image.
    """

    name: str
    output: tuple[int, ...]
    layers: int
    parameters: int
    multiply_adds: int

    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell for each heading."""
        numbers = (self.layers, self.parameters, self.multiply_adds)
        return (self.name, "×".join(map(str, self.output)), *(f"{n:,}" for n in numbers))


@dataclasses.dataclass(frozen=True)
class NetSummary:
    """The stages in the order in which they are called; `print` it or read `stages`."""

    stages: tuple[StageSummary, ...]

    @property
    def total(self) -> StageSummary:
        """All stages together; its output is the last one's."""

        def add_up(field):
            return sum(getattr(stage, field) for stage in self.stages)

        counts = map(add_up, ("layers", "parameters", "multiply_adds"))
        return StageSummary("total", self.stages[-1].output, *counts)

    @property
    def flops(self) -> int:
        """Floating-point operations for one image, forward: two per multiply-add."""
        return 2 * self.total.multiply_adds

    def __str__(self) -> str:
        lines = [_HEADINGS, *(stage.cells() for stage in (*self.stages, self.total))]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        text = [
            "  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines
        ]
        return "\n".join(
            [*text, f"{self.flops:,} FLOPs, at two per multiply-add, for one image forward"]
        )


def describe_net(net: nn.Module, image_shape: tuple[int, int, int]) -> NetSummary:
    """List the stages of a net of `orthojax.models`: what they hold and what they cost.

    Columns: submodule; shape of its output for one image; convolutions and dense layers, those of
    shortcuts too; parameters, those of batch normalization too; multiply-adds of those layers,
    forward, for one image. A multiply-add is one entry of a kernel times one input, added up;
    products with the zeros of padding count, as is usual in the literature. BN, ReLU, pooling and
    biases do not. Nothing is computed but shapes.

    Args:
      net: a `ConvNet`, or another module that is called as `net(images, train=...)` and calls
        every submodule once.
      image_shape: height, width and channels.

    Returns:
      A `NetSummary`; `str` of it is the table as text. For one of parameters see
      `orthojax.describe`.

    Raises:
      ConfigError: `net` is no linen module, or `image_shape` not three positive integers.

    Example:
      >>> from orthojax.models import PlainNet
      >>> print(describe_net(PlainNet(depth=8, width=4), (8, 8, 3)))
      stage    output  layers  parameters  multiply-adds
      stem      8×8×4       1         116          6,912
      stage_1   8×8×4       2         304         18,432
      stage_2   4×4×8       2         896         13,824
      stage_3  2×2×16       2       3,520         13,824
      head         10       1         170            160
      total        10       8       5,006         53,152
      106,304 FLOPs, at two per multiply-add, for one image forward
    """
    if not isinstance(net, nn.Module):
        raise checks.refuse("net", net, "a Flax linen module, such as PlainNet()")
    expected = "height, width and channels, such as (32, 32, 3)"
    checks.integers("image_shape", image_shape, 1, expected, high=2**24, lengths=(3,))
    outputs = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            outputs["/".join(context.module.path)] = jax.tree.leaves(result)[0].shape[1:]
        return result

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)
    params = variables["params"]
    # A module returns later than those that it calls; the net itself has no name.
    stages = [path for path in outputs if path and "/" not in path]
    return NetSummary(tuple(_stage(path, params.get(path, {}), outputs) for path in stages))


def _stage(name, params, outputs):
    layers = multiply_adds = 0
    for row in describe({name: params}).rows:
        if row.fan:
            *positions, _ = outputs[row.path.rpartition("/")[0]]
            layers += row.blocks
            multiply_adds += row.blocks * math.prod(row.fan) * math.prod(positions)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights_only(params)))
    return StageSummary(name, outputs[name], layers, parameters, multiply_adds)
