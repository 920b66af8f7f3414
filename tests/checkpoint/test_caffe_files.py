"""Caffe's files, HDF5 and protobuf: what is read, and what is refused before it does harm."""

from __future__ import annotations

import sys
import time

import google.protobuf
import h5py
import numpy as np
import pytest
from checkpoint.caffe_writer import (
    CONVOLUTION,
    INNER_PRODUCT,
    RELU,
    messages,
    write_caffemodel,
    write_hdf5,
)
from google.protobuf import message_factory

from instseg_ext.checkpoint import caffe_files, read_weights

RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


CONV, CONV_BIAS, FC, FC_BIAS = numbers(4, 3, 3, 3), numbers(4), numbers(5, 16), numbers(5)
WANTED = {"conv1_1/0": CONV, "conv1_1/1": CONV_BIAS, "fc6/0": FC, "fc6/1": FC_BIAS}
NEW = {
    "conv1_1": ("Convolution", [CONV, CONV_BIAS]),
    "relu1_1": ("ReLU", []),
    "fc6": ("InnerProduct", [FC, FC_BIAS]),
}
OLD = {
    "conv1_1": (CONVOLUTION, [CONV, CONV_BIAS]),
    "relu1_1": (RELU, []),
    "fc6": (INNER_PRODUCT, [FC, FC_BIAS]),
}


def assert_same(got, wanted):
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, strict=True)
        assert got[name].flags.writeable


# --- protobuf ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (NEW, {}),
        (NEW, {"double": True}),
        (NEW, {"legacy": True}),  # layers brought up to date, sizes not
        (OLD, {"old": True}),
        (OLD, {"old": True, "legacy": False}),
    ],
)
def test_every_form_of_a_caffemodel_gives_the_same_arrays(tmp_path, layers, options):
    write_caffemodel(tmp_path / "net.caffemodel", layers, **options)
    assert_same(read_weights(str(tmp_path / "net.caffemodel"))["model"], WANTED)


def test_sizes_of_one_are_kept_where_they_mean_something(tmp_path):
    one_filter, one_output = numbers(1, 1, 3, 3), numbers(1, 7)
    layers = {"conv": (CONVOLUTION, [one_filter]), "fc": (INNER_PRODUCT, [one_output])}
    write_caffemodel(tmp_path / "net.caffemodel", layers, old=True)
    got = read_weights(str(tmp_path / "net.caffemodel"))["model"]
    assert_same(got, {"conv/0": one_filter, "fc/0": one_output})


@pytest.mark.parametrize(
    "shape", [[2**40, 2**20], [-1, -2], [1] * 32 + [2], [2**62] * 25_000], ids=len
)
def test_a_shape_that_the_values_do_not_fill_is_refused(tmp_path, shape):
    """At once: the product of 25,000 numbers alone would take seconds."""
    net = messages()["NetParameter"]()
    blob = net.layer.add(name="fc6", type="InnerProduct").blobs.add()
    blob.shape.dim.extend(shape)
    blob.data.extend([1.0, 2.0])
    path = tmp_path / "net.caffemodel"
    path.write_bytes(net.SerializeToString())
    start = time.process_time()
    with pytest.raises(ValueError, match=r"net\.caffemodel .* fc6/0 has 8 bytes of values"):
        read_weights(str(path))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it has no layer with weights"),
        (b'name: "VGG16"\nlayer {\n}\n', "no binary protobuf of Caffe, or damaged; a .prototxt"),
    ],
)
def test_what_is_no_caffemodel_is_refused(tmp_path, content, told):
    (tmp_path / "net.caffemodel").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_weights(str(tmp_path / "net.caffemodel"))


def test_a_truncated_caffemodel_is_refused(tmp_path):
    path = tmp_path / "net.caffemodel"
    write_caffemodel(path, NEW)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"net\.caffemodel is no binary protobuf of Caffe"):
        read_weights(str(path))


def test_two_layers_of_one_name_are_refused(tmp_path):
    net = messages()["NetParameter"]()
    for _ in range(2):
        blob = net.layer.add(name="fc6").blobs.add()
        blob.shape.dim.append(1)
        blob.data.append(1.0)
    (tmp_path / "net.caffemodel").write_bytes(net.SerializeToString())
    with pytest.raises(ValueError, match="two layers 'fc6'"):
        read_weights(str(tmp_path / "net.caffemodel"))


def test_what_protobuf_cannot_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_caffemodel(tmp_path / "net.caffemodel", NEW)
    monkeypatch.setattr(caffe_files, "_LARGEST_MESSAGE", 100)
    with pytest.raises(ValueError, match=r"protobuf reads 100 at most: .*save_to_hdf5"):
        read_weights(str(tmp_path / "net.caffemodel"))


# --- HDF5 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnc_model.caffemodel.h5", "net.hdf5", "net.caffemodel"])
def test_hdf5_is_known_by_its_first_bytes(tmp_path, name):
    layers = {"conv1_1": [CONV, CONV_BIAS], "data": [], "fc6": [FC, FC_BIAS], "fc6_ext": []}
    write_hdf5(tmp_path / name, layers, diff=True)
    assert_same(read_weights(str(tmp_path / name))["model"], WANTED)


def test_values_of_other_widths_become_float32(tmp_path):
    write_hdf5(tmp_path / "net.h5", {"fc6": [FC.astype("f8"), FC_BIAS.astype(">f4"), [1, 2]]})
    got = read_weights(str(tmp_path / "net.h5"))["model"]
    wanted = {"fc6/0": FC, "fc6/1": FC_BIAS, "fc6/2": np.array([1, 2], np.float32)}
    assert_same(got, wanted)


def test_a_truncated_hdf5_is_refused(tmp_path):
    path = tmp_path / "net.h5"
    write_hdf5(path, {"fc6": [numbers(100, 100)]})
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"net\.h5 cannot be read as HDF5 of Caffe: .*truncated"):
        read_weights(str(path))


def test_damage_anywhere_is_one_clear_error(tmp_path):
    """Bytes all over the file; changed values pass, since nothing in it tells of them."""
    path = tmp_path / "net.h5"
    write_hdf5(path, {"fc6": [FC]})
    whole, told = path.read_bytes(), []
    for place in range(0, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_weights(str(path))
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 5
    assert all(str(path) in text for text in told)


def _no_data(file):
    file["model_weights"] = FC


def _a_link_to_another_file(file):
    file.create_group("data")["fc6"] = h5py.ExternalLink("other.h5", "/data/fc6")


def _a_link(file):
    file.create_group("data/fc6")["0"] = h5py.SoftLink("/somewhere")


def _text(file):
    file.create_group("data/fc6")["0"] = "text"


def _a_group(file):
    file.create_group("data/fc6/0")


def _a_type(file):
    file.create_group("data/fc6")["0"] = np.dtype("f4")


def _values_of_another_file(file):
    group = file.create_group("data/fc6")
    group.create_dataset("0", (4,), "f4", external=[("values.bin", 0, 16)])


def _huge(file):
    file.create_group("data/fc6").create_dataset("0", (2**40,), "f4", chunks=(1024,))


def _many_names_of_one_array(file):
    group = file.create_group("data/fc6")
    group["0"] = np.zeros(2000, np.float32)
    for number in range(1, 4):
        group[str(number)] = group["0"]


def _many_names_of_one_layer(file):
    layer = file.create_group("data/fc0")
    for number in range(20):
        layer[str(number)] = np.zeros(0, np.float32)
    for number in range(1, 20):
        file[f"data/fc{number}"] = layer


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_no_data, "it has no group /data"),
        (_a_link_to_another_file, "/data/fc6 is a link"),
        (_a_link, "/data/fc6/0 is a link"),
        (_text, "/data/fc6/0 is no array of numbers"),
        (_a_group, "/data/fc6/0 is no array of numbers"),
        (_a_type, "/data/fc6/0 is no array of numbers"),
        (_values_of_another_file, "/data/fc6/0 lies in another file"),
        (_huge, f"/data/fc6/0 would take {2**42} bytes of memory but takes 0 in the file"),
        (_many_names_of_one_array, r"up to /data/fc6/\d its arrays take \d+ bytes"),
        (_many_names_of_one_layer, r"up to /data/fc\d+/\d+ its arrays take"),
    ],
)
def test_what_caffe_does_not_write_is_refused(tmp_path, make, told):
    with h5py.File(tmp_path / "net.h5", "w") as file:
        make(file)
    with pytest.raises(ValueError, match=f"net.h5 cannot be read as HDF5 of Caffe: {told}"):
        read_weights(str(tmp_path / "net.h5"))


def test_a_page_in_place_of_a_download_is_named(tmp_path):
    (tmp_path / "net.h5").write_text("<html>")
    with pytest.raises(ValueError, match=r"net\.h5 is no HDF5: .* not completely downloaded"):
        read_weights(str(tmp_path / "net.h5"))


@pytest.mark.parametrize(
    ("package", "name"), [("h5py", "net.h5"), ("google.protobuf.message", "net.caffemodel")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, name):
    write_hdf5(tmp_path / "net.h5", {})
    write_caffemodel(tmp_path / "net.caffemodel", NEW)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"instseg_ext\[caffe\]"):
        read_weights(str(tmp_path / name))


def test_a_release_of_protobuf_that_is_too_old_is_told(tmp_path, monkeypatch):
    write_caffemodel(tmp_path / "net.caffemodel", NEW)
    monkeypatch.delattr(message_factory, "GetMessageClass")
    monkeypatch.setattr(google.protobuf, "__version__", "3.20.3")
    told = r"protobuf 4\.22 or later, and 3\.20\.3 is installed: .*instseg_ext\[caffe\]"
    with pytest.raises(ImportError, match=told):
        read_weights(str(tmp_path / "net.caffemodel"))
