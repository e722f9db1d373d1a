"""Shared settings of the tests: CPU devices, float32 convolutions, a persistent compile cache."""

import os
import pathlib
import signal

# Under `nohup` the processes that are tested would ignore it too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "orthojax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do, and what is compiled runs for a moment.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
