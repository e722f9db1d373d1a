"""Convolution in C++ for x86-64 CPUs, built at first use; `docs/native.md` says what and why."""

from orthojax.native.convolution import describe, fits, forward, input_gradient, kernel_gradient

__all__ = ["describe", "fits", "forward", "input_gradient", "kernel_gradient"]
