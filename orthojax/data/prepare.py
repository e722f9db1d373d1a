"""Preparing a data set with TFDS's own builder: the one place where TensorFlow may be imported."""

from orthojax.caches import expand
from orthojax.data import prepared
from orthojax.errors import DatasetError
from orthojax.extras import require


def prepare(name: str, data_dir: str | None = None, manual_dir: str | None = None) -> str:
    """Downloads a TFDS data set and writes it as `array_record`, which needs no TensorFlow to read.

    A set that is prepared already is left as it is. Run this in a process of its own
    (`orthojax prepare`): TFDS imports TensorFlow to write any set but the bundled ones.

    Args:
      name: see `orthojax.data.load`.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      manual_dir: where the archives are that TFDS cannot download itself, such as ImageNet's.

    Returns:
      The directory of the prepared set.

    Raises:
      DatasetError: the name is unknown, TensorFlow is missing, an archive is missing, the
        download failed, or the set is there in another format.
    """
    manual_dir = expand(manual_dir) if manual_dir else None
    from orthojax.data import bundled  # here, so that importing this does not import TFDS

    builder = prepared.named_builder(name, data_dir)
    if not prepared.is_prepared(builder):
        if isinstance(builder, bundled.Bundled):
            bundled.prepare(builder)
        else:
            _download_and_prepare(name, builder, manual_dir)
    prepared.check_prepared(name, builder)
    return str(builder.data_path)


def _download_and_prepare(name, builder, manual_dir):
    import tensorflow_datasets as tfds

    require("prepare", f"preparing {name!r} (training does not)")
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
        )
    except ImportError as error:
        raise DatasetError(
            f"preparing {name!r} needs a package that is missing: {error}; install it, or "
            "everything that the common data sets need: pip install 'orthojax-nets[prepare]'"
        ) from error
    except AssertionError as error:  # TFDS's way of saying which archive it wants, and where
        raise DatasetError(f"cannot prepare {name!r}: {error}") from error
    except Exception as error:  # of the network, the archives, the disk, and the builder's own
        raise DatasetError(
            f"cannot prepare {name!r} in {builder.data_path}: {type(error).__name__}: {error}; "
            "check the network, the disk, and whether the archives' host is up, and run the "
            "command again"
        ) from error
