"""Image-classification data: TFDS sources, in memory or streamed, as exact and resumable batches.

Importing this package imports neither tensorflow-datasets nor scikit-learn nor Grain: `load` does,
when it is called, and it never imports TensorFlow.
"""

from orthojax.extras import require

require("train", "orthojax.data")

from orthojax.data.augmentation import augment, normalize
from orthojax.data.in_memory import InMemoryDataset
from orthojax.data.in_memory_batches import Split, TrainIterator, eval_batches
from orthojax.data.loaders import fake_data, implementation, load
from orthojax.data.protocols import Dataset, TrainBatches
from orthojax.data.streamed import StreamedDataset

__all__ = [
    "Dataset",
    "InMemoryDataset",
    "Split",
    "StreamedDataset",
    "TrainBatches",
    "TrainIterator",
    "augment",
    "eval_batches",
    "implementation",
    "load",
    "normalize",
    "fake_data",
]
