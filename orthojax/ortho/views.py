"""Views: which parameters are kernels, and which of their axes are input, output and stack.

A view is a tree of `KernelAxes`, with the structure of the parameters or a prefix of it, or a
function from the parameters to one, as are the dimension numbers of `optax.contrib.muon`. `None`
leaves a parameter alone; so does a string, the reason that `orthojax.describe` shows. Trees are
matched by path, so that a dictionary like `{"stage1/scanned/conv/kernel": KernelAxes(...)}` is one
as well. A `ConfigError` as a leaf is a question that only the caller can answer: it is raised as
soon as the parameter is to be used, and shown by `orthojax.describe`.

The ready-made views below make such functions. They know the layouts of Flax (linen and NNX),
Equinox and Haiku, and take everything else from the parameters themselves: the types of Equinox
modules; elsewhere the names that the library gives, the bias beside a kernel, the normalization
around it. A shape alone says little: a stack of dense layers has the rank of a 1-D convolution.
Where only a guess would be left, they ask.
"""

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.tree_paths import path_name, shapes_by_path

#: What a message says where `optax.inject_hyperparams` may have called a function.
INJECTED = (
    "; with `optax.inject_hyperparams`, which takes a function for a schedule, name it there:"
    " inject_hyperparams(..., static_args=('mask', 'view'))"
)

View = Callable[[Any], Any] | Any
Shape = tuple[int, ...]

# The transformations of linen put their names before that of the class: `ScanCheckpointBlock_0`.
_LIFTED = r"(?:Remat_scan|Scan|Vmap|Checkpoint|Jit|Map_variables|Custom_vjp|Add_metadata_axis)"
_LIFTED_CLASS = re.compile(rf"{_LIFTED}*([A-Z]\w*)_\d+")
_MAPPED_CLASS = re.compile(rf"{_LIFTED}*?(?:Remat_scan|Scan|Vmap){_LIFTED}*[A-Z]\w*_\d+")


def flax(
    stacked: tuple[str, ...] = ("scanned",),
    *,
    depthwise: tuple[str, ...] = ("depthwise",),
    feature_groups: Mapping[str, int] | None = None,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Flax parameters, linen's and NNX's; the default of every function here.

    Kernels are the parameters called `kernel`, with the output last: `Dense` `(in, out)`, `Conv`
    `(*window, in, out)`, `DenseGeneral` `(*in, *out)`. Nothing else is, whatever its rank: biases,
    scales, embeddings, tokens. Leading axes of a stack (`nn.scan`, `nn.vmap`, `nnx.vmap`, a vmapped
    `init`) are found, in this order, by

    1. the bias of the layer: `(out,)` in one layer, `(stack, out)` in a stack; it also tells the
       two output axes of a `DenseGeneral`, and the output of a transposed kernel;
    2. names: modules that `stacked` names; linen's `Dense_0`, also as `VmapDense_0`; attention with
       its `query` and `out`;
    3. the normalization around a kernel without bias: if all parameters of a module share their
       leading axes, and scales have them too, the module is a stack.

    Else a kernel of rank 2 is dense, one of rank 4 a 2-D convolution (unless linen's default names
    say that it was mapped), one of rank 3 a 1-D convolution if its module's name contains `conv`.
    Everything else is a question. A convolution from one channel and a depthwise one, and grouped
    ones in general, look alike, too: `depthwise` and `feature_groups` tell them apart.

    Args:
      stacked: Fragments of module names. Every module on the path whose name contains one adds a
        leading stack axis, as `nn.scan` and `nn.vmap` with `variable_axes={"params": 0}` do.
      depthwise: Fragments of names of modules with `feature_group_count == in_features`. Every
        output is taken by itself; with a channel multiplier, give `feature_groups` as well.
      feature_groups: Pattern of the path to `feature_group_count`.
      overrides: Pattern of the path to axes (or `None`: no kernel); first of all rules. Negative
        axes serve stacks of any depth.

    Patterns are matched as by `fnmatch` against the whole path; the first match counts.

    Returns:
      A function from the parameters to a dictionary from path to `KernelAxes`, the reason why the
      parameter is no kernel, or the question as a `ConfigError`. It raises `ConfigError` for a
      pattern that matches no parameter.

    Raises:
      ConfigError: Fragments that are no tuple of strings; a rule that is no dictionary from
        patterns to what is said above.

    Example:
      >>> import jax
      >>> params = {"layers": {"Dense_0": {"kernel": jax.ShapeDtypeStruct((6, 8, 4), "float32")}}}
      >>> axes = flax()(params)["layers/Dense_0/kernel"]
      >>> axes.inputs, axes.outputs, axes.stack(3)
      ((1,), (2,), (0,))
      >>> heads = KernelAxes(inputs=(-3,), outputs=(-2, -1))
      >>> params = {"q_proj": {"kernel": jax.ShapeDtypeStruct((16, 4, 8), "float32")}}
      >>> flax(overrides={"*q_proj/kernel": heads})(params)["q_proj/kernel"] == heads
      True
    """
    layout = _Layout("flax", "kernel", ("bias", "scale"), "bias", _flax_rank)
    return _channels_last(layout, stacked, depthwise, feature_groups, overrides)


def haiku(
    stacked: tuple[str, ...] = ("layer_stack",),
    *,
    depthwise: tuple[str, ...] = ("depthwise",),
    feature_groups: Mapping[str, int] | None = None,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Haiku parameters: those called `w`, output last (transposed: last but one).

    Biases `b`, `scale` and `offset` of normalization and `embeddings` are not kernels. The rank of
    a layer is known from the names that Haiku gives (`linear`, `conv2_d`), axes before it are stack
    axes; under other names, by the bias, as in `flax`.

    Args:
      stacked: Fragments of module names that add a leading stack axis each
        (`hk.experimental.layer_stack`).
      depthwise, feature_groups, overrides: As in `flax`.

    Raises:
      ConfigError: As `flax`.

    Example:
      >>> import jax
      >>> w = jax.ShapeDtypeStruct((3, 3, 32, 16), "float32")
      >>> haiku()({"net/~/conv2_d_transpose": {"w": w}})["net/~/conv2_d_transpose/w"].outputs
      (2,)
    """
    layout = _Layout("haiku", "w", ("b",), "b", _haiku_rank)
    return _channels_last(layout, stacked, depthwise, feature_groups, overrides)


def equinox(
    *,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Equinox models, by the types of their modules; `weight` has the output first.

    Kernels are the weights of `eqx.nn.Linear` `(out, in)`, of `eqx.nn.Conv` and `ConvTranspose`
    `(out, in, *window)`, and of recurrent cells, and of subclasses of these. Axes before those of
    the layer are stack axes (`eqx.filter_vmap` over keys); groups of a convolution are its own.
    Embeddings and normalizations, whose parameter is called `weight` as well, are not kernels, nor
    are parameters of other names. A `weight` of rank 2 or more in any other module is a question.

    Args:
      overrides: Pattern of the path to axes (or `None`: no kernel); first of all rules.

    Raises:
      ConfigError: As `flax`.

    Example:
      >>> import equinox as eqx, jax
      >>> model = eqx.nn.MLP(3, 2, width_size=8, depth=1, key=jax.random.key(0))
      >>> axes = equinox()(eqx.filter(model, eqx.is_array))
      >>> axes["layers/0/weight"].matrix_shape((8, 3)), axes["layers/0/bias"]
      ((3, 8), 'named bias')
    """

    _check_rules(overrides=overrides)

    def view(params):
        _check_called_with_parameters(params)
        shapes, owners = shapes_by_path(params), _owners(params)
        axes = {path: _equinox_axes(path, shape, owners[path]) for path, shape in shapes.items()}
        return _with_overrides(params, axes, overrides)

    return view


class _Layout(NamedTuple):
    """How a library with the output last calls things.

    Attributes:
      view: Name of the view, for messages.
      kernel: Name of its kernels.
      vectors: Names of parameters that have one axis in a layer by itself.
      bias: Name of the bias beside a kernel.
      rank: Function from module names to the rank of the layer's kernel, or `None`.
    """

    view: str
    kernel: str
    vectors: tuple[str, ...]
    bias: str
    rank: Callable[[list[str]], int | None]


class _Reading(NamedTuple):
    """Of a kernel: number of stack and of output axes, whether the output is before the input."""

    stack: int
    outputs: int = 1
    transposed: bool = False


def _channels_last(layout, stacked, depthwise, feature_groups, overrides):
    _check_fragments("stacked", stacked)
    _check_fragments("depthwise", depthwise)
    _check_rules(feature_groups=feature_groups, overrides=overrides)

    def view(params):
        _check_called_with_parameters(params)
        shapes = shapes_by_path(params)
        evidence = _Evidence(layout, shapes, tuple(stacked))
        _check_patterns("feature_groups", feature_groups, params)
        axes = {}
        for path, shape in shapes.items():
            *modules, name = path.split("/")
            if name != layout.kernel:
                axes[path] = _named_otherwise(name)
                continue
            reading = evidence.reading(path)
            if isinstance(reading, _Reading):
                alone = shape[-2] == 1 and _named(modules, depthwise)
                groups = _matching(feature_groups, path, shape[-1] if alone else 1)
                heads = evidence.attention(modules) is not None
                reading = _axes(reading, len(shape), groups, heads)
            axes[path] = reading
        return _with_overrides(params, axes, overrides)

    return view


def _axes(reading: _Reading, rank: int, groups: int, heads: bool) -> KernelAxes:
    first_output = rank - reading.outputs
    alone = reading.outputs > 1 or heads
    window = () if alone else tuple(range(reading.stack, rank - 2))
    if reading.transposed:
        return KernelAxes((*window, rank - 1), (rank - 2,), window, groups)
    inputs = tuple(range(reading.stack, first_output))
    return KernelAxes(inputs, tuple(range(first_output, rank)), window, groups)


class _Evidence:
    """What the shapes and names of a whole tree say about the axes of a kernel in it."""

    def __init__(self, layout: _Layout, shapes: dict[str, Shape], stacked: tuple[str, ...]):
        self.layout, self.shapes, self.stacked = layout, shapes, stacked
        self.below: dict[
            str, list[str]
        ] = {}  # module path -> paths of all parameters in it, at any depth
        for path in shapes:
            for module in _modules_around(path):
                self.below.setdefault(module, []).append(path)
        self.stack_of_module = functools.cache(self._stack_of_module)

    def reading(self, path: str) -> _Reading | str | ConfigError:
        """How a kernel is to be read, why it is none, or the question what it is."""
        *modules, _ = path.split("/")
        shape = self.shapes[path]
        if len(shape) < 2:
            return f"rank {len(shape)}"
        named = sum(_named([module], self.stacked) for module in modules)
        known, attention = self._known_stack(path), self.attention(modules)
        if self._bias_of(path) is not None:
            return self._by_bias(path, named, known, attention)
        transposed = self.layout.view == "haiku" and _named(modules, ("transpose",))
        if known is not None and known >= named:
            return _Reading(known, 1, transposed and len(shape) - known > 2)
        around = self._by_surroundings(path)
        if around is None and not named:
            return self._question(path)
        stack = max(named, around or 0)
        if attention is not None and attention >= stack:
            return _Reading(attention, 1 if modules[-1] == "out" else 2)
        rank = len(shape) - stack
        if rank < 2 or known is not None:
            return self._question(path, f"{stack} leading axes are said to be stack axes")
        mapped = stack == 0 and any(map(_MAPPED_CLASS.fullmatch, modules))
        if rank == 2 or (rank == 3 and _like_conv(modules)) or (rank == 4 and not mapped):
            return _Reading(stack, 1, transposed and rank > 2)
        return self._question(path)

    def _by_bias(self, path, named, known, attention):
        shape, bias = self.shapes[path], self._bias_of(path)
        readings = list(_readings(shape, bias))
        # Of several readings that the bias leaves, the one that a name confirms.
        for stack in (known, attention, named or None):
            readings = [r for r in readings if r.stack == stack] or readings
        if not readings and known is not None and known >= named:
            return _Reading(known)
        if len(readings) != 1:
            why = f"its bias of shape {bias} does not tell: {_question_of(shape)}"
            return self._question(path, why)
        if readings[0].stack < named:
            return self._question(
                path,
                f"by the name of its module {named} of its leading axes are stack axes, by its bias"
                f" of shape {bias} {readings[0].stack}",
            )
        return readings[0]

    def _known_stack(self, path) -> int | None:
        """Number of stack axes of a layer whose class, and so the rank of its kernel, is known."""
        rank = self.layout.rank(path.split("/")[:-1])
        return (
            None if rank is None or rank > len(self.shapes[path]) else len(self.shapes[path]) - rank
        )

    def _bias_of(self, path) -> Shape | None:
        module = path.rpartition("/")[0]
        return self.shapes.get(f"{module}/{self.layout.bias}" if module else self.layout.bias)

    def _by_surroundings(self, path) -> int | None:
        """Number of stack axes by the parameters around: 0 if they say nothing, `None`: unsure."""
        for module in _modules_around(path):
            stack = self.stack_of_module(module)
            if stack is None:
                continue
            lead, certain = stack
            if not lead or self.shapes[path][: len(lead)] != lead:
                return 0
            if len(self.shapes[path]) - len(lead) < 2:
                return 0
            return len(lead) if certain else None
        return 0

    def _stack_of_module(self, module) -> tuple[Shape, bool] | None:
        """The stack axes that all parameters of a module share, and whether they are the module's.

        `None` if there is no vector in it to tell. They may as well be those of a submodule that
        happen to fit, if all vectors sit in submodules with kernels of their own.
        """
        vectors = [
            path
            for path in self.below[module]
            if path.rpartition("/")[2] in self.layout.vectors and self.shapes[path]
        ]
        leads = {lead for path in vectors if (lead := self._lead(path)) is not None}
        if not leads:
            return None
        lead = leads.pop()
        if leads or any(self.shapes[path][: len(lead)] != lead for path in self.below[module]):
            return (), True
        return lead, any(not self._has_kernel(module, path) for path in vectors)

    def _lead(self, vector) -> Shape | None:
        shape = self.shapes[vector]
        module, _, name = vector.rpartition("/")
        kernel = self.shapes.get(f"{module}/{self.layout.kernel}" if module else self.layout.kernel)
        if kernel is None or name != self.layout.bias:
            return shape[:-1]
        stacks = {reading.stack for reading in _readings(kernel, shape)}
        return shape[: stacks.pop()] if len(stacks) == 1 else None

    def _has_kernel(self, module, path) -> bool:
        """Whether the child of the module in which this parameter is holds a kernel."""
        rest = path[len(module) + 1 :] if module else path
        child, slash, _ = rest.partition("/")
        if not slash:
            return False
        inside = self.below[f"{module}/{child}" if module else child]
        return any(name.rpartition("/")[2] == self.layout.kernel for name in inside)

    def attention(self, modules) -> int | None:
        """Number of stack axes of Flax's attention, known by its `query` and `out`; else `None`."""
        if not modules or modules[-1] not in ("query", "key", "value", "out"):
            return None
        query, out = (
            self.shapes.get("/".join([*modules[:-1], name, self.layout.kernel]))
            for name in ("query", "out")
        )
        if query is None or out is None or len(query) != len(out) or len(query) < 3:
            return None
        stack = len(query) - 3
        heads = query[:stack] == out[:stack] and query[stack + 1 :] == out[stack : stack + 2]
        dense = query[:-2] == out[:-2] and query[-1] == out[-2]
        return stack if heads and not dense else None

    def _question(self, path, why=None) -> ConfigError:
        shape, view = self.shapes[path], self.layout.view
        return ConfigError(
            f"parameter {path!r} of shape {shape}: {why or _question_of(shape)}? Say its axes in"
            f" view=views.{view}(overrides={{{path!r}: KernelAxes(inputs=..., outputs=...)}}), or,"
            f" of a stack, put a fragment of its module's name into views.{view}(stacked=(...,));"
            " or leave it out by `mask`"
        )


def _question_of(shape) -> str:
    rank = len(shape)
    if rank == 2:
        return "a dense kernel, or a stack of vectors"
    if rank == 3:
        return "a 1-D convolution, two input or two output axes, or a stack of dense kernels"
    return f"a convolution over {rank - 2} axes, or a stack of kernels"


def _readings(kernel: Shape, bias: Shape) -> Iterator[_Reading]:
    """How a kernel can be read if this is the bias of its layer."""
    for stack in range(len(bias)):
        outputs = len(bias) - stack
        if len(bias) >= len(kernel) or kernel[:stack] != bias[:stack]:
            continue
        if kernel[-outputs:] == bias[stack:]:
            yield _Reading(stack, outputs)
        elif outputs == 1 and len(kernel) - stack > 2 and kernel[-2] == bias[-1]:
            yield _Reading(stack, 1, transposed=True)


def _modules_around(path) -> Iterator[str]:
    """The modules that hold a parameter, innermost first; the last is the whole tree, `''`."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _flax_rank(modules) -> int | None:
    match = _LIFTED_CLASS.fullmatch(modules[-1]) if modules else None
    return 2 if match and match[1] == "Dense" else None


def _haiku_rank(modules) -> int | None:
    name = modules[-1] if modules else ""
    convolution = re.search(r"conv([123])_d", name)
    if convolution:
        return int(convolution[1]) + 2
    return 2 if re.fullmatch(r"linear(_\d+)?", name) else None


def _like_conv(modules) -> bool:
    return bool(modules) and "conv" in modules[-1].lower()


# What Equinox's layers are by the names of their classes: rank of `weight` without a window.
_EQUINOX_KERNELS = {"Linear": 2, "Conv": 2, "ConvTranspose": 2, "GRUCell": 2, "LSTMCell": 2}


def _equinox_axes(path, shape, owner) -> KernelAxes | str | ConfigError:
    name = path.rpartition("/")[2]
    if not name.startswith("weight"):
        return _named_otherwise(name)
    bases = [c.__name__ for c in type(owner).__mro__ if c.__module__.startswith("equinox.nn.")]
    kind = next((base for base in bases if base in _EQUINOX_KERNELS), None)
    if kind is None and bases:
        return f"of an eqx.nn.{bases[0]}"
    if kind is None and len(shape) < 2:
        return f"rank {len(shape)}"
    if kind is None:
        return ConfigError(
            f"parameter {path!r} of shape {shape} is in a {type(owner).__name__}, which is no layer"
            f" of equinox.nn: is it a kernel, and is its output first? Give its axes in"
            f" view=views.equinox(overrides={{{path!r}: KernelAxes(inputs=..., outputs=...)}}), or"
            " None there if it is none. (Types are looked for in the Equinox model itself, as"
            " eqx.filter(model, eqx.is_inexact_array) has it.)"
        )
    window = getattr(owner, "num_spatial_dims", 0)
    stack = len(shape) - 2 - window
    if stack < 0:
        return f"rank {len(shape)} in an eqx.nn.{kind}"
    spatial = tuple(range(stack + 2, len(shape)))
    groups = getattr(owner, "groups", 1)
    return KernelAxes((*spatial, stack + 1), (stack,), spatial, groups)


def _owners(params) -> dict[str, Any]:
    """The object that each leaf is an attribute or an item of, by path."""
    owners = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        owner = params
        for key in path[:-1]:
            if isinstance(key, jax.tree_util.GetAttrKey):
                owner = getattr(owner, key.name, None)
            elif isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey):
                owner = owner[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
            else:
                owner = None
                break
        owners[path_name(path)] = owner
    return owners


def _with_overrides(params, axes, overrides) -> dict[str, KernelAxes | str | ConfigError]:
    _check_patterns("overrides", overrides, params)
    found = {path: _matching(overrides, path, read) for path, read in axes.items()}
    return {path: "overridden" if read is None else read for path, read in found.items()}


def _check_called_with_parameters(params):
    if getattr(params, "shape", None) == ():
        raise ConfigError(
            f"the view was called with a number, {params!r}, for parameters{INJECTED}"
        )


def _check_fragments(name, fragments):
    """A string by itself would be taken for the fragments that its characters are."""
    strings = isinstance(fragments, tuple | list) and all(isinstance(f, str) for f in fragments)
    if not strings or "" in fragments:
        raise checks.refuse(name, fragments, "a tuple of fragments of names, such as ('scanned',)")


def _check_rules(**rules):
    for name, rule in rules.items():
        if rule is None:
            continue
        if not isinstance(rule, Mapping) or not all(isinstance(p, str) for p in rule):
            raise checks.refuse(name, rule, "a dictionary from patterns, such as '*/conv/kernel'")
        for pattern, value in rule.items():
            entry = f"{name}[{pattern!r}]"
            if name == "feature_groups":
                checks.integer(entry, value, 1)
            elif not (value is None or isinstance(value, KernelAxes)):
                raise checks.refuse(entry, value, "KernelAxes(inputs=..., outputs=...) or None")


def _check_patterns(name, patterns, params):
    """A pattern that matches nothing is a mistake, unless optax masked what it may be meant for."""
    masked = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in masked):
        return
    paths = shapes_by_path(params)
    for pattern in patterns or {}:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            nearest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise ConfigError(f"{name}: no parameter matches {pattern!r}{hint}")


def _named_otherwise(name) -> str:
    return f"named {name}" if name else "without a name"


def _matching(patterns, path, default):
    matches = (value for p, value in (patterns or {}).items() if fnmatch.fnmatchcase(path, p))
    return next(matches, default)


def _named(modules, fragments) -> bool:
    return any(fragment in module for module in modules for fragment in fragments)
