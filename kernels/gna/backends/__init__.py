"""Implementations of neighborhood attention in Python, one a file; C++ and CUDA are in `cuda`."""
