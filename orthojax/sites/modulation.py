"""The optax transformation that steers modulation sites; see `orthojax.sites` for the method."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.sites import SITE, is_site, measurement, rescaling
from orthojax.tree_paths import path_name


class ModulationState(NamedTuple):
    """State of :func:`modulation`: scalars, and three numbers per site.

    Attributes:
      inner_state: of the wrapped transformation.
      count: int32, updates so far.
      measured: int32, those of them in which the topmost site measured something.
      reference: float32, running second moment of the error at the topmost site; as it arrives,
        that is times the square of a loss scale.
      weight: float32, that of the last measurement there; a loss scale of S makes it 1 / S.
      log_growth: float32, running mean of the logarithm of the largest factor by which the moment
        of the error, had nothing rescaled it, would differ from that at the topmost site.
      sites: like the parameters, `optax.MaskedNode` in the places of the weights; of each site
        `[moment, scale, position]`, float32 `(..., 3)`: the moment that arrived when it last ran,
        the ρ that was applied, and where it stands.
    """

    inner_state: Any
    count: jax.Array  # type: ignore[assignment]  # as in optax; a tuple has a method of that name
    measured: jax.Array
    reference: jax.Array
    weight: jax.Array
    log_growth: jax.Array
    sites: Any

    @property
    def moments(self) -> dict[str, jax.Array]:
        """By path of a site, the moment that arrived, with the leading axes of the site."""
        return self._column(0)

    @property
    def scales(self) -> dict[str, jax.Array]:
        """Likewise, the ρ that was applied."""
        return self._column(1)

    def _column(self, number):
        return {path: site[..., number] for path, site in _sites(self.sites).items()}


def modulation(
    inner: optax.GradientTransformation,
    *,
    tolerance: Any = 10.0,
    steps: Any = float("inf"),
    decay: Any = 0.9,
    reference: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it trains a model with modulation sites.

    The weights go to `inner`, which never sees a site, so that clipping, decay and penalties are
    those of the weights alone. Of the sites it takes what they measured, keeps the running moment
    :math:`\bar q` of the error at the topmost site, and gives every other site the bounds
    :math:`[\bar q / T, \bar q\,T]` for the next backward pass. The topmost site rescales nothing;
    neither does one at the output of the net.

    The error of the first update met no bounds, and in a very deep net it is wrong by orders of
    magnitude: so the first update only measures, and `inner` is given a gradient of zero.

    A site that did not run, or whose error vanished or overflowed, keeps what it knew. A constant
    loss scale changes nothing; one that changes is followed within a step. Wrap this in
    `optax.MultiSteps` or `optax.apply_if_finite`, not the other way round. Clipping may stand in
    `inner` or before this: no norm sees a site. Behind it nothing may change the updates, a
    learning rate least of all: they set the bounds of the sites.

    Args:
      inner: any optax transformation, the whole of the optimizer.
      tolerance: :math:`T \ge 1`, a budget for the whole way down: by what factor the second moment
        of the error may differ from that at the topmost site. 1 makes all equal. Infinity only
        observes, and the weights are trained by `inner` alone, bit for bit.
      steps: modulate during the first `steps` updates only; infinity is always.
      decay: of the running moment, in [0, 1); a plain mean until `1 / (1 - decay)` are measured.
      reference: a constant instead of the running moment, for every site, the topmost too;
        with a tolerance of 1 all layers then train on errors of one size, however small the loss
        (backward gradient normalization). None is the running moment.

    Hyperparameters may be traced, or set by `optax.inject_hyperparams`.

    Returns:
      A transformation whose state is :class:`ModulationState`; see :func:`read` for what it knows.
      `update` needs `params`.

    Raises:
      ConfigError: a number is impossible, or `inner` is no transformation; at `init`, no parameter
        is a site; at `update`, there are no `params`, or the trees do not belong together.

    Example:
      >>> from orthojax import init_site, modulate
      >>> params = [{"kernel": 0.1 * jnp.eye(4), SITE: init_site(k)} for k in range(3)]
      >>> def loss(params, x):
      ...     for layer in params:
      ...         x = modulate(x @ layer["kernel"], layer[SITE])
      ...     return jnp.mean((x - 1) ** 2)
      >>> tx = modulation(optax.sgd(0.1, momentum=0.9), tolerance=1.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = jax.grad(loss)(params, jnp.ones((2, 4)))
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(read_moments(state))
      layer  moment   scale   growth
      0      9.0e-04   8.33    0.01
      1      6.5e-04   9.83    0.01
      2      6.2e-02   1.00
      unmodulated, the moment of the error would change by 10^-3.8 on its way down
    """
    checks.transformation("inner", inner)
    checks.number("tolerance", tolerance, "[1, inf]", traced=True)
    checks.number("steps", steps, "[0, inf]", traced=True)
    checks.number("decay", decay, "[0, 1)", traced=True)
    if reference is not None:
        checks.number("reference", reference, "(0, inf)", traced=True)
    of_weights = optax.masked(optax.with_extra_args_support(inner), _weights)

    def init(params):
        # optax.tree_map_params asks with a placeholder, a tree without leaves.
        if jax.tree.leaves(params) and not _sites(params):
            raise ConfigError(
                f"no parameter is called `{SITE}`, so there is nothing to modulate: wrap the model "
                "in orthojax.linen.Modulated, or call orthojax.modulate behind its layers"
            )
        return ModulationState(
            inner_state=of_weights.init(params),
            count=jnp.zeros((), jnp.int32),
            measured=jnp.zeros((), jnp.int32),
            reference=jnp.zeros((), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
            log_growth=jnp.zeros((), jnp.float32),
            sites=_map_sites(_fresh_row, _map_weights(lambda _: optax.MaskedNode(), params)),
        )

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ConfigError(
                "modulation needs the parameters: call update(updates, state, params)"
            )
        known = _sites(params)
        sites = _rows(known)
        moment, weight = measurement(_rows(_matching(known, updates, "updates")))
        ran = (weight > 0) & (moment > 0) & jnp.isfinite(moment) & jnp.isfinite(weight)
        moment, weight = jnp.where(ran, moment, 1), jnp.where(ran, weight, 1)
        scale = jax.vmap(lambda m, s: rescaling(m, s, jnp.float32)[0])(moment, sites)
        downward = jnp.argsort(sites[:, 2])[::-1]  # of equals, such as a stack, the last is first
        top = downward[0]
        now = ran[top]

        measured = state.measured + now.astype(jnp.int32)
        keep = 1 - 1 / jnp.maximum(measured, 1).astype(jnp.float32)
        keep = jnp.minimum(jnp.asarray(decay, jnp.float32), keep)

        def average(before, value):
            return jnp.where(now, keep * before + (1 - keep) * value, before)

        # A loss scale of S multiplies moments by S², and weights, once divided out, by 1 / S. It
        # changes by powers of two; no other number by which gradients are multiplied does.
        ratio = weight[top] / jnp.where(state.weight > 0, state.weight, 1)
        rescaled = now & (state.weight > 0) & (jnp.frexp(ratio)[0] == 0.5)
        before = state.reference * jnp.where(rescaled, 1 / jnp.square(ratio), 1)
        running = average(before, moment[top])
        log_growth = average(
            state.log_growth, _log_growth(moment[downward], scale[downward], ran[downward])
        )
        budget = jnp.asarray(tolerance, jnp.float32)
        count = optax.safe_increment(state.count)
        within = count.astype(jnp.float32) < jnp.asarray(steps, jnp.float32)
        modulating = within & (budget < jnp.inf)

        wanted = running
        if reference is not None:
            wanted = jnp.asarray(reference, jnp.float32) / jnp.square(weight[top])
        bounded = modulating & (sites[:, 2] >= 0)
        if reference is None:
            bounded &= jnp.arange(len(sites)) != top
        new = jnp.stack(
            [
                jnp.where(bounded, wanted / budget, 0),
                jnp.where(bounded, wanted * budget, 0),
                sites[:, 2],
            ],
            axis=1,
        )

        # The first error met no bounds: the weights wait for one that does.
        wait = (state.count == 0) & modulating
        updates = _map_weights(lambda u: jnp.where(wait, jnp.zeros_like(u), u), updates)
        updates, inner_state = of_weights.update(updates, state.inner_state, params, **extra)
        changes = _by_path(new - sites, known)
        updates = _map_sites(lambda path, u: changes[path].astype(u.dtype), updates)
        # A negative bound is none that was set here.
        told = jnp.where(sites[:, 1] < 0, jnp.nan, scale)
        told = jnp.stack([moment, told, sites[:, 2]], axis=1)
        before = _rows(_matching(known, state.sites, "the state"))
        rows = _by_path(jnp.where(ran[:, None], told, before), known)
        return updates, ModulationState(
            inner_state=inner_state,
            count=count,
            measured=measured,
            reference=running,
            weight=jnp.where(now, weight[top], state.weight),
            log_growth=log_growth,
            sites=_map_sites(lambda path, _: rows[path], state.sites),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class SiteReading(NamedTuple):
    """What one site last did.

    Attributes:
      path: of the layer; a layer of a stack has its index behind it.
      moment: second moment of the error that arrived.
      scale: the ρ that it was multiplied with.
      growth: moment that arrived over the one that left the site above; None at the topmost site,
        and at outputs of the net.
    """

    path: str
    moment: float
    scale: float
    growth: float | None


class Readings(tuple):
    """The :class:`SiteReading` of every site, from the input upward; `print` it."""

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.path) for row in self))
        lines = [f"{'layer':{width}}  moment   scale   growth"]
        for row in self:
            growth = "" if row.growth is None else f"  {row.growth:6.2f}"
            lines.append(f"{row.path:{width}}  {row.moment:.1e}  {row.scale:5.2f}{growth}")
        total = sum(math.log10(row.growth) for row in self if row.growth)
        lines.append(
            f"unmodulated, the moment of the error would change by 10^{total:.1f} on its way down"
        )
        return "\n".join(lines)


def read_moments(opt_state: Any) -> Readings:
    """Lists what every site last measured and applied: a ledger of how the error grows, and where.

    Args:
      opt_state: with the state of :func:`modulation` somewhere in it.

    Returns:
      A tuple of :class:`SiteReading`, from the input upward.

    Raises:
      ConfigError: there is no state of :func:`modulation`.
    """
    state = find_state(opt_state)
    if state is None:
        raise ConfigError(
            "there is no state of orthojax.modulation in this opt_state: wrap the optimizer, the"
            " whole of it, in orthojax.modulation(...); without it sites do nothing"
        )
    sites = []
    for path, site in _sites(jax.device_get(state.sites)).items():
        name = "/".join(key for key in path.split("/") if key != SITE)
        for index in np.ndindex(site.shape[:-1]):
            label = name + "".join(f"[{i}]" for i in index)
            sites.append((label, *site[index].tolist()))
    # As `update` has them: of equals the last of the tree stands on top.
    sites.sort(key=lambda site: (site[-1] < 0, site[-1]))
    rows: list[SiteReading] = []
    left: float | None = None
    for label, moment, scale, position in reversed(sites):
        growth = moment / left if left and position >= 0 else None
        if position >= 0 and moment > 0:
            left = scale**2 * moment
        rows.append(SiteReading(label, moment, scale, growth))
    return Readings(reversed(rows))


def find_state(opt_state: Any) -> ModulationState | None:
    """The state of `modulation` in that of a chain or of another wrapper, or None."""
    found = [
        leaf
        for leaf in jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, ModulationState))
        if isinstance(leaf, ModulationState)
    ]
    return found[0] if found else None


def _log_growth(moment, scale, ran):
    """From the topmost site downward: the largest |log| of the moments had nothing rescaled."""
    log_scale = jnp.where(ran, 2 * jnp.log(jnp.where(ran, scale, 1)), 0)
    above = jnp.cumsum(log_scale) - log_scale
    true = jnp.log(jnp.where(ran, moment, 1)) - above
    return jnp.max(jnp.where(ran, jnp.abs(true - true[0]), 0))


def _weights(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_site(path), tree)


def _map_weights(function, tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if is_site(path) else function(leaf), tree
    )


def _map_sites(function, tree):
    """The tree with `function(path, site)` in the places of its sites."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf) if is_site(path) else leaf, tree
    )


def _fresh_row(path, site):
    """`[moment, scale, position]` of a site that has not run."""
    del path
    position = site[..., 2].astype(jnp.float32)
    return jnp.stack([jnp.zeros_like(position), jnp.ones_like(position), position], axis=-1)


def _sites(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = [(path_name(path), leaf) for path, leaf in leaves if is_site(path)]
    sites = dict(found)
    if len(sites) < len(found):
        twice = next(path for path, _ in found if sum(path == other for other, _ in found) > 1)
        raise ConfigError(f"two sites are at the one path {twice!r}: rename one of their modules")
    return sites


def _matching(sites, tree, name):
    """The sites of another tree in the order of these: by path, not by place."""
    found = _sites(tree)
    missing = [path for path in sites if path not in found]
    if missing:
        raise ConfigError(
            f"modulation: there is nothing for parameter {missing[0]!r} in {name}: give what"
            " belongs to these parameters, all of it"
        )
    return {path: found[path] for path in sites}


def _rows(leaves: dict[str, jax.Array]) -> jax.Array:
    return jnp.concatenate([leaf.reshape(-1, 3).astype(jnp.float32) for leaf in leaves.values()])


def _by_path(rows: jax.Array, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Cuts `(sites, 3)` into arrays of the shapes of `like`, in its order."""
    found, start = {}, 0
    for path, leaf in like.items():
        end = start + leaf.size // 3
        found[path] = rows[start:end].reshape(leaf.shape)
        start = end
    return found
