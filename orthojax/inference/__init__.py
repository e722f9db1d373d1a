"""What becomes of a run: loading a trained net, predicting, evaluating, exporting."""

from orthojax.inference.classifier import Classifier
from orthojax.inference.loading import load

__all__ = ["Classifier", "load"]
