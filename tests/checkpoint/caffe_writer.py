"""Write files as Caffe does: with its own message types, and HDF5 as its nets are dumped."""

from __future__ import annotations

from functools import cache

import h5py
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A part of the public caffe.proto: name, number, type, "*" for repeated, "+" for packed.
PROTO = {
    "BlobShape": [("dim", 1, "int64+")],
    "BlobProto": [
        ("num", 1, "int32"), ("channels", 2, "int32"), ("height", 3, "int32"),
        ("width", 4, "int32"), ("data", 5, "float+"), ("diff", 6, "float+"),
        ("shape", 7, "BlobShape"), ("double_data", 8, "double+"),
    ],
    "LayerParameter": [
        ("name", 1, "string"), ("type", 2, "string"), ("bottom", 3, "string*"),
        ("top", 4, "string*"), ("blobs", 7, "BlobProto*"),
    ],
    "V1LayerParameter": [
        ("bottom", 2, "string*"), ("top", 3, "string*"), ("name", 4, "string"),
        ("type", 5, "int32"), ("blobs", 6, "BlobProto*"), ("blobs_lr", 7, "float*"),
    ],
    "NetParameter": [
        ("name", 1, "string"), ("layers", 2, "V1LayerParameter*"), ("input", 3, "string*"),
        ("layer", 100, "LayerParameter*"),
    ],
}  # fmt: skip
# Types of layers in the previous form.
CONVOLUTION, INNER_PRODUCT, RELU = 4, 14, 18


@cache
def messages():
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for message, fields in PROTO.items():
        description = file.message_type.add(name=message)
        for name, number, kind in fields:
            field = description.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL)
            if kind[-1] in "*+":
                field.label = kinds.LABEL_REPEATED
                field.options.packed = kind[-1] == "+"
                kind = kind[:-1]
            if kind in PROTO:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"caffe.{name}")) for name in PROTO}


def fill(blob, array, *, legacy=False, double=False):
    """Put an array into a blob, in the previous form with four sizes."""
    if legacy:
        sizes = (1,) * (4 - array.ndim) + array.shape
        blob.num, blob.channels, blob.height, blob.width = sizes
    else:
        blob.shape.dim.extend(array.shape)
    (blob.double_data if double else blob.data).extend(array.ravel().tolist())


def write_caffemodel(path, layers, *, old=False, legacy=None, double=False):
    """Write a net.

    Args:
        layers: {name: (type, [arrays])}; the type is a name, in the previous form a number.
        old: layers of the previous form.
        legacy: four sizes in place of shapes; None: as ``old``.
    """
    net = messages()["NetParameter"](name="net", input=["data"])
    for name, (kind, arrays) in layers.items():
        layer = (net.layers if old else net.layer).add(name=name, type=kind)
        layer.bottom.append("data")
        layer.top.append(name)
        for array in arrays:
            fill(
                layer.blobs.add(),
                array,
                legacy=old if legacy is None else legacy,
                double=double,
            )
    path.write_bytes(net.SerializeToString())


def write_hdf5(path, layers, diff=False):
    """Write {layer: [arrays]} as Caffe dumps a net; layers without arrays become empty groups."""
    with h5py.File(path, "w") as file:
        for part in ("data", "diff") if diff else ("data",):
            group = file.create_group(part)
            for layer, arrays in layers.items():
                members = group.create_group(layer)
                for number, array in enumerate(arrays):
                    members[str(number)] = np.asarray(array)
