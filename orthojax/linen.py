"""The Flax linen face of modulation."""

from orthojax.extras import require

require("flax", "orthojax.linen")

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.errors
import jax
from flax import linen as nn

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.sites import SITE, init_site, modulate

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
        if not isinstance(self.net, nn.Module):
            raise checks.refuse("net", self.net, "a Flax linen module, not a class or a function")
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
