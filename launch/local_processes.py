"""Trains in several processes on this machine's CPU: a pod in miniature, to try and to test.

python launch/local_processes.py --processes 2 --devices-per-process 2 -- --config.batch_size=64

What follows -- goes to launch/train.py. Ctrl-C or SIGTERM stops all of them, with one checkpoint;
on Linux they stop so too when this process is killed.
"""

import argparse
import contextlib
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

TRAIN = pathlib.Path(__file__).resolve().with_name("train.py")
GRACE_SECONDS = 30
_PDEATHSIG = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="DEVICES")
    parser.add_argument("arguments", nargs="*", help="after --: what launch/train.py is given")
    options = parser.parse_args()
    coordinator = f"localhost:{free_port()}"
    started = [start(index, coordinator, options) for index in range(options.processes)]
    threads = [threading.Thread(target=relay, args=(index, process)) for index, process in started]
    for thread in threads:
        thread.start()
    processes = [process for _, process in started]
    # A terminal sends Ctrl-C to all of them by itself; SIGTERM comes to this one alone.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: [p.send_signal(signal.SIGTERM) for p in processes])
    codes = wait(processes)
    for thread in threads:
        thread.join()
    return next((128 - code if code < 0 else code for code in codes if code), 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(index, coordinator, options):
    devices = f"--xla_force_host_platform_device_count={options.devices_per_process}"
    command = [sys.executable, str(TRAIN), *options.arguments, f"--coordinator={coordinator}"]
    command += [f"--processes={options.processes}", f"--process_id={index}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    parent = os.getpid()
    return index, subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: end_with(parent),
    )


def end_with(parent):
    """Has the kernel end this process, as SIGTERM does, once its parent is dead: on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(1)


def relay(index, process):
    """Passes output on, byte by byte; that of the others than the first says whose it is.

    Read to its end even if nobody is there to read it any more: or the process would wait for that.
    """
    prefix = b"[%d] " % index if index else b""
    for line in process.stdout:
        if not line.startswith(b"[Gloo]"):  # which says at length that all is well
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stdout.buffer.write(prefix + line)
                sys.stdout.buffer.flush()


def wait(processes):
    """Exit codes in the order of dying; once one has failed the others get a moment to follow."""
    codes = []
    done = threading.Condition()

    def watch(process):
        code = process.wait()
        with done:
            codes.append(code)
            done.notify()

    for process in processes:
        threading.Thread(target=watch, args=(process,), daemon=True).start()
    with done:
        while len(codes) < len(processes):
            failed = any(codes)
            if not done.wait(GRACE_SECONDS if failed else None):
                for process in processes:
                    process.kill()
                failed = False
    return codes


if __name__ == "__main__":
    sys.exit(main())
