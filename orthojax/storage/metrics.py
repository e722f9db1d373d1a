"""The measurements of a run: one JSON line each in `metrics.jsonl`, and TensorBoard on demand."""

import io
import json
import math
import os
from typing import Any

from orthojax.console import tell
from orthojax.errors import WorkdirError
from orthojax.extras import require
from orthojax.storage.paths import is_remote, to_path, write_atomic

_FILE = "metrics.jsonl"


class MetricWriter:
    """Appends measurements to `metrics.jsonl` in a working directory.

    On resume the records of later steps than `resume_step` are dropped, and so is a last line
    that was half written, so that the file of a resumed run equals that of an undisturbed one.
    For that, write the records of a step before its checkpoint is saved.

    Args:
      workdir: an existing directory. In an object store, which cannot append, the file is
        written anew with every record.
      tensorboard: whether to write TensorBoard events to `workdir/tensorboard` as well.
      resume_step: the step of the restored checkpoint; None where training begins at the
        beginning, and then earlier records are kept as `metrics-1.jsonl`, `metrics-2.jsonl`...

    Raises:
      UserError: TensorBoard is wanted and the extra `[tensorboard]` is not installed.
      WorkdirError: a line of the existing file, other than the last, is not a JSON object.

    Example:
      >>> import pathlib, tempfile
      >>> workdir = tempfile.mkdtemp()
      >>> with MetricWriter(workdir) as writer:
      ...     writer.write(10, "train", loss=2.25, accuracy=0.125)
      >>> print(pathlib.Path(workdir, "metrics.jsonl").read_text(), end="")
      {"step": 10, "kind": "train", "loss": 2.25, "accuracy": 0.125}
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        tensorboard: bool = False,
        resume_step: int | None = None,
    ):
        # First, since it may fail and must then leave the file as it is.
        self._events = _open_events(workdir, resume_step) if tensorboard else None
        path = to_path(workdir) / _FILE
        text = ""
        if resume_step is None:
            _keep_earlier(path)
        elif path.exists():
            kept = [record for record in read_metrics(workdir) if record["step"] <= resume_step]
            text = "".join(map(_to_line, kept))
            write_atomic(path, text.encode())
        self._file = _Object(path, text) if is_remote(path) else path.open("a", encoding="utf-8")

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Appends one record and flushes it.

        Args:
          step: number of finished training steps.
          kind: such as `"train"` or `"test"`.
          **values: numbers, arrays of one element, or lists of such. NaN and infinities become
            null, since JSON has no such numbers. TensorBoard gets no lists.
        """
        numbers = {name: _to_number(value) for name, value in values.items()}
        self._file.write(_to_line({"step": int(step), "kind": kind, **numbers}))
        self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                if not isinstance(value, list):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Object(io.StringIO):
    """A text file in an object store."""

    def __init__(self, path: Any, text: str):
        super().__init__()
        self.write(text)
        self._path = path

    def flush(self) -> None:
        write_atomic(self._path, self.getvalue().encode())


class NullWriter:
    """A `MetricWriter` that writes nothing, for every process but the first."""

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Does nothing."""

    def __enter__(self) -> "NullWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the records that a `MetricWriter` wrote; null becomes NaN again.

    A last line that was cut off is passed over; without a file there are no records.

    Raises:
      WorkdirError: another line than the last is not a JSON object.

    Example:
      >>> import tempfile
      >>> workdir = tempfile.mkdtemp()
      >>> with MetricWriter(workdir) as writer:
      ...     writer.write(10, "test", loss=float("inf"), accuracy=0.1)
      >>> read_metrics(workdir)
      [{'step': 10, 'kind': 'test', 'loss': nan, 'accuracy': 0.1}]
    """
    path = to_path(workdir) / _FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # A record is whole once its end of line is written.
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = {name: _lenient(value) for name, value in json.loads(line).items()}
            step, kind = int(record.pop("step")), record.pop("kind")
            records.append({"step": step, "kind": kind, **record})
        except (ValueError, TypeError, AttributeError, KeyError):
            raise WorkdirError(
                f"{path}, line {number} is damaged; remove that line, or move the file away"
            ) from None
    return records


def _keep_earlier(path: Any) -> None:
    if not path.exists() or not path.read_bytes():
        return
    number = 1
    while (aside := path.with_name(f"metrics-{number}.jsonl")).exists():
        number += 1
    path.rename(aside)
    tell(
        f"there is no checkpoint: training begins at the beginning; earlier records are in {aside}"
    )


def _to_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_number(element) for element in value]
    # Arrays of NumPy and JAX of any dtype, and their scalars, have `item`.
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _to_line(record: dict[str, Any]) -> str:
    strict = {name: _strict(value) for name, value in record.items()}
    return json.dumps(strict, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, list):
        return [_strict(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lenient(value: Any) -> Any:
    if isinstance(value, list):
        return [_lenient(element) for element in value]
    return math.nan if value is None else value


def _open_events(workdir: str | os.PathLike, resume_step: int | None) -> Any:
    require("tensorboard", "writing TensorBoard events")
    import tensorboardX

    # TensorBoard hides what an interrupted run wrote at and after the purge step.
    purge_step = 0 if resume_step is None else resume_step + 1
    return tensorboardX.SummaryWriter(str(to_path(workdir) / "tensorboard"), purge_step=purge_step)
