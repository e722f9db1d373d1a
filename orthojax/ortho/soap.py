"""A preconditioner for kernels: Adam in the eigenbases of a kernel's second moments."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from orthojax import checks
from orthojax.matrices import accumulation_dtype, from_blocks, orthonormal_factor, to_blocks
from orthojax.ortho.kernels import Kernel, penalized_or_refuse, with_auto_axes
from orthojax.ortho.resolution import check_mask_and_view
from orthojax.ortho.views import View
from orthojax.tree_paths import leaves_with_paths, path_name

Bases = tuple[jax.Array | None, ...]
Number = float | jax.Array

LONGEST_SIDE = 1024
LARGEST_COUNT = 2**31 - 1  # updates are counted in int32


class SoapState(NamedTuple):
    """State of `scale_by_soap`.

    `mu` and `nu` are like the parameters, those of a kernel in the coordinates of its bases;
    float32 or better. The others hold, by path, a tuple of the matrices of each kernel:
    `(blocks, side, side)` for a side with a basis, None for one without.

    Attributes:
      count: int32 scalar, updates so far.
      mu: first moments.
      nu: second moments.
      factors: running second moments of the gradient along each side.
      bases: orthogonal matrices, whose columns follow the eigenvectors of the factors.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any
    factors: dict[str, Bases]
    bases: dict[str, Bases]


def scale_by_soap(
    b1: Number = 0.95,
    b2: Number = 0.95,
    *,
    factor_decay: Number = 0.95,
    eps: Number = 1e-8,
    refresh_every: Number = 10,
    max_side: int | None = None,
    mask: Any = None,
    view: View | Any = None,
) -> optax.GradientTransformation:
    r"""Rescale the updates of kernels by Adam in the eigenbases of their gradients' moments.

    Each side `i` of a kernel has a running second moment of the gradient along it and a basis,

    .. math::
      L_i \leftarrow \beta L_i + (1 - \beta)\, G_{(i)} G_{(i)}^\top, \qquad
      Q_i \leftarrow \mathrm{qr}(L_i Q_i), \qquad
      \tilde G = G \times_1 Q_1^\top \times_2 Q_2^\top \cdots

    where :math:`G_{(i)}` has side `i` as rows and all else as columns. Adam runs on the rotated
    gradient :math:`\tilde G`, and what it returns is rotated back. The direction thus depends on
    no choice of coordinates: rotate the inputs or outputs of a layer by an orthogonal matrix, and
    the updates rotate with them. Without bases it is Adam, which everything that is no kernel gets.

    A kernel has two sides, inputs and outputs. The inputs of a convolution are the channels at each
    place of the window, as in Shampoo; where these are more than `max_side`, window and channels
    are a side each, which takes a ninth of the products and fits less well. Stacked layers, feature
    groups and attention heads are kernels of their own, worked on together. The state is two
    moments of the size of the parameters and two `side × side` matrices for each side.

    The first update takes its bases from `eigh`; it is not skipped. Afterwards each basis makes one
    step of orthogonal iteration in `refresh_every` updates, the kernels in turn, so that no update
    is slower than others. Both moments go with it: the first exactly, the second as that of
    uncorrelated coordinates, so that a direction keeps its moment when eigenvectors change places.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_decay: :math:`\beta`.
      eps: Added to the root of the second moment.
      refresh_every: Updates from one refresh of a basis to the next, at least 1; may be traced.
      max_side: The inputs of a convolution are two sides if they are more; any other longer side
        has no basis. None is 1,024.
      mask, view: See `optax_ortho`; what `False` exempts gets Adam.

    Returns:
      An `optax.GradientTransformation` with `SoapState`. Work is done in float32 or better, at full
      precision; updates keep their dtype. Nothing is gathered or reduced over devices where the
      parameters are replicated.

    Raises:
      ValueError: `update` without `params` (optax's message).
      ConfigError: A decay outside [0, 1); a negative `eps`; `refresh_every` or `max_side` that is
        no integer of at least 1; otherwise as `optax_ortho`.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> tx = scale_by_soap()
      >>> gradient = {"kernel": jnp.diag(jnp.array([4.0, 1.0, 0.1]))[:, :2], "bias": jnp.ones(2)}
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> updates["kernel"].round(3).tolist()  # the polar factor of the first gradient
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    References:
      Vyas et al. 2024, `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_; Gupta et al. 2018, arXiv:1802.09568 (a factor for each
      side of a tensor).
    """
    _check_numbers(b1, b2, factor_decay, eps, refresh_every, max_side)
    check_mask_and_view(mask, view)
    longest = LONGEST_SIDE if max_side is None else max_side

    def read(params):
        kernels = penalized_or_refuse(params, mask, view, "none")
        return {kernel.path: _Sides.of(kernel, longest) for _, kernel in kernels}

    def init_fn(params):
        sides = read(params)
        zeros = {
            path: tuple(
                jnp.zeros((sides[path].blocks, n, n), accumulation_dtype(leaf.dtype))
                if rotated
                else None
                for n, rotated in zip(sides[path].sizes, sides[path].rotated, strict=True)
            )
            for path, leaf in leaves_with_paths(params)
            if path in sides
        }
        if not jax.tree.leaves(params):
            # optax.tree_map_params asks with a placeholder, a tree without leaves: one leaf stands
            # for all matrices.
            zeros = jnp.zeros([1, 1, 1])
        mu, nu = (
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype)), params)
            for _ in range(2)
        )
        eyes = jax.tree.map(
            lambda leaf: leaf + jnp.eye(leaf.shape[-1], dtype=leaf.dtype)[None], zeros
        )
        return SoapState(jnp.zeros([], jnp.int32), mu, nu, zeros, eyes)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        sides = read(params)
        count = optax.safe_increment(state.count)
        numbers = {"b1": b1, "b2": b2, "factor_decay": factor_decay, "eps": eps, "count": count}
        numbers = jax.tree.map(jnp.asarray, numbers)
        due = _due_blocks(state.count, refresh_every, sides)
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
        moments = zip(treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu), strict=True)
        rows, factors, bases = [], {}, {}
        for (keys, update), (mu, nu) in zip(flat, moments, strict=True):
            path, arrays = path_name(keys), [update, mu, nu]
            if path in sides:
                row, factors[path], bases[path] = with_auto_axes(
                    functools.partial(_advance, sides[path]),
                    arrays,
                    state.factors[path],
                    state.bases[path],
                    due[path],
                    numbers,
                )
            else:
                row = _adam(*arrays, numbers)
            rows.append(row)
        scaled, mu, nu = (treedef.unflatten(leaves) for leaves in zip(*rows, strict=True))
        return scaled, SoapState(count, mu, nu, factors, bases)

    return optax.GradientTransformation(init_fn, update_fn)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.95,
    b2: Number = 0.95,
    *,
    rest: optax.GradientTransformation | None = None,
    factor_decay: Number = 0.95,
    eps: Number = 1e-8,
    refresh_every: Number = 10,
    max_side: int | None = None,
    mask: Any = None,
    view: View | Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP for kernels, and another optimizer for everything else.

    Args:
      learning_rate: Of the kernels, a number or a schedule. An entry of a kernel moves by about
        this much in a step, as with Adam: 0.002 is a good start at 44 layers, 0.001 at 110.
      b1, b2, factor_decay, eps, refresh_every, max_side, mask, view: See `scale_by_soap`.
      rest: What trains everything else, with a learning rate of its own; None is Adam with the rate
        of the kernels.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `modulation`, `stiefel`, `optax.MultiSteps` and
      others go around it; inside `stiefel` the moments are those of the Riemannian gradient.

    Raises:
      ConfigError: A negative `learning_rate`; a `rest` that is no optax transformation; otherwise
        as `scale_by_soap`.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> tx = soap(0.1, rest=optax.sgd(0.5))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["bias"].tolist()
      [-0.5, -0.5]
    """

    if not callable(learning_rate):
        checks.number("learning_rate", learning_rate, "[0, inf)", traced=True)
    if rest is not None:
        checks.transformation("rest", rest)
    scaling = functools.partial(
        scale_by_soap,
        b1,
        b2,
        factor_decay=factor_decay,
        eps=eps,
        refresh_every=refresh_every,
        max_side=max_side,
    )
    scaling(mask=mask, view=view)  # which checks the arguments

    def parts(params):
        kernels = penalized_or_refuse(params, mask, view, "none")
        axes = {path: None for path, _ in leaves_with_paths(params)}
        axes |= {kernel.path: kernel.axes for _, kernel in kernels}
        of_kernels = optax.chain(scaling(view=axes), optax.scale_by_learning_rate(learning_rate))
        of_rest = optax.adam(learning_rate) if rest is None else rest
        labels = jax.tree_util.tree_map_with_path(
            lambda keys, _: "rest" if axes[path_name(keys)] is None else "kernels", params
        )
        return optax.partition({"kernels": of_kernels, "rest": of_rest}, labels)

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        return parts(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        lambda params: parts(params).init(params), update_fn
    )


def _check_numbers(b1, b2, factor_decay, eps, refresh_every, max_side):
    checks.number("b1", b1, "[0, 1)", traced=True)
    checks.number("b2", b2, "[0, 1)", traced=True)
    checks.number("factor_decay", factor_decay, "[0, 1)", traced=True)
    checks.number("eps", eps, "[0, inf)", traced=True)
    if isinstance(refresh_every, jax.Array):
        checks.number("refresh_every", refresh_every, f"[1, {LARGEST_COUNT}]", traced=True)
    else:
        checks.integer("refresh_every", refresh_every, 1, LARGEST_COUNT)
    if max_side is not None:
        checks.integer("max_side", max_side, 1)


def _advance(layout, arrays, factors, bases, due, numbers):
    """`(update, mu, nu)` of a kernel one update on, and its factors and bases."""
    update, mu, nu = arrays
    gradient, mu, nu = map(layout.to_blocks, (update.astype(mu.dtype), mu, nu))
    first = _nothing_learned(factors)
    factors = tuple(
        None if f is None else _mix(numbers["factor_decay"], f, _second_moment(gradient, side))
        for side, f in enumerate(factors)
    )
    bases, mu, nu = _refreshed(first, due, factors, bases, mu, nu)
    direction, mu, nu = _adam(_rotate(gradient, bases), mu, nu, numbers, any(layout.rotated))
    direction = layout.from_blocks(_rotate(direction, bases, back=True)).astype(update.dtype)
    return (direction, layout.from_blocks(mu), layout.from_blocks(nu)), factors, bases


def _adam(update, mu, nu, numbers, floor=False):
    """`(update, mu, nu)` of Adam, moments in their own dtype."""
    gradient = update.astype(mu.dtype)
    mu, nu = _mix(numbers["b1"], mu, gradient), _mix(numbers["b2"], nu, jnp.square(gradient))
    root = jnp.sqrt(_corrected(nu, numbers["b2"], numbers["count"]))
    denominator = root + numbers["eps"].astype(root.dtype)
    if floor:
        # What rotations leave where the gradient is zero is the rounding of its largest entries,
        # and must not be divided by itself.
        largest = jnp.max(root, axis=tuple(range(1, root.ndim)), keepdims=True)
        denominator += jnp.finfo(root.dtype).eps.item() ** (2 / 3) * largest
    direction = _corrected(mu, numbers["b1"], numbers["count"]) / denominator
    return direction.astype(update.dtype), mu, nu


def _mix(decay, old, new):
    decay = decay.astype(old.dtype)
    return decay * old + (1 - decay) * new


def _corrected(moment, decay, count):
    return moment / (1 - decay.astype(moment.dtype) ** count.astype(moment.dtype))


@dataclasses.dataclass(frozen=True)
class _Sides:
    """A kernel as an array `(blocks, *sizes)`, and which of its sides have a basis."""

    kernel: Kernel
    sizes: tuple[int, ...]
    rotated: tuple[bool, ...]

    @classmethod
    def of(cls, kernel, max_side):
        axes, shape = kernel.axes.normalized(len(kernel.shape)), kernel.shape
        rest = [axis for axis in axes.inputs if axis not in axes.spatial]
        if axes.feature_groups == 1:
            # Of several input or output axes, as attention has them, the first are heads.
            axes = dataclasses.replace(
                axes, inputs=(*axes.spatial, *rest[-1:]), outputs=axes.outputs[-1:]
            )
        else:
            axes = dataclasses.replace(axes, inputs=(*axes.spatial, *rest))
        kernel = dataclasses.replace(kernel, axes=axes)
        sizes = kernel.fan
        if axes.spatial and sizes[0] > max_side:
            window = math.prod(shape[axis] for axis in axes.spatial)
            sizes = (window, sizes[0] // window, sizes[1])
        return cls(kernel, sizes, tuple(1 < size <= max_side for size in sizes))

    @property
    def blocks(self):
        return self.kernel.blocks

    def to_blocks(self, array):
        return to_blocks(array, self.kernel.axes).reshape((self.blocks, *self.sizes))

    def from_blocks(self, blocks):
        axes, shape = self.kernel.axes, self.kernel.shape
        inputs = [shape[axis] for axis in axes.inputs]
        blocks = blocks.reshape((self.blocks, *inputs, self.sizes[-1]))
        return from_blocks(blocks, shape, axes)


def _second_moment(blocks, side):
    """`(blocks, n, n)`: products of the slices along one side, summed over the others."""
    others = tuple(axis for axis in range(1, blocks.ndim) if axis != side + 1)
    return jax.lax.dot_general(
        blocks, blocks, ((others, others), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )


def _rotate(blocks, bases, back=False):
    """Coordinates in the bases, or back from them; `(blocks, *sizes)`."""
    for side, basis in enumerate(bases):
        if basis is not None:
            matrix = basis if back else jnp.swapaxes(basis, 1, 2)
            blocks = _along(matrix, blocks, side)
    return blocks


def _along(matrix, blocks, side):
    """`M` times every vector along a side."""
    letters = "".join("xyz"[i] for i in range(blocks.ndim - 1))
    turned = letters.replace(letters[side], "n")
    return jnp.einsum(
        f"bn{letters[side]},b{letters}->b{turned}",
        matrix,
        blocks,
        precision=jax.lax.Precision.HIGHEST,
    )


def _due_blocks(count, refresh_every, sides):
    """Path -> (first, last + 1) of the blocks to refresh: all in turn, as many in each update."""
    every = jnp.asarray(refresh_every).astype(jnp.int32)
    total, phase = sum(layout.blocks for layout in sides.values()), count % every
    first, last = phase * total // every, (phase + 1) * total // every
    found, start = {}, 0
    for path, layout in sides.items():
        found[path] = [jnp.clip(bound - start, 0, layout.blocks) for bound in (first, last)]
        start += layout.blocks
    return found


def _nothing_learned(factors):
    """Whether no gradient but zero has come so far, as in the first update within `modulation`."""
    zero = [jnp.all(factor == 0) for factor in factors if factor is not None]
    return functools.reduce(jnp.logical_and, zero, jnp.array(True))


def _refreshed(first, due, factors, bases, mu, nu):
    """Bases closer to the eigenvectors, and the moments in their coordinates."""

    def begin(bases, mu, nu):
        bases = tuple(None if f is None else jnp.linalg.eigh(f)[1] for f in factors)
        return bases, mu, nu  # both are zero

    def go_on(bases, mu, nu):
        return jax.lax.fori_loop(*due, functools.partial(_refresh_block, factors), (bases, mu, nu))

    return jax.lax.cond(first, begin, go_on, bases, mu, nu)


def _refresh_block(factors, index, state):
    bases, mu, nu = state
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=True)
    old = jax.tree.map(pick, bases)
    new = jax.tree.map(_iterate, jax.tree.map(pick, factors), old)
    change = jax.tree.map(
        lambda new, old: jnp.matmul(
            jnp.swapaxes(new, 1, 2), old, precision=jax.lax.Precision.HIGHEST
        ),
        new,
        old,
    )
    new_mu = functools.reduce(_apply_along, enumerate(change), pick(mu))
    squares = jax.tree.map(jnp.square, change)
    new_nu = functools.reduce(_apply_along, enumerate(squares), pick(nu))

    def put(whole, part):
        return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)

    return jax.tree.map(put, bases, new), put(mu, new_mu), put(nu, new_nu)


def _apply_along(blocks, numbered):
    side, matrix = numbered
    return blocks if matrix is None else _along(matrix, blocks, side)


def _iterate(factor, basis):
    """One step of orthogonal iteration, the eigenvectors in descending order of eigenvalue."""
    moved = jnp.matmul(factor, basis, precision=jax.lax.Precision.HIGHEST)
    order = jnp.argsort(-jnp.sum(basis * moved, axis=1), axis=1)
    return orthonormal_factor(jnp.take_along_axis(moved, order[:, None], axis=2))
