"""GGUF files byte by byte, healthy or not."""

import struct


def text(value):
    """A text with its length before it."""
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def setting(name, kind, value):
    """A setting of that kind's number, whose value is packed already."""
    return text(name) + struct.pack("<I", kind) + value


def entry(name, shape, kind, offset):
    """What announces a tensor; the shape as NumPy has it."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def head(tensors, settings, version=3):
    """What a file begins with, given the numbers of its entries."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings)


def gguf_bytes(tensors, settings=(), alignment=32):
    """A file; tensors: name -> (number of the type, shape, bytes)."""
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        infos += entry(name, shape, kind, len(data))
        data += content
    front = head(len(tensors), len(settings)) + b"".join(settings) + infos
    return front + bytes(-len(front) % alignment) + data
