"""The input pipelines: images in memory, and photographs decoded while a net trains."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import sys
import time

import numpy as np

from orthojax import data
from orthojax.benchmarks.measurements import measurement, ratio
from orthojax.benchmarks.programs import BATCH, METHOD, SIZE, make_step, programs
from orthojax.benchmarks.timing import time_interleaved
from orthojax.errors import DatasetError
from orthojax.parallel.cores import usable_cores

STEPS = 4  # per round, so that a batch that is late shows
PHOTOGRAPHS = 512  # decoded per round
CROPS = 64  # to a batch


def measure(rounds: int, depth: int, data_dir: str | None = None):
    """Measures the input; those of photographs need a prepared `imagenet2012` in `data_dir`."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, SIZE, SIZE, 3), np.uint8)
    split = data.Split(images, np.arange(50_000, dtype=np.int32) % 10)
    found = [_gathering(split, rounds), _late_batches(split, depth, rounds)]
    try:
        photographs = data.load("imagenet2012", data_dir)
    except DatasetError as error:
        print(f"the pipeline for photographs is left out: {error}", file=sys.stderr)
        return found
    for cores in (1, 2, 4, 8, 16):
        if cores <= usable_cores():
            found += _decoding(photographs, cores, rounds)
    return found


def _gathering(split, rounds):
    batches = data.TrainIterator(split, BATCH, seed=0)
    count = 200
    rates = []
    with _cores(1):
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(count):
                next(batches)
            rates.append(count * BATCH / (time.perf_counter() - start))
    name = "CIFAR-10 batches from memory, one core"
    return measurement(name, rates, unit="images/s", at_least=100_000)


def _late_batches(split, depth, rounds):
    """The training loop as it is, with batches out of the pipeline and with one that is there."""
    compiled = programs(METHOD, depth)
    batches = data.TrainIterator(split, BATCH, seed=0)

    def several(step):
        def run():
            for _ in range(STEPS):
                step()

        return run

    steps = {
        "constant": several(make_step(compiled)),
        "pipeline": several(make_step(compiled, lambda: compiled.put(next(batches)))),
    }
    seconds = time_interleaved(steps, rounds)
    name = "step time, with the pipeline / with a constant batch"
    return ratio(name, seconds["pipeline"], seconds["constant"], at_most=1.02)


def _decoding(photographs, cores, rounds):
    """The pipeline against decoding alone: the same bytes, the same decoder, as many cores."""
    rates = {"pipeline": [], "bare": []}
    with _cores(cores), contextlib.ExitStack() as stack:
        pipeline = stack.enter_context(_Measured(_pipeline, photographs, cores))
        bare = stack.enter_context(_Measured(_bare, photographs, cores))
        memory = []
        for _ in range(rounds):
            rates["pipeline"].append(pipeline.rate())
            memory.append(pipeline.memory())
            rates["bare"].append(bare.rate())
    on = f"{cores} core{'s' if cores > 1 else ''}"
    return [
        measurement(f"photographs decoded alone, {on}", rates["bare"], unit="images/s"),
        measurement(f"photographs through the pipeline, {on}", rates["pipeline"], unit="images/s"),
        ratio(f"pipeline / decoding alone, {on}", rates["pipeline"], rates["bare"], at_least=0.7),
        measurement(f"pipeline's memory, {on}", memory, unit="MiB"),
        measurement(
            f"pipeline's memory, last round / first, {on}", [memory[-1] / memory[0]], at_most=1.1
        ),
    ]


@contextlib.contextmanager
def _cores(count):
    """Keeps this thread, and the processes that it starts, on so many cores."""
    if not hasattr(os, "sched_setaffinity"):
        print("this platform cannot restrict a process to cores: all are used", file=sys.stderr)
        yield
        return
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everything)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, everything)


class _Measured:
    """A process that measures when it is asked to, and otherwise rests."""

    def __init__(self, target, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=target, args=(other, *arguments))

    def __enter__(self):
        self._process.start()
        self.rate()  # whatever has to be started and opened
        return self

    def rate(self):
        """Images a second."""
        return self._ask("rate")

    def memory(self):
        """MiB of the process and of those that it started; what they share counts once."""
        return self._ask("memory")

    def _ask(self, question):
        self._pipe.send(question)
        return self._pipe.recv()

    def __exit__(self, *error):
        self._pipe.send("end")
        self._process.join()


def _answer(pipe, work):
    while (question := pipe.recv()) != "end":
        if question == "memory":
            pipe.send(_memory())
            continue
        start = time.perf_counter()
        pipe.send(work() / (time.perf_counter() - start))


def _pipeline(pipe, photographs, cores):
    batches = dataclasses.replace(photographs, workers=cores).train_batches(CROPS, seed=0)

    def work():
        for _ in range(PHOTOGRAPHS // CROPS):
            next(batches)
        return PHOTOGRAPHS

    _answer(pipe, work)
    batches.close()


def _bare(pipe, photographs, cores):
    size = photographs.resize
    with concurrent.futures.ProcessPoolExecutor(
        cores, multiprocessing.get_context("spawn")
    ) as pool:
        order = np.random.default_rng(0)

        def work():
            chosen = order.integers(len(photographs.train), size=PHOTOGRAPHS)
            parts = np.array_split(chosen, PHOTOGRAPHS // 8)
            list(pool.map(_decode, [photographs.train] * len(parts), parts, [size] * len(parts)))
            return PHOTOGRAPHS

        _answer(pipe, work)


_records = None


def _decode(records, indices, size):
    global _records  # opened once in a process
    from orthojax.data import jpeg

    _records = _records or records
    for index in indices:
        jpeg.decode(_records[int(index)][0], size)


def _memory():
    pids, total = [os.getpid()], 0
    while pids:
        pid = pids.pop()
        children = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
        pids += [int(child) for path in children for child in path.read_text().split()]
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024
