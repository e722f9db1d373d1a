"""Compiles a config's training step for TPUs, on a machine without one, and prints its costs.

python launch/compile_for_tpu.py --config=configs/cifar10_plain.py:depth=110 --topology=v5e:4x4
python launch/compile_for_tpu.py --config=configs/cifar10_plain.py:depth=110 \\
    --compare=configs/cifar10_plain.py:depth=110,method=l2   # side by side, with ratios

Needs the TPU compiler, `pip install -e '.[tpu]'`, and no data set. Nothing is run.
"""

import dataclasses
import json
import os
import pathlib
import sys
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: it must not look for a TPU

from absl import flags
from ml_collections import config_flags

from command_line import define_config, run

PACKAGES = ("orthojax", "jax", "jaxlib", "libtpu", "flax", "optax")


def define_flags():
    define_config("cifar10_plain")
    config_flags.DEFINE_config_file(
        "compare", None, "Config to compare with; --compare.key=VALUE for any key of it."
    )
    # Loads it while flags are parsed, where what is wrong with it is told in one line.
    flags.register_validator("compare", lambda config: config is None or config.to_dict())
    flags.DEFINE_string("topology", "v5e:4x4", "The TPUs: v5e:4x4, v5p:2x2x2, v6e:16x16...")
    flags.DEFINE_string("json", None, "File to write the records to.")


def main():
    import jax

    from orthojax.analysis.cost import table, tpu_devices
    from orthojax.config import differences, to_json

    options = flags.FLAGS
    devices = tpu_devices(options.topology)
    jax.config.update("jax_enable_compilation_cache", False)  # the compile time is measured
    chosen = ["config"] + ["compare"] * (options.compare is not None)
    costs = [(name(flag), compile_step(flag, devices)) for flag in chosen]
    print(table(costs))
    print("\nThe body of a loop counts once: compare with model.scan=False. Nothing was run.")
    if len(costs) == 2:
        found = differences(options.compare, options.config)
        print("From the second config to the first:", *(found or ["no difference"]), sep="\n  ")
    if options.json:
        records = [
            {
                "name": title,
                "config": to_json(options[flag].value),
                "topology": options.topology,
                "cost": dataclasses.asdict(cost),
                "versions": {package: version(package) for package in PACKAGES},
            }
            for flag, (title, cost) in zip(chosen, costs, strict=True)
        ]
        pathlib.Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(options.json).write_text(json.dumps(records, indent=1) + "\n")


def name(flag):
    """The config's name with its arguments, and with what the command line overrides."""
    path, _, arguments = config_flags.get_config_filename(flags.FLAGS[flag]).partition(":")
    overrides = [word.partition(".")[2] for word in sys.argv if word.startswith(f"--{flag}.")]
    details = [arguments, *overrides] if arguments else overrides
    return pathlib.Path(path).stem + (f":{','.join(details)}" if details else "")


def compile_step(flag, devices):
    from orthojax.analysis.cost import measure
    from orthojax.data import fake_data
    from orthojax.experiment import build
    from orthojax.programs import lower_train_step

    print(f"compiling {name(flag)}, which takes minutes...", file=sys.stderr, flush=True)
    experiment = build(flags.FLAGS[flag].value, devices=devices, load=fake_data)
    return measure(lower_train_step(experiment))


if __name__ == "__main__":
    run(define_flags, main)
