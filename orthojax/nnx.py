"""The Flax NNX face: the axes of the kernels of a model."""

from orthojax.extras import require

require("flax", "orthojax.nnx")

from flax import nnx

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.linen import of_einsum, question
from orthojax.matrices import KernelAxes
from orthojax.tree_paths import shapes_by_path


def axes(model: nnx.Module) -> dict[str, KernelAxes | str | ConfigError]:
    """Which parameters of an NNX model are kernels, and their axes, from its modules: a view.

    The layers say what they are: Linear, LinearGeneral, Einsum, Conv and ConvTranspose, with their
    groups, within attention and recurrent cells too, and subclasses of them. Axes before those of
    the layer are stack axes, as `nnx.vmap` makes them.

    Args:
      model: The model; its parameters may be `jax.ShapeDtypeStruct`, as of `nnx.eval_shape`.

    Returns:
      As `orthojax.linen.axes`: a dictionary from the path of each `nnx.Param` to its axes, a reason
      or a `ConfigError`, to which answers can be added with `|`.

    Raises:
      ConfigError: `model` is no NNX module.

    Example:
      >>> model = nnx.MultiHeadAttention(2, in_features=4, qkv_features=6, rngs=nnx.Rngs(0))
      >>> view = axes(model)
      >>> view["query/kernel"].outputs, view["out/kernel"].inputs, view["out/bias"]
      ((-2, -1), (-3, -2), 'named bias')
    """
    if not isinstance(model, nnx.Module):
        raise checks.refuse("model", model, "an NNX module, not a class or a state")
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    shapes = shapes_by_path(nnx.state(model, nnx.Param))
    return {
        path: _axes(path, shape, modules.get(path.rpartition("/")[0]))
        for path, shape in shapes.items()
    }


def _axes(path, shape, module) -> KernelAxes | str | ConfigError:
    name = path.rpartition("/")[2]
    if name != "kernel" and type(module).__module__.startswith("flax."):
        return f"named {name}"
    if len(shape) < 2:
        return f"rank {len(shape)}"
    layer, axes = _layer(module) if name == "kernel" else ((), None)
    if axes is None or shape[len(shape) - len(layer) :] != layer:
        return question(path, shape, type(module).__name__, "nnx")
    return axes.at(range(-len(layer), 0))


def _layer(module) -> tuple[tuple[int, ...], KernelAxes | None]:
    """The shape of a layer's kernel by itself, and its axes."""
    match module:
        case nnx.Linear():
            return (module.in_features, module.out_features), KernelAxes((0,), (1,))
        case nnx.LinearGeneral():
            stack = tuple(module.batch_axis.values())
            shape = (*stack, *module.in_features, *module.out_features)
            first = len(shape) - len(module.out_features)
            inputs, outputs = tuple(range(len(stack), first)), tuple(range(first, len(shape)))
            return shape, KernelAxes(inputs, outputs)
        case nnx.Conv() | nnx.ConvTranspose():
            window, last = tuple(range(len(module.kernel_shape) - 2)), len(module.kernel_shape) - 1
            inputs, outputs = (*window, last - 1), (last,)
            if getattr(module, "transpose_kernel", False):
                inputs, outputs = (*window, last), (last - 1,)
            groups = getattr(module, "feature_group_count", 1)
            return tuple(module.kernel_shape), KernelAxes(inputs, outputs, window, groups)
        case nnx.Einsum():
            return tuple(module.kernel_shape), of_einsum(module.einsum_str)
    return (), None
