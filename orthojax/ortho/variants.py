"""What is penalized: the measures of non-orthonormality, each with its gradient in closed form.

A variant defines `P(W) >= 0` for one block `W` of shape `(f_in, n)`; `optax_ortho` adds the
gradient of `λ/2 Σ P` over all blocks of all kernels. With `E = WᵀW − I`:

| name               | P(W)                       | ∂(P/2)/∂W                               |
|--------------------|----------------------------|-----------------------------------------|
| `frobenius`        | `‖E‖_F²`                   | `2 W E`                                 |
| `double`           | `‖E‖_F² + ‖WWᵀ − I‖_F²`    | `4 W E`                                 |
| `mutual_coherence` | `max |E_ij|²`              | `2 W S`, `S` = largest entries of `E`   |
| `srip`             | `‖E‖₂²`                    | `2μ (Wv) vᵀ`, `E v = μ v`, `|μ| = ‖E‖₂` |
| `cosine`           | `Σ_{i≠j} cos²(w_i, w_j)`   | see `Cosine`                            |
| `conv`             | see `orthojax.ortho.conv`  |                                         |

The first four are one formula, `2 W S`, with `S` the part of `E` that the norm looks at. All are
zero at their minima and smooth there (`squared=False` gives up the latter).

Every method takes blocks `(blocks, *inputs, n)` in float32 or float64; `identity`, the target of
`WᵀW`, `(blocks, n, n)` with zeros on the diagonal where a column is padding, or `(1, n, n)` if that
is the same for all; and the blocks' layout.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.matrices import gram, times


class Layout(NamedTuple):
    """What a variant may know of blocks beyond their values; blocks of one layout are batched.

    Attributes:
      inputs: Shape of the input axes.
      columns: Number of columns `n`.
      dtype: Of the blocks.
      spatial: Positions within `inputs` of the axes that a window slides along.
      strides: One window stride for each of `spatial`.
    """

    inputs: tuple[int, ...]
    columns: int
    dtype: jnp.dtype
    spatial: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


class Variant(Protocol):
    """A measure of non-orthonormality; implement it to bring your own.

    Attributes:
      grouped: Whether kernels with more columns than rows are cut into column groups first.
    """

    @property
    def grouped(self) -> bool: ...

    def penalty(self, blocks: jax.Array, identity: jax.Array, layout: Layout) -> jax.Array:
        """`P` of every block, shape `(blocks,)`."""

    def gradient(self, blocks: jax.Array, identity: jax.Array, layout: Layout) -> jax.Array:
        """`∂(P/2)/∂W` of every block, the shape of `blocks`."""


class Checked:
    """A variant whose arguments are flags, but for a number of squarings, from 0 to 64."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # of the variants below
            value = getattr(self, field.name)
            if field.name == "squarings":
                checks.integer(field.name, value, 0, 64)
            else:
                checks.flag(field.name, value)


@dataclasses.dataclass(frozen=True)
class Frobenius(Checked):
    """`‖WᵀW − I‖_F²`: Eq. 3 of the paper; "soft orthogonality" elsewhere.

    Raises:
      ConfigError: An argument is not what its default is.

    Example:
      >>> from orthojax.ortho import ortho_penalty
      >>> float(ortho_penalty({"kernel": 2 * jnp.eye(3)}, 2.0, variant="frobenius"))
      27.0
    """

    grouped: bool = True

    def penalty(self, blocks, identity, layout):
        floor = max(0, layout.columns - math.prod(layout.inputs))
        return _smaller_excess(blocks, identity) + floor

    def gradient(self, blocks, identity, layout):
        return 2 * _times_excess(blocks, identity)


@dataclasses.dataclass(frozen=True)
class Double(Checked):
    """`‖WᵀW − I‖_F² + ‖WWᵀ − I‖_F²`: columns and rows (Bansal et al. 2018, arXiv:1810.09102, DSO).

    The two terms differ by the constant `f_in − n`, so the gradient is twice the ungrouped
    Frobenius one and one Gram product, of the smaller side, is enough. The floor of the penalty
    is `|f_in − f_out|`. Columns are not grouped: a wide kernel gets orthonormal rows.

    Raises:
      ConfigError: An argument is not what its default is.

    Example:
      >>> from orthojax.ortho import ortho_penalty
      >>> float(ortho_penalty({"kernel": 2 * jnp.eye(3)}, 2.0, variant="double"))
      54.0
    """

    grouped: bool = False

    def penalty(self, blocks, identity, layout):
        gap = abs(layout.columns - math.prod(layout.inputs))
        return 2 * _smaller_excess(blocks, identity) + gap

    def gradient(self, blocks, identity, layout):
        return 4 * _times_excess(blocks, identity)


@dataclasses.dataclass(frozen=True)
class MutualCoherence(Checked):
    """`max |WᵀW − I|²`: the worst pair of columns, or the worst norm (Bansal et al. 2018, MC).

    The paper has the maximum itself, `squared=False`, whose gradient has the same size however
    close the kernel is and so never settles at a fixed step. Where several entries are largest,
    the gradient is the mean of theirs, as in `jax.grad` of `jnp.max`.

    Raises:
      ConfigError: An argument is not what its default is.

    Example:
      >>> from orthojax.ortho import ortho_penalty
      >>> kernel = jnp.diag(jnp.array([2.0, 1.0]))
      >>> float(ortho_penalty({"kernel": kernel}, 2.0, variant="mutual_coherence"))
      9.0
    """

    squared: bool = True
    grouped: bool = True

    def penalty(self, blocks, identity, layout):
        largest = jnp.max(jnp.abs(gram(blocks) - identity), axis=(1, 2))
        return largest**2 if self.squared else largest

    def gradient(self, blocks, identity, layout):
        excess = gram(blocks) - identity
        size = jnp.abs(excess)
        largest = jnp.max(size, axis=(1, 2), keepdims=True)
        at = (size == largest).astype(excess.dtype)
        selected = at * excess / jnp.sum(at, axis=(1, 2), keepdims=True)
        return _root_scale(self.squared, largest[:, 0, 0], 2 * times(blocks, selected))


@dataclasses.dataclass(frozen=True)
class SRIP(Checked):
    """`‖WᵀW − I‖₂²`: the spectral restricted isometry property (Bansal et al. 2018, SRIP).

    The eigenvector comes from power iteration by repeated squaring: `squarings` products of
    `n × n` matrices do the work of `2^squarings` steps, in a few large operations. The gradient is
    exact where that has converged, that is, where the two largest `|eigenvalues|` differ by more
    than a factor `1 + 2^-squarings` or so; otherwise it is that of a near-largest eigenvalue. The
    paper has the norm itself, `squared=False`, and two steps from a random vector.

    Raises:
      ConfigError: An argument is not what its default is.

    Example:
      >>> from orthojax.ortho import ortho_penalty
      >>> kernel = jnp.diag(jnp.array([2.0, 1.0]))
      >>> float(ortho_penalty({"kernel": kernel}, 2.0, variant="srip"))
      9.0
    """

    squared: bool = True
    squarings: int = 10
    grouped: bool = True

    def penalty(self, blocks, identity, layout):
        excess = gram(blocks) - identity
        vector = _dominant_eigenvector(jax.lax.stop_gradient(excess), self.squarings)
        value = _rayleigh(excess, vector)
        return value**2 if self.squared else jnp.abs(value)

    def gradient(self, blocks, identity, layout):
        excess = gram(blocks) - identity
        vector = _dominant_eigenvector(excess, self.squarings)
        value = _rayleigh(excess, vector)
        image = times(blocks, vector[:, :, None])
        rank_one = image * (_over_columns(2 * value, image) * _over_columns(vector, image))
        return _root_scale(self.squared, jnp.abs(value), rank_one)


@dataclasses.dataclass(frozen=True)
class Cosine(Checked):
    """`Σ_{i≠j} cos²(w_i, w_j)`: orthogonality whatever the norms.

    With `U` the columns divided by their norms and `C` the off-diagonal part of `UᵀU`, the
    gradient of `P/2` is `2 U (C − diag(Σ_i C_ij²))`, column `j` divided by `‖w_j‖`. A column of
    norm zero has no direction and gets gradient zero. Source: Rodríguez et al. 2017,
    arXiv:1611.01967 (OrthoReg, its global form).

    Raises:
      ConfigError: An argument is not what its default is.

    Example:
      >>> from orthojax.ortho import ortho_penalty
      >>> kernel = jnp.array([[1.0, 1.0], [0.0, 1.0]])
      >>> round(float(ortho_penalty({"kernel": kernel}, 2.0, variant="cosine")), 4)
      1.0
    """

    grouped: bool = True

    def penalty(self, blocks, identity, layout):
        unit, _ = _unit_columns(blocks)
        return jnp.sum(_off_diagonal(gram(unit)) ** 2, axis=(1, 2))

    def gradient(self, blocks, identity, layout):
        unit, inverse_norm = _unit_columns(blocks)
        cosines = _off_diagonal(gram(unit))
        radial = jnp.sum(cosines**2, axis=1)[:, None, :] * _eye(blocks, layout.columns)
        return 2 * times(unit, cosines - radial) * _over_columns(inverse_norm, unit)


def _smaller_excess(blocks, identity):
    """The smaller of `‖WᵀW − I‖_F²` and `‖WWᵀ − I‖_F²`; the other is larger by `|f_in − n|`."""
    rows = math.prod(blocks.shape[1:-1])
    if blocks.shape[-1] <= rows:
        return jnp.sum((gram(blocks) - identity) ** 2, axis=(1, 2))
    return jnp.sum((_row_gram(blocks) - _eye(blocks, rows)) ** 2, axis=(1, 2))


def _times_excess(blocks, identity):
    """`W (WᵀW − I) = (WWᵀ − I) W`, through the smaller of the two Gram matrices."""
    rows = math.prod(blocks.shape[1:-1])
    if blocks.shape[-1] <= rows:
        return times(blocks, gram(blocks) - identity)
    flat = blocks.reshape((blocks.shape[0], rows, -1))
    return times(_row_gram(blocks) - _eye(blocks, rows), flat).reshape(blocks.shape)


def _row_gram(blocks):
    flat = blocks.reshape((blocks.shape[0], -1, blocks.shape[-1]))
    return gram(flat.transpose(0, 2, 1))


def _eye(blocks, size):
    return jnp.eye(size, dtype=blocks.dtype)[None]


def _over_columns(per_block, blocks):
    """`(blocks,)` or `(blocks, columns)` shaped to multiply `(blocks, *inputs, columns)`."""
    columns = per_block.shape[1] if per_block.ndim == 2 else 1
    return per_block.reshape((blocks.shape[0], *(1,) * (blocks.ndim - 2), columns))


def _root_scale(squared, norm, gradient):
    """The gradient of `‖E‖²/2` as it is, or turned into that of `‖E‖/2`."""
    if squared:
        return gradient
    factor = jnp.where(norm > 0, 0.5 / jnp.where(norm > 0, norm, 1), 0)
    return gradient * _over_columns(factor, gradient)


def _off_diagonal(matrices):
    return matrices * (1 - _eye(matrices, matrices.shape[-1]))


def _unit_columns(blocks):
    squares = jnp.sum(blocks**2, axis=tuple(range(1, blocks.ndim - 1)))
    some = squares > jnp.finfo(blocks.dtype).tiny
    inverse_norm = jnp.where(some, jax.lax.rsqrt(jnp.where(some, squares, 1)), 0)
    return blocks * _over_columns(inverse_norm, blocks), inverse_norm


def _dominant_eigenvector(symmetric, squarings):
    """Unit eigenvectors `(blocks, n)` of the eigenvalues of largest size of `(blocks, n, n)`."""

    def square(_, power):
        power = times(power, power)
        # A square is positive semidefinite: its trace bounds its entries.
        trace = jnp.trace(power, axis1=1, axis2=2)[:, None, None]
        return power / jnp.where(trace > 0, trace, 1)

    power = jax.lax.fori_loop(0, squarings, square, symmetric)
    # Some column of a non-zero positive semidefinite matrix is not orthogonal to the dominant
    # eigenspace: that of the largest diagonal entry.
    largest = jnp.argmax(jnp.diagonal(power, axis1=1, axis2=2), axis=1)
    column = jax.nn.one_hot(largest, power.shape[-1], dtype=power.dtype)
    vector = _unit(times(power, column[:, :, None])[:, :, 0])
    # Squaring cannot tell +μ from −μ. One step with the matrix itself can: `v ± Ev/|μ|` are the
    # parts of v in the two eigenspaces.
    image = _unit(times(symmetric, vector[:, :, None])[:, :, 0])
    plus, minus = vector + image, vector - image
    size = jnp.sum(plus**2 - minus**2, axis=1, keepdims=True)
    return _unit(jnp.where(size >= 0, plus, minus))


def _rayleigh(symmetric, vector):
    return jnp.sum(vector * times(symmetric, vector[:, :, None])[:, :, 0], axis=1)


def _unit(vector):
    norm = jnp.linalg.norm(vector, axis=1, keepdims=True)
    return vector / jnp.where(norm > 0, norm, 1)
