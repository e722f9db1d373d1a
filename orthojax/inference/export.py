"""A trained net as one StableHLO program: pixels in, probabilities out, no model code needed."""

import os

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.extras import require
from orthojax.inference.classifier import Classifier
from orthojax.storage.paths import check_output, write_atomic

PLATFORMS = ("cpu", "cuda", "tpu")


def export(classifier: Classifier, path: str | os.PathLike) -> None:
    """Writes a net, its weights and its preprocessing as a file of `jax.export`.

    `jax.export.deserialize(open(path, "rb").read()).call(images)` runs it where there is JAX and
    nothing of this project: uint8 (N, H, W, C) of any N, float32 probabilities (N, classes). What
    JAX promises of such files: they can be read for six months, see its documentation.

    Args:
      classifier: from `orthojax.load_classifier`; perhaps `classifier.folded()`.
      path: of the file.

    Raises:
      UserError: see `check_export`.
    """
    if not isinstance(classifier, Classifier):
        raise checks.refuse("classifier", classifier, "what `orthojax.load_classifier` returns")
    check_export(path)

    def predict(images):
        inputs = classifier.preprocessing.normalize(images)
        logits = classifier.net.apply(classifier.variables, inputs, train=False)
        return jax.nn.softmax(logits.astype(jnp.float32))

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *classifier.preprocessing.image_shape), "uint8")
    exported = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(images)
    write_atomic(path, bytes(exported.serialize()))


def check_export(path: str | os.PathLike) -> None:
    """Finds out, before a net is loaded, whether `export` can write it.

    Raises:
      UserError: the extra `[export]` is not installed, or the file cannot be written.
    """
    require("export", "exporting")
    check_output(path)
