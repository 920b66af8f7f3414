"""Lua Torch's files: everything a net consists of, nothing executed, nothing taken on trust."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from checkpoint.torch7_writer import Function, Storage, Torch, View, file_bytes

from instseg_ext.checkpoint import read_weights
from instseg_ext.checkpoint.torch7_files import CLASS, LuaFunction, read_torch7, torch7_weights

FORMS = [{}, {"ascii": True}, {"cuda": True}, {"versions": False}]


@pytest.fixture
def read(tmp_path):
    def write_and_read(value, **options):
        path = tmp_path / "file.t7"
        path.write_bytes(value if isinstance(value, bytes) else file_bytes(value, **options))
        return read_torch7(path)

    return write_and_read


def linear(out, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, channels, generator=generator)
    fields = {"weight": weight, "bias": torch.arange(out).float(), "output": torch.empty(0)}
    return Torch("nn.Linear", {**fields, "_type": "torch.FloatTensor", "train": False})


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_net_comes_back(read, options):
    net = Torch("nn.Sequential", {"modules": [linear(3, 2), Torch("nn.ReLU"), linear(2, 3, 1)]})
    content = read({"model": net, "epoch": 7, "note": "\xfc\n1 2", "none": None}, **options)
    model = content["model"]
    assert model[CLASS] == "nn.Sequential"
    assert list(model["modules"]) == [1, 2, 3]
    assert model["modules"][2] == {CLASS: "nn.ReLU"}
    first = model["modules"][1]
    assert (first[CLASS], first["_type"], first["train"]) == (
        "nn.Linear",
        "torch.FloatTensor",
        False,
    )
    assert torch.equal(first["weight"], linear(3, 2).fields["weight"])
    assert first["output"].shape == (0,)
    assert (content["epoch"], content["note"], content["none"]) == (7.0, "\xfc\n1 2", None)


@pytest.mark.parametrize("options", FORMS[:3], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
)
def test_every_type_of_elements(read, dtype, options):
    values = torch.tensor([[0, 1, 10], [13, 9, 32]], dtype=dtype)
    found = read(values, **options)
    assert found.dtype == dtype
    assert torch.equal(found, values)


def test_values_that_are_no_numbers_survive_as_text(read):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1 / 3])
    assert np.array_equal(read(values, ascii=True).numpy(), values.numpy(), equal_nan=True)


@pytest.mark.parametrize("options", FORMS[:2], ids=str)
def test_tensors_share_their_storage_and_objects_are_one(read, options):
    storage = Storage(torch.arange(12.0))
    whole, column = View(storage, (3, 4), (4, 1)), View(storage, (3,), (4,), offset=2)
    part = linear(2, 2)
    content = read({"whole": whole, "column": column, "first": part, "second": part}, **options)
    assert content["first"] is content["second"]
    assert content["column"].tolist() == [2, 6, 10]
    content["whole"][1, 2] = -1
    assert content["column"].tolist() == [2, -1, 10]


def test_storages_and_tables_with_other_keys(read):
    content = read({0: Storage(torch.arange(3)), 1.5: "x", True: "yes", "size": [2, 3]})
    assert content[0].tolist() == [0, 1, 2]
    assert (content[1.5], content["true"]) == ("x", "yes")
    assert content["size"] == {1: 2.0, 2: 3.0}


def test_an_object_may_contain_itself(read):
    net = Torch("nn.Sequential")
    net.fields["self"] = net
    content = read(net)
    assert content["self"] is content
    net.fields["weight"] = torch.ones(1)
    assert list(torch7_weights(read(net))) == ["weight"]


@pytest.mark.parametrize("kind", [6, 7, 8])
@pytest.mark.parametrize("options", FORMS[:2], ids=str)
def test_functions_are_passed_over(read, kind, options):
    """Also one that refers to itself, as recursive functions do."""
    shared = linear(2, 2)
    function = Function(b"os.execute('true')", [{"name": "net", "value": shared}], kind)
    if kind == 8:
        function.upvalues.append({"name": "self", "value": function})
    content = read({"f": function, "net": shared, "end": 3}, **options)
    assert content["f"] == LuaFunction(18)
    assert content["net"]["weight"].shape == (2, 2)
    assert content["end"] == 3


def test_weights_are_named_by_their_way(tmp_path):
    """Also under several names; integers and empty tensors are no weights."""
    part = linear(2, 2)
    net = Torch("nn.Net", {"modules": [part], "refs": {0: part}, "size": torch.arange(2)})
    path = tmp_path / "model.t7"
    path.write_bytes(file_bytes({"model": net, "config": {"iSz": 160}}))
    content = read_weights(str(path))
    assert list(content["model"]) == [
        "modules.1.weight",
        "modules.1.bias",
        "refs.0.weight",
        "refs.0.bias",
    ]
    assert content["config"] == {"iSz": 160.0}
    path.write_bytes(file_bytes(net))
    assert "refs.0.bias" in read_weights(str(path))["model"]
    path.write_bytes(file_bytes({"size": torch.arange(2)}))
    with pytest.raises(ValueError, match=r"model\.t7 holds no weights"):
        read_weights(str(path))


def integers(*values):
    return struct.pack(f"<{len(values)}i", *values)


STORAGE = integers(4, 1, 3) + b"V 1" + integers(18) + b"torch.FloatStorage"
TENSOR = integers(4, 1, 3) + b"V 1" + integers(17) + b"torch.FloatTensor"
VALUES = Storage(torch.arange(4.0))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"ends early or is damaged"),
        (b"no file of Torch", r"there is no type \d+ of objects"),
        (integers(2, 2**30), r"a string would take 1073741824 times 1 bytes, and 0 are left"),
        (integers(2, -1), r"a string would take -1"),
        (integers(3, 1, 2**30), r"a table would take 1073741824 times 4"),
        (STORAGE + struct.pack("<q", 2**60), r"torch\.FloatStorage would take"),
        (STORAGE + struct.pack("<q", -4), r"torch\.FloatStorage would take -4"),
        (TENSOR + integers(2**30), r"has 1073741824 dimensions"),
        (TENSOR + integers(-1), r"has -1 dimensions"),
        (b"".join(integers(3, n, 1) for n in range(1, 4000)), r"nested more than \d+ deep"),
        (b"".join(integers(3, n, 1, 1, 0, 0) for n in range(9)), r"no type|ends early"),
        (integers(6, 0) * 4000, r"nested more than \d+ deep"),
        (file_bytes({"f": Torch("tds.Hash", 3.0)}), r"class tds\.Hash is no table"),
        (file_bytes(Torch("torch.BlobTensor")), r"torch\.BlobTensor has elements of an unknown"),
        (file_bytes(View(VALUES, (2, 3), (3, 1))), r"\[2, 3\].* leaves its storage of 4"),
        (file_bytes(View(VALUES, (2,), (-1,), 3)), r"stride \[-1\] .* leaves its storage"),
        (file_bytes(View(VALUES, (2,), (1,), -1)), r"offset -1 leaves its storage"),
        (file_bytes(View(VALUES, (2**62, 2**62), (2**62, 2**62))), r"leaves its storage"),
        (file_bytes(View(None, (2,), (1,))), r"size \[2\] has no storage"),
        (file_bytes({1: 1})[:-4], r"ends early or is damaged"),
        (b"4\n1\n3\nV 1\n17\ntorch.FloatTensor\n1\n2 2\n", r"has 2 numbers in a line instead"),
        (b"1\nabc\n", r"could not convert"),
        (b"2\n99\nabc", r"a string would take 99"),
    ],
)
def test_damaged_and_malicious_files_are_refused(read, content, match):
    with pytest.raises(ValueError, match=r"file\.t7 cannot be read .*" + match):
        read(content)


def test_a_table_as_key_is_refused(read):
    nested = integers(3, 1, 1) + integers(3, 2, 0) + integers(0)
    with pytest.raises(ValueError, match="a key of the kind dict"):
        read(nested)


def test_nothing_is_allocated_that_the_file_does_not_hold(read):
    """A tensor may repeat its elements a billion times; that is a view and costs nothing."""
    repeated = file_bytes(View(VALUES, (2**15, 2**15), (0, 0)))
    tracemalloc.start()
    assert read(repeated).shape == (2**15, 2**15)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("bottom", ["tensor", "nothing"])
def test_names_that_multiply_without_end_are_refused(read, bottom):
    """Each table holds the next one twice: 2 to the power of 60 names for what is at the bottom."""
    value = torch.ones(1) if bottom == "tensor" else {}
    for _ in range(60):
        value = {"a": value, "b": value}
    with pytest.raises(ValueError, match=r"more than \d+ names"):
        torch7_weights(read(value))
