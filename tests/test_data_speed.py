"""The speed of the host's part: 100,000 CIFAR images a second on one core, and then some."""

import time

import numpy as np

from orthojax.data import Split, TrainIterator


def test_gathering_keeps_up():
    images = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), np.uint8)
    batches = TrainIterator(Split(images, np.zeros(len(images), np.int32)), 128, seed=0)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            next(batches)
        rates.append(200 * 128 / (time.perf_counter() - start))
    assert max(rates) > 100_000, rates  # the best of five: other processes share the machine
