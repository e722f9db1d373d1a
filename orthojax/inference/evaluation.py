"""How well a trained net does on a labeled split, class by class."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from orthojax import checks
from orthojax.data.protocols import Batch
from orthojax.errors import DatasetError
from orthojax.inference.classifier import Classifier
from orthojax.pictures.picture import label, new_picture

LARGEST_LABELED = 30  # classes up to which a confusion picture has their names and numbers


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome on a split.

    Attributes:
      loss: mean cross-entropy.
      top5_accuracy: the label is among the five most probable classes.
      confusion: int64 (classes, classes), how many images of a row's class were taken for a
        column's.
      class_names: of rows and columns.
    """

    loss: float
    top5_accuracy: float
    confusion: np.ndarray
    class_names: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The most probable class is the label."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def class_accuracies(self) -> np.ndarray:
        """float64 (classes,); NaN for a class that the split does not have."""
        counts = self.confusion.sum(axis=1)
        right = np.diagonal(self.confusion).astype(float)
        return np.divide(right, counts, out=np.full(len(counts), np.nan), where=counts > 0)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON's types."""
        accuracies = self.class_accuracies
        return {
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "loss": self.loss,
            "images": int(self.confusion.sum()),
            "class_accuracies": {
                name: None if np.isnan(value) else value
                for name, value in zip(self.class_names, accuracies.tolist(), strict=True)
            },
            "confusion": self.confusion.tolist(),
        }

    def draw(self) -> Any:
        """The confusion matrix, each row a share of its class, as a matplotlib figure."""
        names, few = [*map(label, self.class_names)], len(self.class_names) <= LARGEST_LABELED
        shares = self.confusion / np.maximum(self.confusion.sum(axis=1, keepdims=True), 1)
        side = 2.5 + 0.35 * min(len(names), LARGEST_LABELED)
        picture = new_picture(side, side)
        axes = picture.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="label", title=f"accuracy {self.accuracy:.1%}")
        if few:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
            for (row, column), count in np.ndenumerate(self.confusion):
                if count:
                    color = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, count, ha="center", va="center", color=color, fontsize=7)
        return picture


def evaluate(
    classifier: Classifier, batches: Iterable[Batch], class_names: Sequence[str] | None = None
) -> Evaluation:
    """Evaluates a net on labeled batches, every image whose mask is 1 once.

    Args:
      classifier: from `orthojax.load_classifier`.
      batches: of `orthojax.data.Dataset.test_batches`.
      class_names: of the data set, `dataset.preprocessing.class_names`: its labels are taken by
        name, and it may lack some of the net's classes. None takes them to be the net's.

    Raises:
      ConfigError: `classifier` is none.
      DatasetError: a class is none of the net's, a label is none of the classes', an image is not
        of the net's shape, a batch has no mask, or there is no image.
    """
    if not isinstance(classifier, Classifier):
        raise checks.refuse("classifier", classifier, "what `orthojax.load_classifier` returns")
    given = classifier.class_names if class_names is None else tuple(class_names)
    labels_here = classifier.preprocessing.labels_of(given)
    classes = len(classifier.class_names)
    confusion = np.zeros((classes, classes), np.int64)
    loss, among_five = 0.0, 0
    for batch in batches:
        images, labels = _real(batch, len(given))
        labels = labels_here[labels]
        logits = classifier.logits(images).astype(np.float64)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        np.add.at(confusion, (labels, best[:, 0]), 1)
        among_five += int((best == labels[:, None]).any(axis=1).sum())
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(shifted).sum(axis=1))
        loss += float((log_sums - shifted[np.arange(len(labels)), labels]).sum())
    images = int(confusion.sum())
    if not images:
        raise DatasetError("there is no image in these batches to evaluate on; give others")
    return Evaluation(loss / images, among_five / images, confusion, classifier.class_names)


def _real(batch: Batch, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a batch, without what it is filled up with."""
    missing = [key for key in ("image", "label", "mask") if key not in batch]
    if missing:
        raise DatasetError(
            f"a batch has no {missing[0]!r}; give those of `Dataset.test_batches`, not of training"
        )
    real = np.asarray(batch["mask"]) > 0
    labels = np.asarray(batch["label"])[real]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DatasetError(f"labels are {labels.dtype} {labels.shape}, and must be integers (N,)")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DatasetError(f"there is a label {outside[0]}, and labels are 0 to {classes - 1}")
    return np.asarray(batch["image"])[real], labels
