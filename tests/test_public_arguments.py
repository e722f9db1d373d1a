"""Every public function with every argument wrong: a clear error that names it, or a right result.

Functions and arguments are found by themselves; a new one needs a line here only where it has an
argument without a default, or one whose range is to be known.
"""

import collections
import functools
import importlib
import inspect
import re
from types import FunctionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import orthojax
from orthojax import models, ortho
from orthojax.errors import ConfigError

MODULES = ("sites", "initializers", "isometry", "matrices", "mean_field", "ortho.views")
FACES = ("", "ortho", "models", "linen")  # what these name in `__all__`, or define
PROMISED = (ValueError, TypeError)  # ConfigError is a ValueError
# They start programs or read directories, and have tests of their own.
ELSEWHERE = {"load_classifier", "train_and_evaluate"}
# An abstract net, of which there are no objects; what layers call, not users.
NOT_CALLED = {"ConvNet", "rescaling", "vary_like", "is_site", "weights_only"}

KEY = jax.random.key(0)
PARAMS = {"conv": {"kernel": jnp.ones((2, 2)) + jnp.eye(2), "bias": jnp.ones(2)}}
SITED = {"low": {"modulation_site": orthojax.init_site(0), **PARAMS["conv"]}}
IMAGES = jnp.ones((2, 4, 4, 2))
BLOCKS = jnp.ones((1, 3, 2)) + jnp.eye(3, 2)
AXES = ortho.KernelAxes((0,), (1,))
TREE = {"block_0": {"bias": jnp.ones(2)}, "block_1": {"bias": jnp.ones(2)}}
NET = models.PlainNet(depth=8, width=2)

#: A valid value of every argument that has no default, or whose default shows nothing.
VALID: dict[str, Any] = dict(
    params=PARAMS, tree=PARAMS, variables=TREE, inner=optax.sgd(0.1), opt_state=None,
    x=jnp.ones((2, 4)), site=orthojax.init_site(), moment=jnp.float32(1), dtype=jnp.float32,
    gradient=jnp.ones(3), path=(), init=orthojax.orthonormal(), key=KEY, rows=3, columns=2,
    bias=0.5, layers=8, growth=6.8, bias_variance=1e-3, cosine=0.5, slope=0.5, function=np.square,
    inner_slope=1.0, shift=0.5, inputs=(0,), outputs=(1,), spatial=(), ndim=3, stacked=0, fan_in=2,
    fan_out=3, kernel=jnp.ones((2, 2)), axes=AXES, shape=(2, 2), blocks=BLOCKS, left=BLOCKS,
    right=BLOCKS, matrices=jnp.ones((3, 2)), net=NET, image_shape=(8, 8, 3), features=4,
    kernel_size=(3, 3), use_running_average=False, window=(3, 3), strides=(1, 1), feature_groups=1,
    param_dtype=jnp.float32, num_classes=3, depth=8, width=2, view=None, mask=None, reference=None,
    overrides=None, learning_rate=0.1,
)  # fmt: skip
OF: dict[tuple[str, str], Any] = {
    ("modulation", "params"): SITED,
    ("read_moments", "opt_state"): orthojax.modulation(optax.sgd(0.1)).init(SITED),
    ("Shaped", "inner"): 1.0,
    ("OrthogonalConv", "strides"): 1,
    ("flax", "stacked"): ("scanned",), ("flax", "feature_groups"): {"conv/kernel": 1},
    ("flax", "overrides"): {"conv/kernel": AXES},
    ("haiku", "stacked"): ("layer_stack",), ("haiku", "feature_groups"): None,
    ("shaped_softplus", "slope"): 1.5,
    ("times", "matrices"): jnp.ones((1, 2, 2)),
    ("from_blocks", "blocks"): jnp.ones((1, 2, 2)),
    ("isometric_kernel", "projectors"): jnp.ones((1, 2, 2, 1)),
    ("isometric_kernel", "mixing"): jnp.ones((1, 2, 2)),
    ("isometric_kernel", "window"): (2, 2),
    ("isometric_kernel", "inputs"): 2, ("isometric_kernel", "outputs"): 2,
    ("isometric_conv", "x"): IMAGES, ("isometric_conv", "kernel"): jnp.ones((2, 2, 2, 2)),
    ("isometric_conv", "strides"): (1, 1),
    ("leaky_cosine", "cosine"): jnp.full(2, 0.5),
    ("ImageNetPlainNet", "depth"): 34, ("ImageNetResNet", "depth"): 34,
    ("delta_orthonormal", "feature_groups"): 1,
    ("Modulated", "net"): nn.Dense(2),
}  # fmt: skip

#: The numbers that an argument may be; others may be whatever gives a finite result.
INTERVALS = {
    "tolerance": "[1, inf]", "steps": "[0, inf]", "decay": "[0, 1)", "reference": "(0, 3e38]",
    "coefficient": "[0, 3e38]", "b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, 3e38]",
    "attraction": "(0, 1)", "gain": "[0, 3e38]", "position": "(-3e38, 3e38)",
    "feature_groups": "[1, 9]", "groups": "[1, 9]", "layers": "[2, 9e15]", "growth": "(1, inf)",
    "bias_variance": "[1e-9, 0.1]", "cosine": "[-1, 1]",
    "fan_in": "[1, 9e15]", "fan_out": "[1, 9e15]", "ndim": "[2, 9e15]", "stacked": "[0, 1]",
    "rows": "[2, 9e15]", "columns": "[0, 3]", "momentum": "[0, 1]", "epsilon": "[0, 3e38]",
    "features": "[1, 9e15]", "feature_group_count": "[1, 9]", "depth": "[8, 9e15]",
    "width": "[1, 9e15]", "num_classes": "[1, 9e15]", "kernel_gain": "[0, 3e38]",
    "bias_std": "[0, 3e38]", "bn_bias": "[-3e38, 3e38]", "bn_scale": "[-3e38, 3e38]",
    "bn_groups": "[1, 9]", "slope": "(1, inf)", "inputs": "[-9, 9]",
    "outputs": "[-9, 9]", "strides": "[1, 9]", "share": "[0, 1]", "carry": "[0, 1]",
    "factor_decay": "[0, 1)", "refresh_every": "[1, 2147483647]", "max_side": "[1, 9e15]",
    "learning_rate": "[0, 3e38]",
}  # fmt: skip


class Bad(NamedTuple):
    """A value, what is wrong with it, and whether no function may take it."""

    kind: str
    value: Any
    never: bool = True


def public():
    """Name -> function or class, without those that are found twice."""
    found = {}
    for face in FACES:
        module = importlib.import_module(f"orthojax.{face}".rstrip("."))
        names = getattr(module, "__all__", None) or ["Modulated"]
        found |= {name: getattr(module, name) for name in names}
    for name in MODULES:
        module = importlib.import_module(f"orthojax.{name}")
        found |= {
            k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
        }
    return {
        name: thing
        for name, thing in sorted(found.items())
        if isinstance(thing, FunctionType | type)
        and not name.startswith("_")
        and name not in ELSEWHERE | NOT_CALLED
        and not (isinstance(thing, type) and issubclass(thing, tuple))
    }


def arguments(name, thing):
    """A valid value of every argument."""
    found = {}
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name in ("parent", "name") and isinstance(thing, type):
            continue  # of every linen module
        if (name, parameter.name) in OF:
            found[parameter.name] = OF[name, parameter.name]
        elif parameter.default is not parameter.empty:
            found[parameter.name] = parameter.default
        else:
            assert parameter.name in VALID, f"say a valid `{parameter.name}` of {name} here"
            found[parameter.name] = VALID[parameter.name]
    return found


def is_array(value):
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)


def wrong_type(*allowed):
    things = dict(
        string="nonsense", none=None, list=[1.0, [2.0]], dict={"a": 1}, object=object(),
        number=2.5, integer=3, function=len, boolean=True,
    )  # fmt: skip
    return [Bad(kind, value) for kind, value in things.items() if kind not in allowed]


def numbers(value):
    whole = isinstance(value, int)
    return wrong_type("number", "integer") + ([Bad("a fraction", 2.5)] if whole else []) + [
        Bad("infinity", np.inf, False), Bad("minus infinity", -np.inf, False),
        Bad("negative", -1, False), Bad("NumPy negative", np.int32(-7), False),
        Bad("zero", 0, False),
        Bad("huge", 10**30 if whole else 1e300, False), Bad("NaN", np.nan),
        Bad("NumPy NaN", np.float32(np.nan)), Bad("JAX NaN", jnp.float32(np.nan)),
        Bad("of rank 1", np.ones(2)), Bad("a JAX array", jnp.ones(3)), Bad("empty", np.zeros(0)),
        Bad("complex", 1j), Bad("bytes", b"1"),
    ]  # fmt: skip


def sizes(value):
    size = len(value) or 1
    return wrong_type("integer", "none", "function") + [
        Bad("negative", (-1,) * size, False), Bad("zero", (0,) * size, False),
        Bad("fractions", (1.5,) * size), Bad("NaN", (np.nan,) * size),
        Bad("strings", ("1",) * size),
        Bad("too many", (1,) * 9, False), Bad("huge", (10**30,) * size), Bad("empty", (), False),
        Bad("nested", ((1, 2),) * size),
    ]  # fmt: skip


def arrays(value):
    shape = value.shape
    return wrong_type("number") + [
        Bad("of integers", jnp.ones(shape, jnp.int32)), Bad("of booleans", jnp.ones(shape, bool)),
        Bad("complex", jnp.ones(shape, jnp.complex64)), Bad("of strings", np.full(shape, "a")),
        Bad("of rank 0", jnp.float32(1), False), Bad("of rank 1", jnp.ones(5), False),
        Bad("of rank 6", jnp.ones((1,) * 6), False), Bad("empty", jnp.zeros((0, *shape)), False),
        Bad("without columns", jnp.zeros((*shape[:-1], 0)), False),
        Bad("NaN", jnp.full(shape, np.nan), False),
    ]  # fmt: skip


def trees(value):
    def of(make):
        return jax.tree.map(lambda x: make(x.shape), value)

    return wrong_type("dict", "list") + [
        Bad("of integers", of(lambda shape: jnp.ones(shape, jnp.int32)), False),
        Bad("NaN", of(lambda shape: jnp.full(shape, jnp.nan)), False),
        Bad("an array", jnp.ones((2, 2)), False), Bad("of strings", {"kernel": "a"}, False),
        Bad("empty", {}, False), Bad("complex", {"kernel": jnp.ones((2, 2), complex)}, False),
    ]  # fmt: skip


#: What is no number and no array, by name.
CALLABLE = wrong_type("function")
KINDS = {
    "mask": wrong_type("none", "function", "dict", "list"),
    "view": wrong_type("none", "function", "dict", "list"),
    "inner": [*wrong_type(), Bad("not called", optax.sgd)],
    "dtype": [*wrong_type("number"), Bad("of integers", jnp.int32), Bad("unknown", "float99")],
    "overrides": [*wrong_type("none", "dict"), Bad("of numbers", {"*": 3}), Bad("bare", {3: None})],
    "init": CALLABLE, "where": CALLABLE, "function": CALLABLE, "kernel_init": CALLABLE,
    "bias_init": CALLABLE, "scale_init": CALLABLE, "net": wrong_type(),
    "axes": wrong_type(), "opt_state": wrong_type(), "rest": wrong_type("none"),
}  # fmt: skip
KINDS["param_dtype"] = KINDS["dtype"]
RULES = [*wrong_type("none", "dict"), Bad("of strings", {"*": "2"}), Bad("of zeros", {"*": 0})]
#: What a function takes although others may not.
TAKEN = {
    ("modulate", "site", "NaN"),  # a site without bounds
    ("optax_ortho", "coefficient", "function"), ("soap", "learning_rate", "function"),
    ("decoupled_ortho", "coefficient", "function"),
    ("OrthogonalConv", "dtype", "none"), ("leaky_cosine", "cosine", "of integers"),
}  # fmt: skip


def bad_values(name, argument, value):
    kinds = _kinds(name, argument, value)
    default = inspect.signature(public()[name]).parameters[argument].default
    return [
        bad
        for bad in kinds
        if (name, argument, bad.kind) not in TAKEN and not (default is None and bad.value is None)
    ]


def _kinds(name, argument, value):
    if argument in ("precision", "path", "key"):
        return []  # JAX's own
    if isinstance(value, dict) and argument == "feature_groups":
        return RULES
    if argument in KINDS and name != "Shaped":
        return KINDS[argument]
    if isinstance(value, bool):
        return wrong_type("boolean") + [Bad("NaN", np.nan), Bad("an array", np.ones(2, bool))]
    if isinstance(value, str):
        return wrong_type() + [Bad("empty", "")]
    if isinstance(value, int | float) or (argument in INTERVALS and value is None):
        return numbers(value)
    if is_array(value):
        return arrays(value)
    if isinstance(value, tuple) and value and all(isinstance(item, str) for item in value):
        return wrong_type("list") + [Bad("of numbers", (1, 2)), Bad("of nothing", ("",))]
    if isinstance(value, tuple):
        return sizes(value)
    if isinstance(value, dict):
        return trees(value)
    assert value is None, f"say what would be wrong for `{argument}` of {name} here"
    return []


def finish(name, result, given):
    """What the function returned, put to use: that is when some arguments first matter."""
    if isinstance(result, optax.GradientTransformation):
        params = SITED if name == "modulation" else PARAMS
        return jax.eval_shape(lambda: result.update(params, result.init(params), params)[0])
    if isinstance(result, nn.Module):
        if not hasattr(result, "depth"):  # nets check all at once, and take seconds to trace
            return jax.eval_shape(lambda: result.init(KEY, IMAGES))
    elif name in ("flax", "haiku", "equinox"):
        result(PARAMS)
    elif name in ("orthonormal", "delta_orthonormal", "mirrored", "carrying"):
        shape = (4, 4) if name == "carrying" else (4, 2)
        return jax.eval_shape(lambda: result(KEY, shape))
    elif name == "describe":
        return [row.error for row in result.rows if row.error is not None]
    return result


def is_finite(result):
    leaves = jax.tree.leaves(result)
    values = [x for x in leaves if isinstance(x, jax.Array | np.ndarray | np.generic | float)]
    values = [x for x in values if not isinstance(x, jax.core.Tracer)]
    return all(bool(np.isfinite(np.asarray(value)).all()) for value in values)


def inside(value, interval):
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    return bool(above and (value < high if interval[-1] == ")" else value <= high))


def called(name, thing, given, bad):
    """What comes back; traced alone, which compiles nothing, where no number in it is looked at."""
    found = []

    def call():
        found.append(finish(name, thing(**given), given))

    if bad.kind == "NaN" or name == "describe" or isinstance(bad.value, int | float | np.number):
        call()
    else:
        jax.eval_shape(call)
    return found[0]


def verdict(name, thing, argument, bad):
    """ "refused", "accepted", or what is wrong with the answer."""
    given = {**arguments(name, thing), argument: bad.value}
    try:
        result = called(name, thing, given, bad)
    except PROMISED as error:
        named = rf"\b{argument}\b" + ("|parameter '" if argument == "params" else "")
        if not re.search(named, str(error)):
            return f"{type(error).__name__} does not name it: {str(error)[:100]}"
        promised = re.findall(r"\b\w+Error\b", thing.__doc__ or "")
        names = [c.__name__ for c in type(error).__mro__]
        if not set(promised) & set(names) and "errors: see" not in (thing.__doc__ or ""):
            return f"{type(error).__name__} is not promised in the docstring"
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    if bad.never:
        return "taken without a word"
    interval = INTERVALS.get(argument) if name != "leaky_cosine" else None
    if interval and isinstance(bad.value, int | float | np.number):
        return "accepted" if inside(bad.value, interval) else f"taken, though not in {interval}"
    if bad.kind == "NaN" and not isinstance(result, nn.Module):
        return "accepted" if not is_finite(result) else "a finite result of NaN"
    return "accepted" if is_finite(result) else "a result that is not finite"


@functools.cache
def verdicts(name):
    thing = public()[name]
    return [
        (f"{name}({argument}={bad.kind})", verdict(name, thing, argument, bad))
        for argument, value in arguments(name, thing).items()
        for bad in bad_values(name, argument, value)
    ]


@pytest.mark.parametrize("name", public())
def test_bad_arguments_are_named_and_good_ones_work(name):
    thing = public()[name]
    given = arguments(name, thing)
    assert is_finite(finish(name, thing(**given), given))
    wrong = [
        f"{call}: {said}" for call, said in verdicts(name) if said not in ("refused", "accepted")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("argument", ["workdir", "step", "config", "callbacks"])
@pytest.mark.parametrize("value", [3.5, len, {1: 2}])
def test_what_reads_and_trains_looks_at_its_arguments_first(argument, value, tmp_path):
    given = {"config": {}, "workdir": tmp_path, argument: value}
    if argument == "config" and isinstance(value, dict):
        given["callbacks"] = [3]
        argument = "callbacks"
    with pytest.raises(ConfigError, match=rf"\b{argument}="):
        if argument == "step":
            orthojax.load_classifier(tmp_path, value)
        else:
            orthojax.train_and_evaluate(**given)


if __name__ == "__main__":
    counts = collections.Counter(said for name in public() for _, said in verdicts(name))
    print(len(public()), "functions,", counts.total(), "calls")
    for said, count in counts.most_common():
        print(count, said)
