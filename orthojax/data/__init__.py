"""Image-classification data: TFDS sources decoded once, an exact training stream, augmentation.

Importing this package imports neither tensorflow-datasets nor scikit-learn: `load` does, when it
is called, and it never imports TensorFlow.
"""

from orthojax.data.augment import augment, normalize
from orthojax.data.dataset import Dataset, Split, load, stand_in
from orthojax.data.pipeline import TrainIterator, eval_batches

__all__ = [
    "Dataset",
    "Split",
    "TrainIterator",
    "augment",
    "eval_batches",
    "load",
    "normalize",
    "stand_in",
]
