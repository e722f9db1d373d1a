"""A preconditioner for kernels: Adam in the eigenbases of a kernel's second moments."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

from orthojax.errors import ConfigError
from orthojax.matrices import from_blocks, orthonormal_factor, to_blocks
from orthojax.ortho.kernels import Kernel, penalized_or_refuse
from orthojax.ortho.paths import leaves_with_paths, path_name
from orthojax.ortho.views import View

FACTORS = ("axes", "matrix")
Bases = tuple[jax.Array | None, ...]


class SoapState(NamedTuple):
    """State of `scale_by_soap`.

    `mu` and `nu` are like the parameters, in the coordinates of the bases; float32 or better. The
    others have an entry for each kernel, by path: a tuple with one `(blocks, side, side)` array, or
    None, for each side.

    Attributes:
      count: int32 scalar, updates so far.
      mu: first moments.
      nu: second moments.
      factors: running second moments of the gradient along each side.
      bases: orthogonal matrices, whose columns are close to the factors' eigenvectors.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any
    factors: dict[str, Bases]
    bases: dict[str, Bases]


def scale_by_soap(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    *,
    factor_decay: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    refresh_every: jax.typing.ArrayLike = 10,
    max_side: int = 1024,
    factors: str = "axes",
    mask: Any = None,
    view: View | Any = None,
) -> optax.GradientTransformation:
    if factors not in FACTORS:
        raise ConfigError(f"factors={factors!r} is unknown: choose one of {FACTORS}")

    def read(params):
        kernels = penalized_or_refuse(params, mask, view, "none")
        return {kernel.path: _Sides.of(kernel, factors, max_side) for _, kernel in kernels}

    def init_fn(params):
        zeros = {
            path: tuple(
                jnp.zeros((sides.blocks, n, n), _dtype(leaf)) if rotated else None
                for n, rotated in zip(sides.sizes, sides.rotated, strict=True)
            )
            for path, leaf in leaves_with_paths(params)
            if (sides := read(params).get(path))
        }
        moments = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _dtype(leaf)), params)
        eyes = jax.tree.map(lambda leaf: leaf + jnp.eye(leaf.shape[-1], dtype=leaf.dtype), zeros)
        return SoapState(jnp.zeros([], jnp.int32), moments, moments, zeros, eyes)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        sides = read(params)
        count = optax.safe_increment(state.count)
        decays = _Decays(b1, b2, factor_decay, eps, count)
        due = _due_blocks(state.count, refresh_every, sides)
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
        new: dict[str, Any] = {"mu": [], "nu": [], "factors": {}, "bases": {}}
        scaled = []
        moments = zip(
            flat, treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu), strict=True
        )
        for (keys, update), mu, nu in moments:
            path = path_name(keys)
            gradient = update.astype(mu.dtype)
            if path not in sides:
                mu, nu = decays.moments(gradient, mu, nu)
                direction = decays.direction(mu, nu)
            else:
                layout = sides[path]
                gradient, mu, nu = map(layout.to_blocks, (gradient, mu, nu))
                found = layout.learn(gradient, state.factors[path], factor_decay)
                bases, mu, nu = _refreshed(
                    state.count == 0, due[path], found, state.bases[path], mu, nu
                )
                gradient = _rotate(gradient, bases)
                mu, nu = decays.moments(gradient, mu, nu)
                direction = _rotate(decays.direction(mu, nu, floor=True), bases, back=True)
                direction, mu, nu = map(layout.from_blocks, (direction, mu, nu))
                new["factors"][path], new["bases"][path] = found, bases
            scaled.append(direction.astype(update.dtype))
            new["mu"].append(mu)
            new["nu"].append(nu)
        new["mu"], new["nu"] = treedef.unflatten(new["mu"]), treedef.unflatten(new["nu"])
        return treedef.unflatten(scaled), SoapState(count, **new)

    return optax.GradientTransformation(init_fn, update_fn)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    *,
    rest: optax.GradientTransformation | None = None,
    regularizer: optax.GradientTransformation | None = None,
    factor_decay: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    refresh_every: jax.typing.ArrayLike = 10,
    max_side: int = 1024,
    factors: str = "axes",
    mask: Any = None,
    view: View | Any = None,
) -> optax.GradientTransformationExtraArgs:
    def parts(params):
        kernels = penalized_or_refuse(params, mask, view, "none")
        axes = {path: None for path, _ in leaves_with_paths(params)}
        axes |= {kernel.path: kernel.axes for _, kernel in kernels}
        scale = scale_by_soap(
            b1, b2, factor_decay=factor_decay, eps=eps, refresh_every=refresh_every,
            max_side=max_side, factors=factors, view=axes,
        )
        after = [regularizer] * (regularizer is not None)
        of_kernels = optax.chain(scale, *after, optax.scale_by_learning_rate(learning_rate))
        of_rest = optax.adam(learning_rate) if rest is None else rest
        labels = jax.tree_util.tree_map_with_path(
            lambda keys, _: "rest" if axes[path_name(keys)] is None else "kernels", params
        )
        return optax.partition({"kernels": of_kernels, "rest": of_rest}, labels)

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        return parts(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: parts(params).init(params), update_fn)


@dataclasses.dataclass(frozen=True)
class _Decays:
    """Adam's arithmetic, after `count` updates."""

    b1: Any
    b2: Any
    factor_decay: Any
    eps: Any
    count: jax.Array

    def moments(self, gradient, mu, nu):
        return _mix(self.b1, mu, gradient), _mix(self.b2, nu, jnp.square(gradient))

    def direction(self, mu, nu, floor=False):
        first, second = (_corrected(x, b, self.count) for x, b in ((mu, self.b1), (nu, self.b2)))
        root = jnp.sqrt(second)
        denominator = root + jnp.asarray(self.eps, root.dtype)
        if floor:
            # What rotations leave where the gradient is zero is the rounding of its largest
            # entries, and must not be divided by itself.
            largest = jnp.max(root, axis=tuple(range(1, root.ndim)), keepdims=True)
            denominator += float(jnp.finfo(root.dtype).eps) ** 0.75 * largest
        return first / denominator


def _mix(decay, old, new):
    decay = jnp.asarray(decay, old.dtype)
    return decay * old + (1 - decay) * new


def _corrected(moment, decay, count):
    decay = jnp.asarray(decay, moment.dtype)
    return moment / (1 - decay ** count.astype(moment.dtype))


@dataclasses.dataclass(frozen=True)
class _Sides:
    """A kernel as an array `(blocks, *sizes)`, and which of its sides have a basis."""

    kernel: Kernel
    sizes: tuple[int, ...]
    rotated: tuple[bool, ...]

    @classmethod
    def of(cls, kernel, factors, max_side):
        axes, shape = kernel.axes.normalized(len(kernel.shape)), kernel.shape
        rest = [axis for axis in axes.inputs if axis not in axes.spatial]
        if axes.feature_groups == 1:
            # Of several input or output axes, as attention has them, the first are heads.
            axes = dataclasses.replace(axes, inputs=(*axes.spatial, *rest[-1:]), outputs=axes.outputs[-1:])
        else:
            axes = dataclasses.replace(axes, inputs=(*axes.spatial, *rest))
        kernel = dataclasses.replace(kernel, axes=axes)
        window = math.prod(shape[axis] for axis in axes.spatial)
        inputs, outputs = kernel.fan
        sizes = (inputs, outputs) if factors == "matrix" else (window, inputs // window, outputs)
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

    def learn(self, gradient, factors, decay):
        return tuple(
            None if factor is None else _mix(decay, factor, _second_moment(gradient, side))
            for side, factor in enumerate(factors)
        )


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
        f"bn{letters[side]},b{letters}->b{turned}", matrix, blocks,
        precision=jax.lax.Precision.HIGHEST,
    )


def _due_blocks(count, refresh_every, sides):
    """Path -> (first, last + 1) of the blocks to refresh: all blocks in turn, as many every time."""
    every = jnp.asarray(refresh_every).astype(jnp.int32)
    total, phase = sum(layout.blocks for layout in sides.values()), count % every
    first, last = phase * total // every, (phase + 1) * total // every
    found, start = {}, 0
    for path, layout in sides.items():
        found[path] = [jnp.clip(bound - start, 0, layout.blocks) for bound in (first, last)]
        start += layout.blocks
    return found


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
        new, old,
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


def _dtype(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)
