"""Configs by name: `--config=NAME`; the package is installed as `orthojax.configs`."""
