"""Views: which parameters are kernels, and which of their axes are input, output and stack.

A view is a tree of `KernelAxes`, with the structure of the parameters or a prefix of it, or a
function from the parameters to one, as are the dimension numbers of `optax.contrib.muon`. `None`
leaves a parameter alone; so does a string, the reason that `orthojax.describe` shows. Trees are
matched by path, so that a dictionary like `{"stage1/scanned/conv/kernel": KernelAxes(...)}` is one
as well. A `ConfigError` as a leaf is a question that only the caller can answer: it is raised as
soon as the parameter is to be used, and shown by `orthojax.describe`.

A model knows its axes: `orthojax.linen.axes` and `orthojax.nnx.axes` read them from Flax models,
and `equinox` below from the parameters, which are the model. `flax` and `haiku` have parameters
alone, their names and ranks. A shape says little: a stack of dense layers has the rank of a 1-D
convolution. Where only a guess would be left, they ask.
"""

import dataclasses
import difflib
import fnmatch
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
_MAPPED_CLASS = re.compile(
    r"(Checkpoint|Jit|Map_variables|Custom_vjp|Add_metadata_axis)*(Remat_scan|Scan|Vmap)[A-Z]\w*_\d+"
)
_ATTENTION = ("query", "key", "value", "out")


def flax(
    stacked: tuple[str, ...] = ("scanned",),
    *,
    depthwise: tuple[str, ...] = ("depthwise",),
    feature_groups: Mapping[str, int] | None = None,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Flax parameters, linen's and NNX's; the default of every function here.

    Kernels are the parameters called `kernel`, with the output last: `Dense` `(in, out)`, `Conv`
    `(*window, in, out)`. Nothing else is, whatever its rank: biases, scales, embeddings, tokens.
    Behind the stack axes that `stacked` says, a kernel with its bias `(out,)` has one output, and
    all else is input. Without a bias, one of rank 2 is dense, one of rank 4 a 2-D convolution, and
    one of rank 3 a 1-D convolution if its module's name contains `conv`.

    Everything else is a question. So is what a bias, a normalization around the kernel, or a name
    such as `ScanBlock_0` or `query` contradicts: stacks and attention have to be told. The model
    tells: `orthojax.linen.axes(net, x)` and `orthojax.nnx.axes(model)` read all of them, and the
    groups of convolutions, of which parameters say nothing: a grouped or depthwise convolution is
    read as an ordinary one unless `feature_groups` or `depthwise` name it.

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
      >>> axes = flax(stacked=("layers",))(params)["layers/Dense_0/kernel"]
      >>> axes.inputs, axes.outputs, axes.stack(3)
      ((1,), (2,), (0,))
      >>> heads = KernelAxes(inputs=(-3,), outputs=(-2, -1))
      >>> params = {"q_proj": {"kernel": jax.ShapeDtypeStruct((16, 4, 8), "float32")}}
      >>> flax(overrides={"*q_proj/kernel": heads})(params)["q_proj/kernel"] == heads
      True
    """
    layout = _Layout("flax", "kernel", ("bias", "scale"), "bias", lambda modules: None)
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
    axes; under other names as in `flax`.

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


def _channels_last(layout, stacked, depthwise, feature_groups, overrides):
    _check_fragments("stacked", stacked)
    _check_fragments("depthwise", depthwise)
    _check_rules(feature_groups=feature_groups, overrides=overrides)

    def view(params):
        _check_called_with_parameters(params)
        shapes = shapes_by_path(params)
        leads = _leads(layout, shapes)
        _check_patterns("feature_groups", feature_groups, params)
        axes = {}
        for path, shape in shapes.items():
            *modules, name = path.split("/")
            stack = sum(_named([module], stacked) for module in modules)
            if name != layout.kernel:
                axes[path] = _named_otherwise(name)
            elif len(shape) < 2:
                axes[path] = f"rank {len(shape)}"
            elif (known := layout.rank(modules)) is not None and len(shape) - known >= stack:
                turned = known > 2 and _named(modules, ("transpose",))
                axes[path] = _axes(len(shape), len(shape) - known, turned)
            elif why := _unclear(layout, path, shapes, leads, stacked):
                axes[path] = _question(layout.view, path, shape, why)
            else:
                axes[path] = _axes(len(shape), stack, heads=modules[-1:] == ["out"])
            if isinstance(axes[path], KernelAxes):
                alone = shape[-2] == 1 and _named(modules, depthwise)
                groups = _matching(feature_groups, path, shape[-1] if alone else 1)
                axes[path] = dataclasses.replace(axes[path], feature_groups=groups)
        return _with_overrides(params, axes, overrides)

    return view


def _axes(rank, stack, transposed=False, heads=False) -> KernelAxes:
    window = () if heads else tuple(range(stack, rank - 2))
    if transposed:
        return KernelAxes((*window, rank - 1), (rank - 2,), window)
    return KernelAxes(tuple(range(stack, rank - 1)), (rank - 1,), window)


def _unclear(layout, path, shapes, leads, stacked) -> str:
    """What a kernel behind its named stack axes could be instead; empty if it is sure to be one."""
    shape, (*modules, _) = shapes[path], path.split("/")
    others = [module for module in modules if not _named([module], stacked)]
    stack, module = len(modules) - len(others), "/".join(modules)
    rank, name = len(shape) - stack, modules[-1].lower() if modules else ""
    if rank < 2:
        return f"{stack} of its axes are said to be stack axes"
    bias = shapes.get(f"{module}/{layout.bias}" if module else layout.bias)
    if bias is not None and bias != (*shape[:stack], shape[-1]):
        return f"its bias of shape {bias} says that it is no plain layer with {stack} stack axes"
    if bias is not None or rank == 2:
        return ""
    conv = rank == 4 or (rank == 3 and "conv" in name and "local" not in name)
    around = next((leads[m] for m in _modules_around(module) if m in leads), ())
    deeper = any(len(lead) > stack and shape[: len(lead)] == lead for lead in around)
    mapped = any(map(_MAPPED_CLASS.fullmatch, others)) or name in _ATTENTION
    if conv and not deeper and not mapped:
        return ""
    if rank == 3:
        return "a 1-D convolution, two input or two output axes, or a stack of dense kernels"
    return f"a convolution over {rank - 2} axes, or a stack of kernels"


def _leads(layout, shapes) -> dict[str, set[Shape]]:
    """Of each module with biases and scales in it, at any depth: the axes that these have before
    their last."""
    leads: dict[str, set[Shape]] = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        if name in layout.vectors and shape:
            for around in _modules_around(module):
                leads.setdefault(around, set()).add(shape[:-1])
    return leads


def _modules_around(module) -> Iterator[str]:
    """This module and those that hold it, innermost first; the last is the whole tree, `''`."""
    yield module
    while module:
        module = module.rpartition("/")[0]
        yield module


def _question(view, path, shape, why) -> ConfigError:
    asked = f"is it {why}?" if why.startswith("a ") else f"{why};"
    tells = "the model tells, by view=orthojax.linen.axes(net, x) or orthojax.nnx.axes(model); or "
    return ConfigError(
        f"parameter {path!r} of shape {shape}: {asked} {tells * (view == 'flax')}say its axes in"
        f" view=views.{view}(overrides={{{path!r}: KernelAxes(inputs=..., outputs=...)}}), or,"
        f" of a stack, put a fragment of its module's name into views.{view}(stacked=(...,));"
        " or leave it out by `mask`"
    )


def _haiku_rank(modules) -> int | None:
    name = modules[-1] if modules else ""
    convolution = re.search(r"conv([123])_d", name)
    if convolution:
        return int(convolution[1]) + 2
    return 2 if re.fullmatch(r"linear(_\d+)?", name) else None


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
