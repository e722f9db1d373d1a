"""The Flax linen face: modulation sites behind layers, and the axes of their kernels."""

from orthojax.extras import require

require("flax", "orthojax.linen")

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import jax
import numpy as np
from flax import linen as nn
from flax.core import DenyList
from flax.linen.recurrent import DenseParams

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.sites import SITE, init_site, modulate
from orthojax.tree_paths import shapes_by_path

PARAMETRIC = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)

_positions: contextvars.ContextVar[Iterator[int] | None] = contextvars.ContextVar(
    "positions", default=None
)


@contextlib.contextmanager
def counted_sites() -> Iterator[None]:
    """While a net is called in this context, its sites are numbered in the order of the calls."""
    token = _positions.set(itertools.count())
    try:
        yield
    finally:
        _positions.reset(token)


def site_of(module: nn.Module) -> jax.Array | None:
    """The site among the parameters of a bound module, made while it is initialized.

    Returns:
      float32 `(3,)`, see `orthojax.init_site`, or None if the parameters hold no site.
    """
    scope, counter = module.scope, _positions.get()
    assert scope is not None, "the module is not bound"
    position = 0 if counter is None else next(counter)
    if module.is_initializing() and not scope.has_variable("params", SITE):
        scope.put_variable("params", SITE, init_site(position))
    return scope.get_variable("params", SITE)


def is_parametric(module: nn.Module, path: tuple[str, ...]) -> bool:
    """Whether a module is one of Flax's convolutions or dense layers."""
    del path
    return isinstance(module, PARAMETRIC)


class Modulated(nn.Module):
    """Any linen model, with a modulation site behind each of its parametric layers.

    The forward pass is that of `net`. So are the parameters, but that each layer has one more,
    `modulation_site`: a checkpoint of `net` fits, and parameters without sites give the net as it
    is, unmodulated. Train with `orthojax.modulation`.

    What the net returns is not touched: the site of a layer whose output has the shape of one of
    the net's outputs, and that no such layer follows, only measures.

    Attributes:
      net: the model; `nn.scan`, `nn.remat`, `nn.vmap`, branches and shared layers are fine.
      where: `(module, path) -> bool`, which modules get a site behind them; by default Conv,
        ConvLocal, ConvTranspose, Dense, DenseGeneral and Einsum.

    Example:
      >>> import jax, jax.numpy as jnp, optax, orthojax
      >>> from flax.training.train_state import TrainState
      >>> net = Modulated(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(2)]))
      >>> params = net.init(jax.random.key(0), jnp.ones((4, 8)))["params"]
      >>> sorted(params["layers_0"])
      ['bias', 'kernel', 'modulation_site']
      >>> tx = orthojax.modulation(optax.sgd(0.1, momentum=0.9))
      >>> state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    Raises:
      ConfigError: `net` is no module or `where` no function.
      ConfigError: `where` chose a module that does not return one array.
    """

    net: nn.Module
    where: Callable[[nn.Module, tuple[str, ...]], bool] = is_parametric

    def __post_init__(self):
        _check_module(self.net)
        checks.function("where", self.where, "a function (module, path) -> bool")
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = []

        def intercept(call, args, kwargs, context):
            y = call(*args, **kwargs)
            module = context.module
            if context.method_name != "__call__" or not self.where(module, module.path):
                return y
            if not isinstance(y, jax.Array):
                raise ConfigError(
                    f"`where` chose {'/'.join(module.path)}, a {type(module).__name__}, but a site "
                    f"stands behind one array and this returns a {type(y).__name__}"
                )
            site = site_of(module)
            calls.append((module.scope, y.shape))
            return y if site is None else modulate(y, site)

        with counted_sites(), nn.intercept_methods(intercept):
            outputs = self.net(*args, **kwargs)
        if self.is_initializing():
            _mark_outputs(calls, {jax.numpy.shape(leaf) for leaf in jax.tree.leaves(outputs)})
        return outputs


def _mark_outputs(calls, shapes):
    for shape in shapes:
        last = next((scope for scope, found in reversed(calls) if found == shape), None)
        # A layer inside a lifted transformation is past; it is not the net's last one either.
        if last is not None:
            with contextlib.suppress(flax.errors.InvalidScopeError):
                last.put_variable("params", SITE, init_site(-1.0))


def axes(
    net: nn.Module, *inputs: Any, **arguments: Any
) -> dict[str, KernelAxes | str | ConfigError]:
    """Which parameters of a linen model are kernels, and their axes, from the model itself: a view.

    `net.init` is traced, and nothing computed. The layers that make the parameters say what they
    are: Dense, DenseGeneral, Einsum, Conv, ConvLocal and ConvTranspose, with their groups, within
    attention and recurrent cells too. Stack axes are found wherever `nn.scan`, `nn.vmap`,
    `nn.remat_scan` and others put them. A subclass counts as the layer whose code makes the kernel.

    Args:
      net: The model.
      *inputs: What `net.init` is called with after the key; of arrays, which may be
        `jax.ShapeDtypeStruct`, the shapes and dtypes alone matter.
      **arguments: Likewise, by name.

    Returns:
      A dictionary from the path of each parameter to its `KernelAxes`, to the reason why it is no
      kernel, or to a `ConfigError`, for a parameter of rank 2 or more that an own module makes with
      `self.param`; it is raised when the parameter is to be used. Add what you know:
      `axes(net, x) | {"own/weight": KernelAxes(...), "own/tokens": None}`. Axes count from the end,
      so that an ensemble made by `jax.vmap` of `init` is read rightly as well.

    Raises:
      ConfigError: `net` is no linen module.

    Example:
      >>> import jax.numpy as jnp, optax, orthojax
      >>> net = nn.Sequential([nn.Conv(8, (3, 3), feature_group_count=2), nn.DenseGeneral((2, 3))])
      >>> view = axes(net, jnp.ones((1, 8, 8, 4)))
      >>> view["layers_0/kernel"].feature_groups, view["layers_1/kernel"].outputs
      (2, (-2, -1))
      >>> tx = optax.chain(orthojax.optax_ortho(1e-4, view=view), optax.sgd(0.1))
    """
    _check_module(net)
    leaves, tree = jax.tree.flatten((inputs, arguments))
    arrays = {
        place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for place, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    reader = _Reader()

    def parameters(arrays):
        inputs, arguments = tree.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves))
        with nn.intercept_methods(reader.intercept):
            # `nn.jit` keeps what it has traced; the name of nothing makes this a trace of its own.
            alone = DenyList(("intermediates", f"axes {next(_traces)}"))
            variables = net.init(jax.random.key(0), *inputs, mutable=alone, **arguments)
        return variables.get("params", {})

    shapes = shapes_by_path(jax.eval_shape(parameters, arrays))
    return {
        path: reader.of(path, shape, shapes.get(path + _MARK))
        for path, shape in shapes.items()
        if _MARK not in path
    }


# Beside a kernel stands, while `axes` traces, an array of its rank without elements. Its first axis
# is 0 and the others are longer than any stack. Whatever stacks or turns kernels does it to both.
_MARK = ":axes"
_FAR = 10**9
_traces = itertools.count()


def _mark(rank: int) -> tuple[int, ...]:
    return (0, *range(_FAR, _FAR + rank - 1))


class _Reader:
    """What modules say of the parameters that they make, by path, as these are inside of stacks."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.found: dict[str, tuple[KernelAxes | str | None, tuple[int, ...], str]] = {}

    def intercept(self, call, args, kwargs, context):
        if context.method_name == "param":
            return call(*args, **kwargs)
        module, code = context.module, context.orig_method.func.__module__
        this = module, str(code).partition(".")[0] in ("flax", "orthojax"), args, kwargs
        # What is there already was made by the call around this one, or by `setup`.
        around = self.calls[-1] if self.calls else this
        self.read(*around if around[0].scope is module.scope else (module,))
        self.calls.append(this)
        try:
            y = call(*args, **kwargs)
        finally:
            self.calls.pop()
        self.read(*this)
        return y

    def read(self, module, ours=False, args=(), kwargs=None):
        """Reads the parameters of a module that nobody has read; `ours`: a layer made them."""
        scope = module.scope
        if scope is None or not scope.is_mutable_collection("params"):
            return
        parameters = dict(scope.variables().get("params", {}))
        for name, value in parameters.items():
            if isinstance(value, Mapping) or name.endswith(_MARK):
                continue
            path = "/".join((*scope.path, name))
            if path not in self.found:
                shape = jax.numpy.shape(nn.unbox(value))
                said = _said(module, name, len(shape), args, kwargs or {}) if ours else None
                self.found[path] = said, shape, type(module).__name__
            said, shape, _ = self.found[path]
            if isinstance(said, KernelAxes) and name + _MARK not in parameters:
                scope.put_variable("params", name + _MARK, jax.numpy.zeros(_mark(len(shape))))

    def of(
        self, path: str, shape: tuple[int, ...], mark: tuple[int, ...] | None
    ) -> KernelAxes | str | ConfigError:
        """What a parameter is, given its own shape and that of its mark."""
        said, inner, module = self.found.get(path, (None, shape, "a function"))
        if isinstance(said, KernelAxes):
            places = {size: axis - len(shape) for axis, size in enumerate(mark or ())}
            outer = [places[size] for size in _mark(len(inner)) if size in places]
            if len(mark or ()) == len(shape) and tuple(shape[axis] for axis in outer) == inner:
                return said.at(outer)
            return question(path, shape, f"a transformation of {module}", "linen")
        if isinstance(said, str):
            return said
        return question(path, shape, module, "linen") if len(inner) > 1 else f"rank {len(inner)}"


def question(path: str, shape: tuple[int, ...], maker: str, face: str) -> ConfigError:
    """What is asked about a parameter that no layer of Flax made."""
    return ConfigError(
        f"parameter {path!r} of shape {shape}, from {maker}: what are its axes? Say it, or None if"
        f" it is no kernel, in view=orthojax.{face}.axes(...) | {{{path!r}:"
        " KernelAxes(inputs=..., outputs=...)}; or leave it out by `mask`"
    )


def _said(module, name, rank, args, kwargs) -> KernelAxes | str | None:
    """What a layer's parameter of this rank is; None: unknown."""
    if name != "kernel":
        return f"named {name}"
    window, before, last = tuple(range(rank - 2)), (rank - 2,), (rank - 1,)
    match module:
        case nn.Dense() | DenseParams():
            return KernelAxes(before, last)
        case nn.DenseGeneral():
            stack, first = np.size(module.batch_dims), rank - np.size(module.features)
            return KernelAxes(tuple(range(stack, first)), tuple(range(first, rank)))
        case nn.Conv():
            groups = module.feature_group_count
            return KernelAxes(window + before, last, window, groups)
        case nn.ConvTranspose(transpose_kernel=True):
            return KernelAxes(window + last, before, window)
        case nn.ConvTranspose():
            return KernelAxes(window + before, last, window)
        case nn.ConvLocal():
            return KernelAxes(before, last)  # the places of the output are a stack
        case nn.Einsum():
            equation = [*args[1:], kwargs.get("einsum_str"), module.einsum_str]
            return of_einsum(next(filter(None, equation)))
    return None


def of_einsum(equation: str) -> KernelAxes | None:
    """The axes of the second operand, the kernel; None where they are no matrix's."""
    operands, _, result = equation.replace(" ", "").partition("->")
    x, kernel = operands.split(",")
    if "." in kernel or any(index not in x and index not in result for index in kernel):
        return None
    inputs = tuple(axis for axis, index in enumerate(kernel) if index not in result)
    outputs = tuple(axis for axis, index in enumerate(kernel) if index not in x)
    return KernelAxes(inputs, outputs) if inputs and outputs else None


def _check_module(net):
    if not isinstance(net, nn.Module):
        raise checks.refuse("net", net, "a Flax linen module, not a class or a function")
