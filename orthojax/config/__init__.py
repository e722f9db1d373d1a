"""What a config may say; a config file needs :func:`parse_arguments` alone."""

from orthojax.config.arguments import parse_arguments

__all__ = ["parse_arguments"]
