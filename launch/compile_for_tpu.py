"""Compiles a config's training step for TPUs, on a machine without one, and prints its costs.

python launch/compile_for_tpu.py --config=cifar10_plain:depth=110 --topology=v5e:4x4
python launch/compile_for_tpu.py --config=cifar10_plain:depth=110 \\
    --compare=cifar10_plain:depth=110,method=baseline   # side by side, with ratios

Needs the TPU compiler, `pip install -e '.[train,tpu]'`, and no data set. Nothing is run.
"""

import dataclasses
import json
import os
import pathlib
import sys
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: it must not look for a TPU

from absl import flags

from orthojax.commands.command_line import run
from orthojax.commands.config_flag import (
    define_config,
    load_config,
    override_words,
    split_arguments,
)
from orthojax.storage.paths import check_output, local_path, output_directory, write_atomic

PACKAGES = ("orthojax", "jax", "jaxlib", "libtpu", "flax", "optax")


def define_flags():
    define_config("cifar10_plain")
    define_config(None, name="compare")
    flags.DEFINE_string("topology", "v5e:4x4", "The TPUs: v5e:4x4, v5p:2x2x2, v6e:16x16...")
    flags.DEFINE_string("json", None, "File to write the records to.")


def main():
    import jax

    from orthojax.benchmarks.cost import table, tpu_devices
    from orthojax.config.sections import differences, to_json

    options = flags.FLAGS
    file = options.json and local_path(options.json)
    if file:
        output_directory(file.parent)
        check_output(file)
    configs = {flag: found for flag in ("config", "compare") if (found := load_config(flag))}
    devices = tpu_devices(options.topology)
    jax.config.update("jax_enable_compilation_cache", False)  # the compile time is measured
    costs = [(name(flag), compile_step(flag, config, devices)) for flag, config in configs.items()]
    print(table(costs))
    print("\nThe body of a loop counts once: compare with model.scan=False. Nothing was run.")
    if len(costs) == 2:
        found = differences(configs["compare"], configs["config"])
        print("From the second config to the first:", *(found or ["no difference"]), sep="\n  ")
    if file:
        records = [
            {
                "name": title,
                "config": to_json(config),
                "topology": options.topology,
                "cost": dataclasses.asdict(cost),
                "versions": {package: version(package) for package in PACKAGES},
            }
            for config, (title, cost) in zip(configs.values(), costs, strict=True)
        ]
        write_atomic(file, (json.dumps(records, indent=1) + "\n").encode())


def name(flag):
    """The config's name with its arguments, and with what the command line overrides."""
    path, arguments = split_arguments(flags.FLAGS[flag].value)
    details = [*filter(None, [arguments]), *override_words(flag)]
    return pathlib.Path(path).stem + (f":{','.join(details)}" if details else "")


def compile_step(flag, config, devices):
    from orthojax.benchmarks.cost import measure
    from orthojax.training.compiled import abstract_state, lower_train_step
    from orthojax.training.experiment import build

    print(f"compiling {name(flag)}, which takes minutes...", file=sys.stderr, flush=True)
    experiment = build(config, devices=devices, records=False)
    return measure(lower_train_step(experiment, abstract_state(experiment)))


if __name__ == "__main__":
    run(define_flags, main)
