"""Bytes: safetensors, msgpack and PyTorch files, found, read and written."""
