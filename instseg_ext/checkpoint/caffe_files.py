"""Caffe's weight files, HDF5 and binary protobuf, read as data.

Arrays are named by their layer and their number in it, ``"conv1_1/0"`` for the weights and
``"conv1_1/1"`` for the bias, as the HDF5 form names them below ``/data``. Convolutions are
(out, in, height, width), fully connected layers (out, in).
"""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["HDF5_MAGIC", "read_caffe_hdf5", "read_caffemodel"]

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_EXTRA = "pip install 'instseg_ext[caffe]'"
# Protobuf refuses larger messages; Caffe then writes HDF5.
_LARGEST_MESSAGE = 2**31 - 1
_MOST_DIMENSIONS = 32
_OBJECT_HEADER = 64  # an array in HDF5 takes more bytes than this beside its values


# --- HDF5 ----------------------------------------------------------------------------------------


def read_caffe_hdf5(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays below ``/data`` of a file that Caffe wrote as HDF5.

    A layer that shares its parameters with an earlier one has a group without arrays.

    Args:
        path: local file.

    Returns:
        float32 arrays by ``layer/number``.

    Raises:
        ImportError: if h5py is not installed.
        ValueError: if the file is damaged or holds something else; links to other places, and
            arrays that take more memory than they take in the file, each or together, are refused.
    """
    h5py = _h5py(path)
    size = Path(path).stat().st_size
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(_member(h5py, file, "data"), h5py.Group):
                raise ValueError("it has no group /data")
            return _arrays(h5py, file["data"], size)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        # h5py raises all of these for damaged content.
        text = str(error).strip("'\"").rstrip(".")
        raise ValueError(f"{path} cannot be read as HDF5 of Caffe: {text}.") from error


def _h5py(path: str | os.PathLike[str]) -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path} needs h5py: {_EXTRA}.") from error
    return h5py


def _member(h5py: ModuleType, group: Any, name: str) -> Any:
    """Return a member of a group; links could lead to other files of this machine."""
    link = group.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise ValueError(f"{group.name}/{name} is a link")
    return group.get(name)


def _arrays(h5py: ModuleType, data: Any, file_size: int) -> dict[str, np.ndarray]:
    """Read the arrays of all layers."""
    arrays, taken = {}, 0
    layers = {name: _member(h5py, data, name) for name in data}
    for layer, group in layers.items():
        for number in group if isinstance(group, h5py.Group) else ():
            dataset = _dataset(h5py, _member(h5py, group, number), file_size)
            # One array can have many names.
            taken += dataset.nbytes + _OBJECT_HEADER
            if taken > file_size:
                raise ValueError(
                    f"up to {dataset.name} its arrays take {taken} bytes, and the file has "
                    f"{file_size}: some have several names, which Caffe does not do"
                )
            arrays[f"{layer}/{number}"] = dataset[()].astype(np.float32, copy=False)
    return arrays


def _dataset(h5py: ModuleType, dataset: Any, file_size: int) -> Any:
    """Return what is an array of numbers that lies in the file as it is; nothing is read yet."""
    array = isinstance(dataset, h5py.Dataset) and dataset.shape is not None
    if not array or dataset.dtype.kind not in "fi":
        raise ValueError(f"{getattr(dataset, 'name', 'a member')} is no array of numbers")
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{dataset.name} lies in another file")
    stored = min(dataset.id.get_storage_size(), file_size)
    if dataset.nbytes > stored:
        raise ValueError(
            f"{dataset.name} would take {dataset.nbytes} bytes of memory but takes {stored} in "
            "the file, which Caffe does not do"
        )
    return dataset


# --- protobuf ------------------------------------------------------------------------------------

# Numbers and kinds of the fields that are read, * marks repeated ones; protobuf skips the others.
# Packed values are declared as the bytes that they are in the file: as numbers, each would become
# an object.
_FIELDS = {
    "Shape": [("dim", 1, "int64*")],
    "Blob": [
        ("num", 1, "int32"),
        ("channels", 2, "int32"),
        ("height", 3, "int32"),
        ("width", 4, "int32"),
        ("data", 5, "bytes*"),
        ("shape", 7, "Shape"),
        ("double_data", 8, "bytes*"),
    ],
    "Layer": [("name", 1, "bytes"), ("type", 2, "bytes"), ("blobs", 7, "Blob*")],
    "OldLayer": [("name", 4, "bytes"), ("type", 5, "int32"), ("blobs", 6, "Blob*")],
    "Net": [("layers", 2, "OldLayer*"), ("layer", 100, "Layer*")],
}
_CONVOLUTIONS = (b"Convolution", b"Deconvolution", 4, 39)
_LEGACY_SIZES = ("num", "channels", "height", "width")


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of a ``.caffemodel``, of the present and of the previous form of layers.

    Args:
        path: local file.

    Returns:
        float32 arrays by ``layer/number``.

    Raises:
        ImportError: if protobuf is not installed.
        ValueError: if the file is damaged, too large for protobuf, or holds something else.
    """
    net = _parse(path)
    arrays: dict[str, np.ndarray] = {}
    try:
        for layer in (*net.layers, *net.layer):
            name = layer.name.decode()
            for number, blob in enumerate(layer.blobs):
                key = f"{name}/{number}"
                if key in arrays:
                    raise ValueError(f"there are two layers {name!r}")
                arrays[key] = _blob(blob, number, layer.type in _CONVOLUTIONS, key)
        if not arrays:
            raise ValueError("it has no layer with weights")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a model of Caffe: {error}.") from error
    return arrays


def _parse(path: str | os.PathLike[str]) -> Any:
    """Return the file's message."""
    try:
        from google.protobuf import __version__, message_factory
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError(f"reading {path} needs protobuf: {_EXTRA}.") from error
    if not hasattr(message_factory, "GetMessageClass"):
        raise ImportError(
            f"reading {path} needs protobuf 4.22 or later, and {__version__} is installed: "
            f"{_EXTRA}."
        )
    size = Path(path).stat().st_size
    if size > _LARGEST_MESSAGE:
        raise ValueError(
            f"{path} has {size} bytes, and protobuf reads {_LARGEST_MESSAGE} at most: write the "
            "net with Caffe's save_to_hdf5 and convert that file."
        )
    net = _messages()["Net"]()
    try:
        net.ParseFromString(Path(path).read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{path} is no binary protobuf of Caffe, or damaged; a .prototxt, which is text, holds "
            "no weights."
        ) from error
    return net


@cache
def _messages() -> dict[str, Any]:
    """Return the classes of the messages in ``_FIELDS`` by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    types = {"int32": kinds.TYPE_INT32, "int64": kinds.TYPE_INT64, "bytes": kinds.TYPE_BYTES}
    package = "instseg_ext.caffe"
    file = descriptor_pb2.FileDescriptorProto(name="caffe", package=package, syntax="proto2")
    for message, fields in _FIELDS.items():
        description = file.message_type.add(name=message)
        for name, number, kind in fields:
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            field = description.field.add(name=name, number=number, label=label)
            kind = kind.removesuffix("*")
            if kind in types:
                field.type = types[kind]
            else:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{package}.{kind}"
    # A pool of its own: another package may have registered Caffe's messages in the common one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _FIELDS
    }


def _blob(blob: Any, number: int, convolution: bool, what: str) -> np.ndarray:
    """Return one array of a layer.

    Raises:
        ValueError: if it has not as many values as its shape says.
    """
    double = bool(blob.double_data)
    packed = b"".join(blob.double_data if double else blob.data)
    shape = _shape(blob, number, convolution)
    width = 8 if double else 4
    # First of all the number of sizes: the product of thousands would take seconds.
    sound = len(shape) <= _MOST_DIMENSIONS and min(shape, default=1) >= 0
    if not sound or math.prod(shape) * width != len(packed):
        raise ValueError(
            f"{what} has {len(packed)} bytes of values, which do not make up its shape "
            f"{list(shape[:_MOST_DIMENSIONS])}"
        )
    values = np.frombuffer(packed, "<f8" if double else "<f4")
    # Bytes cannot be written to, and tensors may be.
    return values.astype(np.float32).reshape(shape)


def _shape(blob: Any, number: int, convolution: bool) -> tuple[int, ...]:
    """Return the shape of an array; the previous form had four sizes for everything.

    In it, weights of fully connected layers were (1, 1, out, in) and biases (1, 1, 1, out).
    """
    if not any(blob.HasField(name) for name in _LEGACY_SIZES):
        return tuple(blob.shape.dim)
    sizes = tuple(getattr(blob, name) for name in _LEGACY_SIZES)
    if convolution and number == 0:
        return sizes
    ones = 2 if number == 0 else 3
    return sizes[ones:] if sizes[:ones] == (1,) * ones else sizes
