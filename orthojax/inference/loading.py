"""`orthojax.load`: from a working directory to a classifier."""

import numbers
import os

from orthojax import checks
from orthojax.inference.classifier import Classifier
from orthojax.training.trained import read_trained


def load(workdir: str | os.PathLike, step: int | str = "best") -> Classifier:
    """Loads the net of a run, on one device; neither its data set nor its optimizer is needed.

    Args:
      workdir: of `orthojax.train_and_evaluate`, or `gs://…`.
      step: "best", by test accuracy (the newest where nothing was evaluated); "latest"; or one of
        the steps that are kept.

    Returns:
      A `Classifier`. Its net has no modulation sites, and its parameters are those of the bare
      model.

    Raises:
      ConfigError: `workdir` is no path, or `step` nothing of the above.
      WorkdirError: there is no run, no such step, or the checkpoint is damaged.

    Example:
      >>> import tempfile, numpy as np, orthojax
      >>> from orthojax.configs.digits_plain110 import get_config
      >>> config, workdir = get_config("depth=8,steps=4"), tempfile.mkdtemp()
      >>> config.mesh.data = 1
      >>> summary = orthojax.train_and_evaluate(config, workdir)
      >>> load(workdir).predict(np.zeros((3, 8, 8, 1), np.uint8)).shape
      (3, 10)
    """
    checks.path("workdir", workdir)
    if step not in ("best", "latest") and not isinstance(step, numbers.Integral):
        raise checks.refuse("step", step, "'best', 'latest' or the number of a step that is kept")
    return Classifier(**vars(read_trained(workdir, step)))
