"""MXNet's parameter files: every version, and what is refused before anything is allocated."""

from __future__ import annotations

import base64
import struct

import numpy as np
import pytest
import torch
from checkpoint.mxnet_writer import MAGIC, array_bytes, file_bytes, shape_bytes, write_params

from instseg_ext.checkpoint import read_weights

RNG = np.random.default_rng(0)
ARRAYS = {
    "arg:conv1_weight": RNG.standard_normal((2, 3, 1, 1)).astype(np.float32),
    "aux:bn_moving_var": RNG.standard_normal(5),
    "arg:half": RNG.standard_normal((2, 2)).astype(np.float16),
    "arg:count": np.arange(3, dtype=np.int64),
    "arg:byte": np.arange(4, dtype=np.uint8).reshape(2, 2),
}
ONE = array_bytes(np.ones((2, 3), np.float32))
# Written by MXNet 1.9.1: {"arg:w": [[0, 1, 2], [3, 4, 5]] float32, "aux:s": [0, 1, 2] float16}.
GENUINE = base64.b64decode(
    "EgEAAAAAAAAAAAAAAAAAAAIAAAAAAAAAyfqT+QAAAAACAAAAAgAAAAAAAAADAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAA"
    "AIA/AAAAQAAAQEAAAIBAAACgQMn6k/kAAAAAAQAAAAMAAAAAAAAAAQAAAAAAAAACAAAAAAAAPABAAgAAAAAAAAAFAAAA"
    "AAAAAGFyZzp3BQAAAAAAAABhdXg6cw=="
)
# Written by MXNet 1.9.1 with NumPy's semantics: a float32 number, and a float64 array of (0, 3).
GENUINE_NUMPY = base64.b64decode(
    "EgEAAAAAAAAAAAAAAAAAAAIAAAAAAAAAyvqT+QAAAAAAAAAAAQAAAAAAAAAAAAAAAABAQMr6k/kAAAAAAgAAAAAAAAAA"
    "AAAAAwAAAAAAAAABAAAAAAAAAAEAAAACAAAAAAAAAAUAAAAAAAAAYXJnOnoFAAAAAAAAAGFyZzpl"
)


def read(tmp_path, content):
    (tmp_path / "net-0000.params").write_bytes(content)
    return read_weights(str(tmp_path / "net-0000.params"))["model"]


def assert_same(got, wanted):
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, strict=True)
        torch.from_numpy(got[name]).add_(1)  # writable, aligned


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version(tmp_path, version):
    write_params(tmp_path / "net-0000.params", ARRAYS, version)
    assert_same(read_weights(str(tmp_path / "net-0000.params"))["model"], ARRAYS)


def test_files_of_mxnet_itself(tmp_path):
    wanted = {
        "arg:w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "aux:s": np.arange(3, dtype=np.float16),
    }
    assert_same(read(tmp_path, GENUINE), wanted)
    arrays = list(wanted.values())
    assert file_bytes([array_bytes(a) for a in arrays], list(wanted)) == GENUINE
    wanted = {"arg:z": np.array(3, np.float32), "arg:e": np.zeros((0, 3))}
    assert_same(read(tmp_path, GENUINE_NUMPY), wanted)


def test_the_content_decides_and_not_the_name(tmp_path):
    write_params(tmp_path / "net.pth", ARRAYS)
    assert_same(read_weights(str(tmp_path / "net.pth"))["model"], ARRAYS)


def test_a_file_that_ends_anywhere_is_refused(tmp_path):
    whole = file_bytes([array_bytes(a) for a in ARRAYS.values()], list(ARRAYS))
    for end in range(8, len(whole), 3):
        with pytest.raises(ValueError, match=r"net-0000\.params cannot be read .* it ends early"):
            read(tmp_path, whole[:end])
    with pytest.raises(ValueError, match=r"net-0000\.params is no file of MXNet"):
        read(tmp_path, whole[:7])


def test_damage_anywhere_is_one_clear_error(tmp_path):
    whole = file_bytes([ONE, ONE], ["arg:a", "aux:b"])
    told = []
    for place in range(8, len(whole)):
        content = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        try:
            read(tmp_path, content)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 50
    assert all("net-0000.params cannot be read as a file of MXNet" in text for text in told)


HUGE = array_bytes(np.ones(1, np.float32), shape=(2**31, 2**31, 2**31))
NEVER_FILLED = struct.pack("<Ii", MAGIC[2], 0) + shape_bytes((), 2)
UNKNOWN_SHAPE = struct.pack("<Iii", MAGIC[3], 0, -1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (file_bytes([HUGE], ["arg:a"]), f"array 0, .* would take {2**95} bytes and"),
        (struct.pack("<QQQ", 0x112, 0, 2**60), f"{2**60} arrays would take"),
        (file_bytes([array_bytes([1.0], storage=2)], ["arg:a"]), r"array 0 is sparse \(CSR\)"),
        (file_bytes([ONE, array_bytes([1.0], storage=1)], ["a", "b"]), "array 1 is row-sparse"),
        (file_bytes([array_bytes([1.0], storage=7)], ["a"]), "unknown storage type 7"),
        (file_bytes([array_bytes([1.0], code=12)], ["a"]), "array 0 has values of the unknown"),
        (file_bytes([struct.pack("<I", 0xF993FACB)], ["a"]), "unknown version .* 0xf993facb"),
        (file_bytes([NEVER_FILLED], ["arg:a"]), "'arg:a' is an array without values"),
        (file_bytes([UNKNOWN_SHAPE], ["arg:a"]), "'arg:a' is an array without values"),
        (file_bytes([ONE], []), "it has 1 arrays and 0 names: weights have names"),
        (file_bytes([ONE, ONE], ["arg:a", "arg:a"]), "two arrays named 'arg:a'"),
        (file_bytes([ONE], ["a"])[:-1] + b"\xff", "codec can't decode"),
    ],
)
def test_what_is_refused(tmp_path, content, told):
    with pytest.raises(ValueError, match=f"net-0000.params cannot be read .*{told}"):
        read(tmp_path, content)


def test_a_page_in_place_of_a_download_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"net-0000\.params is no file of MXNet: .*downloaded"):
        read(tmp_path, b"<html>404 not found</html>")
