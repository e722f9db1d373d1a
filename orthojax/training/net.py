"""The net of a config: one of this project's, or anybody's Flax linen classifier."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from orthojax.config.sections import bind, keyword_parameters
from orthojax.config.suggestion import suggestion
from orthojax.errors import ConfigError
from orthojax.linen import Modulated
from orthojax.models import ConvNet, ImageNetPlainNet, ImageNetResNet, PlainNet, ResNet

_NETS = (PlainNet, ResNet, ImageNetPlainNet, ImageNetResNet)
MODELS = {net.__name__: net for net in _NETS}
LARGEST_BIAS = 100  # of batch normalization


def make_net(section: Any, *, modulated: bool, dtype: Any, num_classes: int) -> nn.Module:
    """Builds the net that a config's `model` section describes.

    Args:
      section: `name`, and arguments of what it names: a class of `orthojax.models`, or
        `package.module:Net`, a linen module called as `net(images, train=...)` that returns logits.
      modulated: whether there are modulation sites; somebody's net is wrapped in
        `orthojax.linen.Modulated`.
      dtype: compute dtype; somebody's net gets it if it has an argument of that name.
      num_classes: likewise.

    Raises:
      ConfigError: the name is unknown, cannot be imported or is no linen module, or an argument is
        unknown or impossible; the message begins with the key.
    """
    arguments = dict(section)
    name = arguments.pop("name", None)
    supplied = {"dtype": dtype, "num_classes": num_classes}
    net_class = net_named(name)
    if net_class not in MODELS.values():
        known = keyword_parameters(net_class)
        supplied = {k: v for k, v in supplied.items() if k in known and k not in arguments}
        net = explained("model", lambda: bind(net_class, arguments, "model", **supplied))
        return Modulated(net) if modulated else net
    net = explained(
        "model", lambda: bind(net_class, arguments, "model", modulated=modulated, **supplied)
    )
    if abs(net.bn_bias) > LARGEST_BIAS:
        raise ConfigError(
            f"`model.bn_bias` is {net.bn_bias}; beyond ±{LARGEST_BIAS} what it is added to is lost"
        )
    return net


def net_named(name: Any) -> type[nn.Module]:
    """The class that a config names: of `orthojax.models`, or `package.module:Net`.

    Raises:
      ConfigError: there is none of that name, or it is no linen module.
    """
    if not (isinstance(name, str) and ":" in name):
        if name not in MODELS:
            raise ConfigError(
                f"`model.name` is {name!r}{suggestion(str(name), MODELS, what='names')}; a net of "
                "your own is named package.module:Net"
            )
        return MODELS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"`model.name` is {name!r}, but {error}; the module must be installed, or its folder "
            "in PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"`model.name` is {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"`model.name` is {name!r}, which is no flax.linen.Module")
    return found


def check_logits(net: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Runs somebody's net on abstract images, which finds what training would stumble over.

    Raises:
      ConfigError: it cannot be called, or does not return one row of logits for each image.
    """
    if isinstance(net, ConvNet):
        return
    images = jax.ShapeDtypeStruct((2, *image_shape), np.float32)

    def call(key, images):
        return net.init_with_output({"params": key, "dropout": key}, images, train=True)[0]

    try:
        found = jax.eval_shape(call, jax.random.key(0), images)
    except Exception as error:  # whatever the net does
        raise ConfigError(
            f"`model.name`: the net cannot be called as net(images, train=True): {error}"
        ) from error
    if getattr(found, "shape", None) != (2, num_classes):
        raise ConfigError(
            f"`model.name`: for 2 images of {num_classes} classes the net returns "
            f"{getattr(found, 'shape', type(found).__name__)}, and not (2, {num_classes}); give it "
            "an argument `num_classes`, or set its own in the section `model`"
        )


def description(net: nn.Module) -> str:
    """A few words for the beginning of a run.

    Example:
      >>> description(PlainNet(depth=8, width=4))
      'PlainNet-8, width 4'
    """
    if isinstance(net, ConvNet):
        return f"{type(net).__name__}-{net.depth}, width {net.width}"
    inner = net.net if isinstance(net, Modulated) else net
    return type(inner).__name__ + (", modulated" if inner is not net else "")


def explained(path: str, make: Callable[[], Any]) -> Any:
    """Puts the config's key before the message of a constructor that knows no configs."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"`{path}`: {error}") from None
