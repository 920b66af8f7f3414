"""Write MXNet's parameter files, in all versions of its arrays."""

from __future__ import annotations

import struct

import numpy as np

MAGIC = {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}
CODES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}
DENSE = 0
CPU = (1, 0)


def shape_bytes(shape, version):
    return struct.pack(f"<I{len(shape)}{'I' if version == 0 else 'q'}", len(shape), *shape)


def array_bytes(array, version=2, *, storage=DENSE, code=None, shape=None):
    """Return an array as MXNet writes it; the keywords are for what it would not write."""
    array = np.asarray(array)
    head = b"" if version == 0 else struct.pack("<I", MAGIC[version])
    head += struct.pack("<i", storage) if version >= 2 else b""
    head += shape_bytes(array.shape if shape is None else shape, version)
    code = CODES[str(array.dtype)] if code is None else code
    return head + struct.pack("<iii", *CPU, code) + array.tobytes()


def file_bytes(arrays, names):
    """Return a file of arrays that are bytes already."""
    texts = [name.encode() for name in names]
    return (
        struct.pack("<QQQ", 0x112, 0, len(arrays))
        + b"".join(arrays)
        + struct.pack("<Q", len(texts))
        + b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    )


def write_params(path, arrays, version=2):
    """Write {name: array}."""
    path.write_bytes(file_bytes([array_bytes(a, version) for a in arrays.values()], list(arrays)))
