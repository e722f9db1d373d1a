"""What a config may say; a config file needs :func:`parse_arguments` alone."""

from orthojax.extras import require

require("train", "orthojax.config")

from orthojax.config.arguments import parse_arguments

__all__ = ["parse_arguments"]
