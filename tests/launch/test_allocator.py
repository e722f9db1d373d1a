"""The allocator's settings: pages that a program has freed are not faulted in again."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
if "keep" in sys.argv:
    from orthojax.commands.allocator import keep_freed_memory
    assert keep_freed_memory()
def touch():
    for _ in range(5):
        bytearray(b"x" * 30_000_000)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments):
    command = [sys.executable, "-c", FAULTS, *arguments]
    return int(subprocess.run(command, capture_output=True, check=True, env=os.environ).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_pages_are_kept():
    assert faults("keep") < 100 < 10_000 < faults()


def test_without_glibc_nothing_is_done(monkeypatch):
    from orthojax.commands.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
