"""`orthojax.load_classifier`: from a working directory to a classifier."""

import os

from orthojax import checks
from orthojax.inference.classifier import Classifier
from orthojax.parallel.processes import available_devices
from orthojax.training.restore import read_trained


def load_classifier(
    workdir: str | os.PathLike, step: int | str = "latest", own_net: str | None = None
) -> Classifier:
    """Loads the net of a run, on one device; neither its data set nor its optimizer is needed.

    Nothing is changed, and the run may be training. What a run from a stranger can do, and what it
    cannot: see "What is safe to open" in the documentation.

    Args:
      workdir: of `orthojax.train_and_evaluate`, or `gs://…`.
      step: "latest"; one of the steps that are kept; or "best", by validation accuracy, which only
        a run with `dataset.validation` has.
      own_net: the `package.module:Net` that the run was trained with, if that is none of
        `orthojax.models`: its module is imported and run.

    Returns:
      A `Classifier`. Its net has no modulation sites, and its parameters are those of the bare
      model.

    Raises:
      ConfigError: `workdir` is no path, `step` nothing of the above, or `own_net` no name; or JAX
        finds no device.
      WorkdirError: there is no run, no such step or no best one,
        something of it is damaged, or its net is
        somebody's own and not `own_net`.

    Example:
      >>> import tempfile, numpy as np, orthojax
      >>> from orthojax.configs.digits_plain110 import get_config
      >>> config, workdir = get_config("depth=8,steps=4"), tempfile.mkdtemp()
      >>> config.mesh.data = 1
      >>> summary = orthojax.train_and_evaluate(config, workdir)
      >>> load_classifier(workdir).predict(np.zeros((3, 8, 8, 1), np.uint8)).shape
      (3, 10)
    """
    checks.path("workdir", workdir)
    if step not in ("best", "latest") and not str(step).isdecimal():
        raise checks.refuse("step", step, "'latest', 'best' or the number of a step that is kept")
    if not isinstance(own_net, str | None):
        raise checks.refuse("own_net", own_net, "the package.module:Net of the run, or None")
    available_devices()
    return Classifier(**vars(read_trained(workdir, step, own_net)))
