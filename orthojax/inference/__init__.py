"""What becomes of a run: loading a trained net, predicting, evaluating, exporting."""

from orthojax.extras import require

require("train", "orthojax.inference")

from orthojax.inference.classifier import Classifier
from orthojax.inference.loading import load_classifier

__all__ = ["Classifier", "load_classifier"]
