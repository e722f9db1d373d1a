"""Image-classification data: TFDS sources decoded once, an exact training stream, augmentation.

Importing this package imports neither tensorflow-datasets nor scikit-learn: `load` does, when it
is called, and it never imports TensorFlow.
"""

from orthojax.data.augment import augment, normalize
from orthojax.data.dataset import InMemoryDataset, load, stand_in
from orthojax.data.interface import Dataset, TrainBatches
from orthojax.data.pipeline import Split, TrainIterator, eval_batches

__all__ = [
    "Dataset",
    "InMemoryDataset",
    "Split",
    "TrainBatches",
    "TrainIterator",
    "augment",
    "eval_batches",
    "load",
    "normalize",
    "stand_in",
]
