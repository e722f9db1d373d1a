"""Folding against float64 arithmetic, and a program that runs without this project."""

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

from orthojax.data.preprocessing import Preprocessing
from orthojax.errors import MissingExtraError
from orthojax.inference.classifier import Classifier
from orthojax.inference.export import export
from orthojax.inference.folding import FoldedNet, fold_batch_norm
from orthojax.models import PlainNet, ResNet

SHAPE = (8, 8, 3)


@functools.cache
def make_classifier(kind, **arguments):
    """With scales, biases and statistics as training leaves them: none is neutral."""
    net = kind(depth=14, width=4, num_classes=5, **arguments)
    rng = np.random.default_rng(0)

    def trained(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[-4:-1]) if path[-1].key == "kernel" else 1
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    images = jax.ShapeDtypeStruct((1, *SHAPE), np.float32)
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)
    variables = jax.tree_util.tree_map_with_path(trained, shapes)
    mean, std = rng.uniform(0.2, 0.5, SHAPE), rng.uniform(0.1, 0.3, SHAPE)
    names = ("a", "b", "c", "d", "e")
    return Classifier(net, variables, Preprocessing(SHAPE, names, mean, std), step=7)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (6, *SHAPE), np.uint8)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PlainNet, {}),
        (PlainNet, {"parametrization": "repvgg"}),
        (ResNet, {}),
        (ResNet, {"scan": False}),
    ],
)
def test_a_folded_net_is_the_same_net(kind, options, images):
    classifier = make_classifier(kind, **options)
    expected = classifier.logits(images)
    found = classifier.folded().logits(images)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_folding_one_layer_by_hand():
    rng = np.random.default_rng(2)
    kernel, x = rng.normal(size=(1, 1, 3, 2)), rng.normal(size=(7, 3))
    bn = {name: rng.uniform(0.5, 2, 2) for name in ("scale", "bias", "mean", "var")}
    variables = {
        "params": {
            "layer": {"conv": {"kernel": kernel}, "bn": {k: bn[k] for k in ("scale", "bias")}}
        },
        "batch_stats": {"layer": {"bn": {k: bn[k] for k in ("mean", "var")}}},
    }
    folded = fold_batch_norm(variables)["params"]["layer"]
    normalized = (x @ kernel[0, 0] - bn["mean"]) / np.sqrt(bn["var"] + 1e-5)
    expected = bn["scale"] * normalized + bn["bias"]
    found = x @ np.asarray(folded["conv"]["kernel"])[0, 0] + folded["bn"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_folded_plain_net_is_a_chain_without_batch_normalization():
    """Convolutions, additions of a bias and ReLUs; one square root or division there is not."""
    folded = make_classifier(PlainNet).folded()
    program = jax.make_jaxpr(lambda x: folded.net.apply(folded.variables, x, train=False))(
        np.zeros((2, *SHAPE), np.float32)
    )
    assert not {"rsqrt", "sqrt", "scan"} & {str(equation.primitive) for equation in program.eqns}
    assert isinstance(folded.net, FoldedNet)


def test_what_a_folded_net_cannot_do(images):
    folded = make_classifier(PlainNet).folded()
    with pytest.raises(ValueError, match="recalibrate first"):
        folded.recalibrated(images)
    with pytest.raises(ValueError, match="no batch normalization left to train"):
        folded.net.apply(folded.variables, images, train=True)


RUN = """
import sys
sys.modules["orthojax"] = None  # importing it is an error
import jax, numpy as np
images = np.load("images.npy")
for name in ("whole", "folded"):
    program = jax.export.deserialize(bytearray(open(name, "rb").read()))
    found = [np.asarray(program.call(images[:n])) for n in (1, 4, 6)]
    assert all(np.allclose(f, found[-1][: len(f)], atol=1e-5) for f in found)
    np.save(f"{name}.npy", found[-1])
    print(*program.platforms, [str(a) for a in program.in_avals])
"""


def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"exporting needs flatbuffers: pip .*\[export\]"):
        export(make_classifier(PlainNet), tmp_path / "net.stablehlo")


def test_it_runs_without_this_project(images, tmp_path):
    whole = make_classifier(PlainNet)
    classifiers = {"whole": whole, "folded": whole.folded()}
    np.save(tmp_path / "images.npy", images)
    for name, classifier in classifiers.items():
        export(classifier, tmp_path / name)
    told = subprocess.run(
        [sys.executable, "-c", RUN], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    for line in told.splitlines():
        assert line.startswith("cpu cuda tpu") and "uint8[batch,8,8,3]" in line
    for name, classifier in classifiers.items():
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, classifier.predict(images), rtol=1e-4, atol=1e-6)
        assert found.shape == (6, 5)
