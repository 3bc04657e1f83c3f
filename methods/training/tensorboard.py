"""Scalars for TensorBoard, without TensorBoard: the event-file format is a few lines.

An event file is a sequence of TFRecords (length, masked CRC-32C of the length, payload, masked
CRC-32C of the payload), each holding a protobuf `Event` (tensorflow/core/util/event.proto:
1 wall_time double, 2 step int64, 3 file_version string, 5 summary; in `Summary` 1 value; in
`Value` 1 tag string, 2 simple_value float).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class TensorBoardWriter:
    """Writes scalar curves that `tensorboard --logdir DIRECTORY` shows."""

    def __init__(self, directory: str | Path) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._record(_double(1, time.time()) + _bytes(3, b"brain.Event:2"))

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point per metric at `step`."""
        values = (_bytes(1, name.encode()) + _float(2, value) for name, value in metrics.items())
        summary = b"".join(_bytes(1, value) for value in values)
        self._record(_double(1, time.time()) + _varint(2 << 3) + _varint(step) + _bytes(5, summary))
        self._file.flush()

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _record(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        crcs = (struct.pack("<I", _masked_crc32c(part)) for part in (length, payload))
        self._file.write(length + next(crcs) + payload + next(crcs))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _masked_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # Castagnoli, reflected
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
