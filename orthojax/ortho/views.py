"""Views: which parameters are kernels, and which of their axes are input, output and stack.

A view is a callable `(path, array) -> KernelAxes | str | None`. `path` is the place of the
parameter in its tree, joined by `/` (`"stage1/scanned/conv/kernel"`); `array` has a shape and a
dtype, its values are not looked at. `KernelAxes` makes the parameter a kernel to be penalised;
`None` or a string (the reason, shown by `orthojax.describe`) leaves it alone. A tree of
`KernelAxes` and `None`, with the structure of the parameters or a prefix of it, is a view too.

A library's kernels cannot be told apart by shape alone: a stack of dense layers has the rank of a
1-D convolution, a depthwise kernel the shape of a convolution of one channel. The ready-made
views below go by names where names are reliable, take the names of your own modules as
arguments, and raise where only a guess would be left.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes

View = Callable[[str, Any], KernelAxes | str | None]

# Parameters of Flax modules that have rank >= 2 now and then (DenseGeneral's bias has) and are no
# kernels: nothing multiplies them into an input.
_FLAX_NOT_KERNELS = ("bias", "scale", "mean", "var", "embedding", "pos_embedding", "cls")


def flax_linen(
    stacked: tuple[str, ...] = ("scanned",),
    *,
    depthwise: tuple[str, ...] = ("depthwise",),
    transposed: tuple[str, ...] = (),
    two_outputs: tuple[str, ...] = ("query", "key", "value"),
    feature_groups: Mapping[str, int] | None = None,
    strides: Mapping[str, int] | None = None,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Flax linen parameters; the default of every function of this library.

    Parameters of rank >= 2, stack axes not counted, are kernels with the output last: `Dense`
    `(in, out)`, `Conv` `(*window, in, out)`. Not kernels, whatever their rank: `bias`, `scale`,
    `mean`, `var`, `embedding`, `pos_embedding`, `cls`.

    Args:
      stacked: Fragments of module names. Every module on the path whose name contains one adds a
        leading stack axis, as `nn.scan` and `nn.vmap` with `variable_axes={"params": 0}` do.
      depthwise: Fragments of names of modules with `feature_group_count == in_features`. Every
        output is taken by itself; with a channel multiplier, give `feature_groups` as well.
      transposed: Fragments of names of `ConvTranspose(transpose_kernel=True)`: output, then input.
      two_outputs: Names of `DenseGeneral` modules whose outputs are the last *two* axes of a rank 3
        kernel, as in attention: `(embed, heads, head_dim)`.
      feature_groups: Pattern of the path to `feature_group_count`.
      strides: Pattern of the path to window strides (read by the `conv` variant alone).
      overrides: Pattern of the path to axes (or `None`: no kernel); first of all rules.

    Patterns are matched as by `fnmatch` against the whole path; the first match counts.

    Returns:
      A view. It raises `ConfigError` for rank 5 and more (a 3-D convolution, or a stack of 2-D
      ones?), naming the path.

    Example:
      >>> import jax
      >>> kernel = jax.ShapeDtypeStruct((6, 3, 3, 16, 16), "float32")
      >>> flax_linen()("stage1/scanned/conv/kernel", kernel).inputs
      (1, 2, 3)
      >>> flax_linen(overrides={"video/*": KernelAxes((0, 1, 2, 3), (4,))})(
      ...     "video/kernel", kernel
      ... ).outputs
      (4,)
    """

    def axes_of(path: str, array) -> KernelAxes | str:
        *modules, name = path.split("/")
        if name in _FLAX_NOT_KERNELS:
            return f"named {name}"
        lead = _stack_depth(modules, stacked)
        rank = array.ndim - lead
        if rank < 2:
            return _too_low(rank, lead)
        if rank == 3 and modules and modules[-1] in two_outputs:
            return KernelAxes(inputs=(lead,), outputs=(lead + 1, lead + 2))
        _refuse_ambiguous(path, array, rank, "flax_linen")
        window = tuple(range(lead, lead + rank - 2))
        first, last = lead + rank - 2, lead + rank - 1
        if _named(modules, transposed):
            first, last = last, first
        groups = array.shape[last] if _named(modules, depthwise) and array.shape[first] == 1 else 1
        return KernelAxes(
            (*window, first), (last,), window, _matching(feature_groups, path, groups)
        )

    return _with_rules(axes_of, strides, overrides)


def flax_nnx(stacked: tuple[str, ...] = ("scanned",), **rules) -> View:
    """The view of Flax NNX parameters (`nnx.state(model, nnx.Param)`); arguments of `flax_linen`.

    NNX keeps linen's layouts and names. The `.value` at the end of its paths is not part of ours.
    `LoRA` factors (`lora_a`, `lora_b`) are left alone.

    Example:
      >>> import jax
      >>> flax_nnx()("layers/0/kernel", jax.ShapeDtypeStruct((8, 4), "float32")).outputs
      (1,)
    """
    overrides = {**(rules.pop("overrides", None) or {}), "*lora_[ab]": None}
    return flax_linen(stacked, overrides=overrides, **rules)


def haiku(
    stacked: tuple[str, ...] = ("layer_stack",),
    *,
    depthwise: tuple[str, ...] = ("depthwise",),
    transposed: tuple[str, ...] = ("transpose",),
    feature_groups: Mapping[str, int] | None = None,
    strides: Mapping[str, int] | None = None,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Haiku parameters: those called `w`, output last (transposed: last but one).

    Biases `b`, the `(1, 1, 1, C)` `scale` and `offset` of normalisation layers and `embeddings`
    are not kernels. Rank 5 is a 3-D convolution in modules named `conv3_d`, an error elsewhere.

    Args:
      stacked: Fragments of module names that add a leading stack axis each
        (`hk.experimental.layer_stack`).
      depthwise, feature_groups, strides, overrides: As in `flax_linen`.
      transposed: Fragments of names of transposed convolutions.

    Example:
      >>> import jax
      >>> w = jax.ShapeDtypeStruct((3, 3, 32, 16), "float32")
      >>> haiku()("net/~/conv2_d_transpose/w", w).outputs
      (2,)
    """

    def axes_of(path: str, array) -> KernelAxes | str:
        *modules, name = path.split("/")
        if name != "w":
            return f"named {name}"
        lead = _stack_depth(modules, stacked)
        rank = array.ndim - lead
        if rank < 2:
            return _too_low(rank, lead)
        if not _named(modules, ("conv3_d",)):
            _refuse_ambiguous(path, array, rank, "haiku")
        window = tuple(range(lead, lead + rank - 2))
        first, last = lead + rank - 2, lead + rank - 1
        if _named(modules, transposed) and rank > 2:
            first, last = last, first
        groups = array.shape[last] if _named(modules, depthwise) and array.shape[first] == 1 else 1
        return KernelAxes(
            (*window, first), (last,), window, _matching(feature_groups, path, groups)
        )

    return _with_rules(axes_of, strides, overrides)


def equinox(
    stacked: tuple[str, ...] = ("scanned",),
    *,
    depthwise: tuple[str, ...] = ("depthwise",),
    not_kernels: tuple[str, ...] = ("norm", "embed"),
    feature_groups: Mapping[str, int] | None = None,
    strides: Mapping[str, int] | None = None,
    overrides: Mapping[str, KernelAxes | None] | None = None,
) -> View:
    """The view of Equinox modules: leaves called `weight`, output first.

    `Linear` `(out, in)`; `Conv` `(out, in, *window)` (OIHW). Equinox calls the table of an
    `Embedding` and the scale of a `LayerNorm` `weight` as well; what tells them apart is the
    attribute they sit in. `weight_ih` and `weight_hh` of recurrent cells are kernels.

    Args:
      stacked: Fragments of attribute names that add a leading stack axis each
        (`eqx.filter_vmap` over keys).
      depthwise, feature_groups, strides, overrides: As in `flax_linen`.
      not_kernels: Fragments of the names of attributes that hold normalisations or embeddings.

    Example:
      >>> import jax
      >>> weight = jax.ShapeDtypeStruct((16, 3, 3, 3), "float32")
      >>> equinox()("layers/0/weight", weight).matrix_shape(weight.shape)
      (27, 16)
    """

    def axes_of(path: str, array) -> KernelAxes | str:
        *modules, name = path.split("/")
        if not name.startswith("weight"):
            return f"named {name}"
        if _named(modules, not_kernels):
            return "named like a normalisation or an embedding"
        lead = _stack_depth(modules, stacked)
        rank = array.ndim - lead
        if rank < 2:
            return _too_low(rank, lead)
        _refuse_ambiguous(path, array, rank, "equinox")
        window = tuple(range(lead + 2, array.ndim))
        depth_one = _named(modules, depthwise) and array.shape[lead + 1] == 1
        groups = array.shape[lead] if depth_one else 1
        return KernelAxes(
            (*window, lead + 1), (lead,), window, _matching(feature_groups, path, groups)
        )

    return _with_rules(axes_of, strides, overrides)


def _with_rules(axes_of, strides, overrides):
    def view(path: str, array):
        for pattern, axes in (overrides or {}).items():
            if fnmatch.fnmatchcase(path, pattern):
                return axes if axes is not None else "overridden"
        axes = axes_of(path, array)
        if isinstance(axes, KernelAxes) and axes.spatial:
            stride = _matching(strides, path, 1)
            axes = KernelAxes(axes.inputs, axes.outputs, axes.spatial, axes.feature_groups, stride)
        return axes

    return view


def _matching(patterns, path, default):
    matches = (v for p, v in (patterns or {}).items() if fnmatch.fnmatchcase(path, p))
    return next(matches, default)


def _named(modules, fragments) -> bool:
    return any(fragment in module for module in modules for fragment in fragments)


def _stack_depth(modules, stacked) -> int:
    return sum(_named([module], stacked) for module in modules)


def _too_low(rank, lead) -> str:
    return f"rank {max(rank, 0)}" + (f" in a stack of {lead}" if lead else "")


def _refuse_ambiguous(path, array, rank, view):
    if rank > 4:
        raise ConfigError(
            f"parameter {path!r} of shape {tuple(array.shape)}: a convolution over"
            f" {rank - 2} axes, or a stack of kernels? Say which: put a fragment of the name of"
            f" the stacked module into view={view}(stacked=(...,)), or give the axes in"
            f" view={view}(overrides={{{path!r}: KernelAxes(inputs=..., outputs=...)}})"
        )
