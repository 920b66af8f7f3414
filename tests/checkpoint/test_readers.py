"""Safe reading: every format, both numpy generations, and refusal of code."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from instseg_ext.checkpoint import fetch_weights, read_metadata, read_weights
from instseg_ext.checkpoint.pickles import load_restricted

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asfortranarray(np.eye(3)),
    "c": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float16),
}


class Malicious:
    """Pickles to a call that creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[key]), value)


class TestRestrictedPickle:
    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
    def test_reads_arrays_of_both_numpy_generations(self, protocol, core):
        content = {
            "model": OrderedDict(ARRAYS),
            "__author__": "someone",
            "more": [1, 2.5, True, None, "text", (3,), np.float64(1.5)],
        }
        data = pickle.dumps(content, protocol=protocol)
        other = "numpy.core" if core == "numpy._core" else "numpy._core"
        data = _rename(data, other, core)
        got = load_restricted(io.BytesIO(data))
        assert_same(got["model"], ARRAYS)
        assert got["more"] == content["more"]

    def test_reads_strings_of_python_2_as_latin1(self):
        # {'caf\xe9': 'x'} as Python 2 writes it: SHORT_BINSTRING.
        assert load_restricted(io.BytesIO(b"}U\x04caf\xe9U\x01xs.")) == {"caf\xe9": "x"}

    @pytest.mark.parametrize("protocol", range(6))
    def test_refuses_code_and_does_not_run_it(self, tmp_path, protocol):
        target = tmp_path / "created"
        data = pickle.dumps({"model": ARRAYS, "x": Malicious(target)}, protocol=protocol)
        with pytest.raises(pickle.UnpicklingError, match="refers to"):
            load_restricted(io.BytesIO(data))
        assert not target.exists()
        pickle.loads(data)  # the attack works elsewhere
        assert target.exists()

    @pytest.mark.parametrize(
        "statement",
        [
            b"cbuiltins\neval\n(V1\ntR.",
            b"c__builtin__\neval\n(V1\ntR.",
            b"cnumpy\nload\n(Vx\ntR.",
            b"cnumpy.core.multiarray\nfromfile\n(Vx\ntR.",
            b"ccollections\nnamedtuple\n(Vx\ntR.",
            b"ccodecs\nencode\n(Vx\nVrot13\ntR.",
            b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
            b"(Vx\nios\nsystem\n.",
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
            b"\x80\x02\x82\x01.",
            b"Pid\n.",
        ],
    )
    def test_refuses_other_globals(self, statement):
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            load_restricted(io.BytesIO(statement))

    def test_refuses_dotted_names(self):
        # A dotted name walks attributes of an allowed module in protocol 4.
        data = b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93."
        with pytest.raises(pickle.UnpicklingError, match=r"numpy.ndarray.dump"):
            load_restricted(io.BytesIO(data))

    def test_refuses_arrays_of_objects(self):
        data = pickle.dumps(np.array([{}], dtype=object))
        with pytest.raises(pickle.UnpicklingError, match="Python objects"):
            load_restricted(io.BytesIO(data))


def _rename(data, old, new):
    """Exchange a module name in a pickle, with its length where the opcode has one."""
    for suffix in (".multiarray", ".numeric"):
        a, b = (old + suffix).encode(), (new + suffix).encode()
        data = data.replace(b"\x8c" + bytes([len(a)]) + a, b"\x8c" + bytes([len(b)]) + b)
        data = data.replace(b"c" + a + b"\n", b"c" + b + b"\n")
    # Frames of protocol 4 carry the length of what follows; drop them.
    position = data.find(b"\x95")
    while position >= 0 and data[:1] == b"\x80" and data[1] >= 4:
        data = data[:position] + data[position + 9 :]
        position = data.find(b"\x95")
    return data


class TestReadWeights:
    @pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state"])
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".pyth", ".bin"])
    def test_torch_files_and_their_wrappers(self, tmp_path, wrapper, suffix):
        weights = {"a": torch.arange(3.0), "b": torch.ones(1, dtype=torch.int64)}
        path = tmp_path / f"x{suffix}"
        torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, path)
        got = read_weights(str(path))
        assert_same(got["model"], weights)
        assert got.get("matching_heuristics", False) == (wrapper == "model_state")

    def test_numpy_arrays_in_torch_files(self, tmp_path):
        path = tmp_path / "x.pth"
        torch.save({"model": ARRAYS, "best": np.float64(3)}, path)
        got = read_weights(str(path))
        assert_same(got["model"], ARRAYS)
        assert got["best"] == 3

    def test_old_torch_format(self, tmp_path):
        path = tmp_path / "x.pth"
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        assert_same(read_weights(str(path))["model"], {"a": np.ones(2)})
        assert read_metadata(str(path)) == {}

    def test_detectron2_pickle(self, tmp_path):
        path = tmp_path / "x.pkl"
        content = {"model": ARRAYS, "__author__": "zoo", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
        got = read_weights(str(path))
        assert_same(got["model"], ARRAYS)
        assert got["__author__"] == "zoo"
        assert got["matching_heuristics"] is True

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_caffe2_pickle(self, tmp_path, wrapped):
        path = tmp_path / "x.pkl"
        blobs = {**ARRAYS, "a_momentum": np.ones(2)}
        path.write_bytes(pickle.dumps({"blobs": blobs} if wrapped else blobs, protocol=2))
        got = read_weights(str(path))
        assert_same(got["model"], ARRAYS)
        assert got["__author__"] == "Caffe2"
        assert got["matching_heuristics"] is True

    def test_safetensors(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        path = tmp_path / "x.safetensors"
        safetensors.save_file({"a": torch.arange(3.0)}, path)
        assert_same(read_weights(str(path))["model"], {"a": np.arange(3.0)})
        path.write_bytes(b"rubbish")
        with pytest.raises(ValueError, match="not a safetensors file"):
            read_weights(str(path))

    @pytest.mark.parametrize("suffix", [".pth", ".pkl"])
    def test_refuses_code_unless_unsafe(self, tmp_path, suffix):
        target = tmp_path / "created"
        path = tmp_path / f"x{suffix}"
        content = {"model": {"a": torch.ones(1).numpy()}, "x": Malicious(target)}
        if suffix == ".pth":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps({**content, "__author__": "x"}))
        with pytest.raises(ValueError, match=r"more than weights .*mkdir.*--unsafe"):
            read_weights(str(path))
        assert not target.exists()
        assert "a" in read_weights(str(path), unsafe=True)["model"]
        assert target.exists()

    @pytest.mark.parametrize("suffix", [".pth", ".pkl"])
    @pytest.mark.parametrize("size", [0, 1, 100])
    def test_damaged_files(self, tmp_path, suffix, size):
        path = tmp_path / f"x{suffix}"
        if suffix == ".pth":
            torch.save({"a": torch.ones(1000)}, path)
        else:
            path.write_bytes(pickle.dumps({"a": np.ones(1000)}))
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="damaged"):
            read_weights(str(path))

    def test_not_weights(self, tmp_path):
        path = tmp_path / "x.pth"
        torch.save({"epoch": 3}, path)
        with pytest.raises(ValueError, match="its entry 'epoch' is a int"):
            read_weights(str(path))
        torch.save([1, 2], path)
        with pytest.raises(ValueError, match="holds a list"):
            read_weights(str(path))

    def test_unknown_suffix_and_missing_file(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(b"")
        with pytest.raises(ValueError, match="unknown suffix"):
            read_weights(str(tmp_path / "x.zip"))
        with pytest.raises(FileNotFoundError, match=r"y.pth do not exist"):
            read_weights(str(tmp_path / "y.pth"))


class TestFetch:
    def test_local_file(self, tmp_path):
        path = tmp_path / "x.pth"
        path.write_bytes(b"")
        assert fetch_weights(str(path)) == str(path)

    def test_missing_file_names_the_key(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"x.pth do not exist: correct MODEL.WEIGHTS"):
            fetch_weights(str(tmp_path / "x.pth"))

    def test_unreachable_address(self):
        # Port 9 of the own machine: refused at once, no network needed.
        with pytest.raises(FileNotFoundError, match="cannot be fetched"):
            fetch_weights("http://127.0.0.1:9/x.pth?matching_heuristics=True")
