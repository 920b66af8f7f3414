"""Coordinate channels: order, range, orientation."""

import torch
import torch.nn.functional as F

from instseg_ext.layers.coord import append_coords, coord_channels


def test_values_and_order():
    coords = coord_channels((3, 5))
    assert coords.shape == (1, 2, 3, 5)
    assert coords[0, 0, 1].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert coords[0, 1, :, 2].tolist() == [-1, 0, 1]
    assert (coords[0, 0] == coords[0, 0, :1]).all()  # x is constant down the columns
    assert (coords[0, 1] == coords[0, 1, :, :1]).all()  # y is constant along the rows


def test_append_comes_after_features_and_keeps_dtype():
    features = torch.rand(2, 256, 4, 5, dtype=torch.bfloat16)
    out = append_coords(features)
    assert out.shape == (2, 258, 4, 5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:, :256], features)
    assert out[1, 256, 3].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert out[1, 257, :, 0].tolist()[0] == -1


def test_single_pixel():
    assert coord_channels((1, 1)).flatten().tolist() == [-1, -1]


def test_source_size_equals_append_then_resize():
    features = torch.rand(1, 3, 9, 14)
    expected = F.interpolate(append_coords(features), size=(6, 6), mode="bilinear")
    small = F.interpolate(features, size=(6, 6), mode="bilinear")
    torch.testing.assert_close(append_coords(small, (9, 14)), expected)


def test_memory_format_is_kept():
    features = torch.rand(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert append_coords(features).is_contiguous(memory_format=torch.channels_last)
    assert append_coords(features.contiguous()).is_contiguous()
