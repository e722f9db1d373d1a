"""Builds the C++ part into the cache directory and registers it with XLA, at most once a process.

What is built is found again by its name, which holds a digest of the sources, of the flags, of
`$CXX`, and of the versions of jaxlib and the C library: a new jaxlib builds anew. The compiler's
version is not in it, so what is built serves where the compiler is another one, or gone. A library
is loaded only if nobody else can have written it and it is whole: the SHA-256 digest of what is
before it stands at its end.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile

import jax
import jaxlib
from absl import logging

from orthojax.caches import OTHERS_MAY_WRITE, cache_directory, keep_private

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

SWITCH = "ORTHOJAX_NATIVE"
HANDLERS = ("forward", "input_gradient", "kernel_gradient")

_HERE = pathlib.Path(__file__).resolve().parent
_SOURCES = ("kernels.h", "kernels.cc", "convolution.cc")
_FLAGS = ("-std=gnu++17", "-O3", "-fPIC", "-ffp-contract=fast", "-w")
_KERNELS = {  # one object file for each instruction set
    "avx2": ("-mavx2", "-mfma", "-DORTHOJAX_LANES=8", "-DORTHOJAX_NAME=kAvx2"),
    "avx512": ("-mavx512f", "-mavx2", "-mfma", "-DORTHOJAX_LANES=16", "-DORTHOJAX_NAME=kAvx512"),
}
_TIMEOUT = 300  # seconds for one run of the compiler


class _Unavailable(Exception):
    """The native part cannot be built here; the message says why."""


@functools.cache
def targets() -> dict[str, str] | None:
    """Names under which XLA knows the handlers, by handler; None where there are none.

    Builds them if need be. Why there are none is logged in one line, unless the environment
    variable `ORTHOJAX_NATIVE=0` asked for that.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        directory = cache_directory("native")
        if directory is None:
            raise _Unavailable("there is no home to keep them in; set XDG_CACHE_HOME")
        return load(build(directory))
    except (_Unavailable, OSError) as error:
        logging.warning("XLA's convolutions are used instead of the native ones: %s", error)
        return None


def build(directory: pathlib.Path, *extra_flags: str) -> pathlib.Path:
    """The shared library, built in `directory` unless it is there; others wait for who builds.

    One that is damaged, or that somebody else can have written, is built anew.

    Args:
      directory: is made if it does not exist.
      extra_flags: of the compiler.

    Raises:
      OSError: the directory cannot be written, or others can write in it.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        raise _Unavailable(f"they are not written for {platform.system()} on {platform.machine()}")
    given = _compiler()
    library = directory / f"{_digest(given, extra_flags)}.so"
    keep_private(directory)
    if _is_sound(library):
        return library
    with _lock(library.with_suffix(".lock")):
        if not _is_sound(library):
            compiler = _found(given)
            logging.info("building %s with %s", library, compiler[0])
            _compile(compiler, extra_flags, library)
    return library


def load(library: pathlib.Path) -> dict[str, str]:
    """Registers the handlers of a library that `build` has returned.

    Returns:
      XLA's names of them, by handler; a name ends with the first 16 digits of the digest of what
      the library holds.
    """
    loaded = ctypes.CDLL(str(library))
    if not loaded.orthojax_supported():
        raise _Unavailable("this processor has no AVX2")
    digest = library.read_bytes()[-hashlib.sha256().digest_size :].hex()[:16]
    names = {handler: f"orthojax_{handler}_{digest}" for handler in HANDLERS}
    for handler, name in names.items():
        function = jax.ffi.pycapsule(getattr(loaded, f"orthojax_{handler}"))
        jax.ffi.register_ffi_target(name, function, platform="cpu")
    return names


def _compiler() -> list[str]:
    """The command in `$CXX`, empty where that is not set."""
    given = os.environ.get("CXX", "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise _Unavailable(f"$CXX is {given!r}, which is no command: {error}") from None


def _found(given: list[str]) -> list[str]:
    """The command of the C++ compiler: the one given, or else the first that is there."""
    for command in [given] if given else (["c++"], ["g++"], ["clang++"]):
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if given:
        raise _Unavailable(f"there is no {given[0]}, which $CXX names")
    raise _Unavailable("there is no C++ compiler ($CXX, c++, g++, clang++)")


def _digest(compiler, extra_flags) -> str:
    digest = hashlib.sha256()
    libc = "CS_GNU_LIBC_VERSION"
    parts = [jaxlib.__version__, os.confstr(libc) if libc in os.confstr_names else ""]
    parts += [*compiler, *_FLAGS, *extra_flags]
    parts += [flag for flags in _KERNELS.values() for flag in flags]
    for part in [*((_HERE / name).read_bytes() for name in _SOURCES), *map(os.fsencode, parts)]:
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def _is_sound(library) -> bool:
    """Whether a library is there, whole, and written by this user or by root."""
    try:
        status = library.lstat()
        content = library.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return False
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & OTHERS_MAY_WRITE:
        return False
    size = hashlib.sha256().digest_size
    return content[-size:] == hashlib.sha256(content[:-size]).digest()


def _compile(compiler, extra_flags, library):
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        command = [*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}"]
        objects = {"convolution": ("convolution.cc", ())}
        objects |= {name: ("kernels.cc", flags) for name, flags in _KERNELS.items()}
        for name, (source, flags) in objects.items():
            _run(
                [
                    *command,
                    *flags,
                    *extra_flags,
                    "-c",
                    str(_HERE / source),
                    "-o",
                    f"{place}/{name}.o",
                ]
            )
        built = pathlib.Path(place, library.name)
        _run([*compiler, "-shared", "-o", str(built), *(f"{place}/{name}.o" for name in objects)])
        with built.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)  # behind what the loader looks at
            file.flush()
            os.fsync(file.fileno())
        built.chmod(0o755)
        os.replace(built, library)  # at once: whoever sees it, sees all of it


def _run(command) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise _Unavailable(f"{command[0]} took more than {_TIMEOUT} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise _Unavailable(f"{command[0]} failed: {first.strip()}")
    return done.stdout


@contextlib.contextmanager
def _lock(path):
    """Held by one process at a time, where the file system has locks."""
    with open(path, "wb") as file:
        if fcntl is not None:
            # Without locks each process builds for itself, and the last one's stays.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
