"""ImageNet's archives, through TFDS's own builder, to batches; on a miniature of few photographs.

`ORTHOJAX_IMAGENET_MANUAL_DIR` is a directory with `ILSVRC2012_img_train.tar` and
`ILSVRC2012_img_val.tar`, laid out as the official ones.
"""

import collections
import importlib.util
import os
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from orthojax.data import load, prepared
from tests.data.prepare_data import prepare_data

ARCHIVES = os.environ.get("ORTHOJAX_IMAGENET_MANUAL_DIR")
MINIATURE = 2**30  # bytes of the largest that these tests take

NEEDED = ("tensorflow", "importlib_resources", "grain", "simplejpeg", "cv2")
MISSING = [package for package in NEEDED if importlib.util.find_spec(package) is None]

pytestmark = [
    pytest.mark.skipif(not ARCHIVES, reason="ORTHOJAX_IMAGENET_MANUAL_DIR is not set"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def archived():
    """The file names in the archives of each split, with the contents of the files."""
    train, validation = (
        pathlib.Path(ARCHIVES) / f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")
    )
    if train.stat().st_size > MINIATURE:
        pytest.skip("the archives are the whole of ImageNet, which takes hours")
    found = {"train": {}}
    with tarfile.open(train) as classes:
        for member in classes:
            found["train"] |= contents(classes.extractfile(member))
    with validation.open("rb") as file:
        found["validation"] = contents(file)
    return found


def contents(file):
    with tarfile.open(fileobj=file) as images:
        return {member.name: images.extractfile(member).read() for member in images}


@pytest.fixture(scope="module")
def data_dir(archived, tmp_path_factory):
    """Holds `imagenet2012` and `imagenet2012_256`, both prepared by one command."""
    place = str(tmp_path_factory.mktemp("tfds"))
    places = (f"--data_dir={place}", f"--manual_dir={ARCHIVES}")
    done = prepare_data("imagenet2012", "--resize=256", *places, timeout=600)
    assert done.stdout.endswith(f"{place}/imagenet2012_256/5.1.0\n")
    return place


def examples(name, data_dir, split):
    """File names and labels in the order of the records."""
    builder = prepared.named_builder(name, data_dir)
    decoders = {"image": tfds.decode.SkipDecoding()}
    found = builder.as_data_source(split, decoders=decoders)
    return [(e["file_name"].decode(), int(e["label"])) for e in found]


@pytest.fixture(scope="module")
def validation(data_dir):
    """The batches of 32 of one pass."""
    return list(load("imagenet2012", data_dir, workers=2).test_batches(32))


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet2012_256"])
def test_every_photograph_of_the_archives_is_there_with_its_class(name, data_dir, archived):
    dataset = load(name, data_dir)
    assert dataset.num_classes == 1000
    assert (dataset.train_size, dataset.test_size) == (
        len(archived["train"]),
        len(archived["validation"]),
    )
    classes = prepared.find(name, data_dir).builder.info.features["label"].names
    for split, expected in archived.items():
        found = examples(name, data_dir, split)
        assert sorted(file_name for file_name, _ in found) == sorted(expected)
        if split == "train":  # the file names begin with the class
            assert all(f.split("_")[0] == classes[label] for f, label in found)


def test_evaluation_sees_every_image_exactly_once(data_dir, validation, archived):
    expected = [label for _, label in examples("imagenet2012", data_dir, "validation")]
    assert len(validation) == -(-len(expected) // 32)
    assert all(batch["image"].shape == (32, 224, 224, 3) for batch in validation)
    images, labels, mask = (
        np.concatenate([batch[key] for batch in validation]) for key in ("image", "label", "mask")
    )
    assert mask.sum() == len(expected) and mask[: len(expected)].all()
    assert labels[: len(expected)].tolist() == expected
    # Some photographs of the miniature are in its archive under two names.
    times = collections.Counter(image.tobytes() for image in images[: len(expected)]).values()
    archived_times = collections.Counter(archived["validation"].values()).values()
    assert sorted(times) == sorted(archived_times)


def test_the_squares_agree_with_the_photographs(data_dir, validation, archived):
    for split in archived:
        squares, photographs = (
            examples(name, data_dir, split) for name in ("imagenet2012_256", "imagenet2012")
        )
        assert squares == photographs
    psnr = []
    for batch, expected in zip(
        load("imagenet2012_256", data_dir, workers=0).test_batches(32), validation, strict=True
    ):
        np.testing.assert_array_equal(batch["label"], expected["label"])
        np.testing.assert_array_equal(batch["mask"], expected["mask"])
        difference = batch["image"].astype(float) - expected["image"]
        errors = np.square(difference).mean((1, 2, 3))[expected["mask"] > 0]
        psnr.extend(10 * np.log10(255**2 / errors))
    # The rounding of windows to whole pixels of the photograph is in it, besides JPEG's loss.
    assert np.mean(psnr) > 36 and np.min(psnr) > 25, "dB"
