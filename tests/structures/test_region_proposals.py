"""Regions as unions of superpixels against the masks they stand for."""

import sys

import numpy as np
import pytest
import torch
from scipy import io, ndimage
from structures.random_masks import HEIGHT, WIDTH, random_masks

from instseg_ext.structures.region_proposals import RegionProposals
from instseg_ext.structures.rle import decode_compressed_counts, encode_masks, rle_boxes
from instseg_ext.structures.superpixels import connected_parts

EIGHT = np.ones((3, 3), dtype=bool)


def parts_by_label(*maps):
    """Connected parts of equal pixels by scipy's labelling, one value after the other."""
    joint = np.unique(np.stack([m.ravel() for m in maps], axis=1), axis=0, return_inverse=True)[1]
    joint = joint.reshape(maps[0].shape)
    parts = np.zeros(joint.shape, dtype=int)
    for value in np.unique(joint):
        labels, _ = ndimage.label(joint == value, EIGHT)
        parts[labels > 0] = labels[labels > 0] + parts.max()
    return parts - 1


def numbered_as_met(parts):
    """Number the parts in the order in which reading line by line meets them."""
    values, first = np.unique(parts, return_index=True)
    rank = {value: rank for rank, value in enumerate(values[first.argsort()])}
    return np.vectorize(rank.get)(parts), np.sort(first)


def pixel_iou(a, b):
    a, b = a.reshape(len(a), -1).astype(float), b.reshape(len(b), -1).astype(float)
    common = a @ b.T
    return common / np.maximum(a.sum(1)[:, None] + b.sum(1) - common, 1)


def regions(num=24, seed=0):
    masks = random_masks(num, seed)
    return masks, RegionProposals.from_masks(masks, torch.rand(num))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (23, 31)])
@pytest.mark.parametrize("seed", range(3))
def test_connected_parts_equal_labelling(size, seed):
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, 2, size), rng.integers(0, 2, size)]
    parts, first = connected_parts(*maps)
    expected, expected_first = numbered_as_met(parts_by_label(*maps))
    assert parts.dtype == np.int32
    np.testing.assert_array_equal(parts, expected)
    np.testing.assert_array_equal(first, expected_first)


def test_acceptance_check_8_masks_come_back_exactly():
    """Six masks: at most 64 kinds of membership before the split into connected parts."""
    for seed in range(5):
        masks, found = regions(6, seed)
        np.testing.assert_array_equal(found.masks().numpy(), masks)
        assert len(np.unique(found.members.numpy(), axis=0)) <= 64
        expected, _ = numbered_as_met(parts_by_label(*masks.astype(int)).T)
        np.testing.assert_array_equal(found.superpixels.numpy().T, expected)


def test_acceptance_check_8_iou_is_that_of_pixels():
    rng = np.random.default_rng(3)
    for seed in range(3):
        masks, found = regions(40, seed)
        objects = random_masks(7, seed + 50)
        np.testing.assert_allclose(found.iou(objects).numpy(), pixel_iou(masks, objects), 1e-6)
        partition = rng.integers(0, 9, (HEIGHT, WIDTH))
        members = rng.random((9, 30)) > 0.6
        own = RegionProposals(
            torch.from_numpy(partition.astype(np.int32)), torch.from_numpy(members), torch.ones(30)
        )
        masks = members.T[:, partition]
        np.testing.assert_allclose(own.iou(objects).numpy(), pixel_iou(masks, objects), 1e-6)
        np.testing.assert_array_equal(own.areas().numpy(), masks.sum((1, 2)))
        np.testing.assert_array_equal(own.boxes.numpy(), rle_boxes(encode_masks(masks)))


def test_run_lengths_arrays_and_tensors_give_the_same():
    masks, found = regions()
    for other in (encode_masks(masks), torch.from_numpy(masks)):
        again = RegionProposals.from_masks(other, found.scores)
        assert torch.equal(again.superpixels, found.superpixels)
        assert torch.equal(again.members, found.members)
    assert found.rles() == encode_masks(masks)
    assert torch.equal(found.iou(encode_masks(masks)), found.iou(masks))


def test_run_lengths_of_every_form_are_read():
    masks, found = regions()
    compressed = encode_masks(masks)
    as_bytes = [{**rle, "counts": rle["counts"].encode()} for rle in compressed]
    listed = [
        {**rle, "counts": decode_compressed_counts(rle["counts"]).tolist()} for rle in compressed
    ]
    # runs of no pixels do not matter
    longer = [
        {**rle, "counts": [0, 0, *rle["counts"][:1], 0, 0, *rle["counts"][1:]]} for rle in listed
    ]
    for other in (as_bytes, listed, longer):
        again = RegionProposals.from_masks(other)
        assert torch.equal(again.superpixels, found.superpixels)
        assert torch.equal(again.members, found.members)


@pytest.mark.parametrize("counts", ["", "!", "09", [3], [-1, 7], [4, 4]])
def test_damaged_run_lengths_are_refused(counts):
    with pytest.raises(ValueError, match=r"size \(2, 3\) is damaged"):
        RegionProposals.from_masks([{"size": [2, 3], "counts": counts}])


def test_counts_are_exact_in_pieces_and_under_autocast(monkeypatch):
    masks, found = regions()
    monkeypatch.setattr("instseg_ext.structures.region_proposals._FLOATS", 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(found.areas().numpy(), masks.sum((1, 2)))
        np.testing.assert_array_equal(
            found.intersections(masks).numpy(),
            (masks[:, None] & masks[None]).sum((2, 3)),
        )


def test_choosing_regions():
    masks, found = regions()
    for rows in ([3, 1], torch.tensor([3, 1]), slice(2, 5), torch.arange(len(found)) % 2 == 0, []):
        before = found[rows]
        np.testing.assert_array_equal(before.masks().numpy(), masks[rows])
        assert before.rles() == encode_masks(masks[rows])
        assert torch.equal(before.boxes, found.boxes[rows])
        assert torch.equal(found[rows].boxes, before.boxes)  # now from those of all
        assert torch.equal(before.scores, found.scores[rows])
        assert torch.equal(found.masks(rows), before.masks())


def test_an_empty_mask_is_an_empty_region():
    masks = np.zeros((2, 5, 6), dtype=bool)
    masks[1, 2:4, 1:3] = True
    found = RegionProposals.from_masks(masks)
    assert found.boxes.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert found.areas().tolist() == [0, 4]
    assert found.iou(masks).tolist() == [[0, 0], [0, 1]]
    assert found.rles() == encode_masks(masks)


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (1, 1), (5, 6)])
def test_no_regions(size):
    none = RegionProposals.from_masks([], size_hw=size)
    assert len(none) == 0
    assert none.image_size == size
    assert none.boxes.shape == (0, 4)
    assert none.masks().shape == (0, *size)
    assert none.rles() == []
    assert none.areas().shape == (0,)
    assert none.iou(np.ones((2, *size), dtype=bool)).shape == (0, 2)


def test_superpixels_are_cut_along_objects():
    masks, found = regions()
    objects = random_masks(4, 77)
    cut = found.intersect(objects)
    assert len(cut) == 4 + len(found)
    np.testing.assert_array_equal(cut.masks().numpy(), np.concatenate([objects, masks]))
    expected = parts_by_label(found.superpixels.numpy(), *objects.astype(int))
    np.testing.assert_array_equal(cut.superpixels.numpy(), numbered_as_met(expected)[0])
    assert cut.scores[:4].isinf().all()
    assert torch.equal(cut.scores[4:], found.scores)
    counts = cut.superpixel_counts(objects)
    sizes = cut.superpixel_sizes()
    assert ((counts == 0) | (counts == sizes)).all()


def test_without_objects_nothing_changes():
    _, found = regions()
    same = found.intersect([])
    assert same.num_superpixels == found.num_superpixels
    assert torch.equal(same.masks(), found.masks())


def test_merging_keeps_every_region():
    _, found = regions(3)
    fine = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    members = found.masks().numpy().reshape(3, -1).T
    merged = RegionProposals.merged(fine, members, found.scores.numpy())
    assert merged.num_superpixels == found.num_superpixels
    assert torch.equal(merged.masks(), found.masks())
    nothing = RegionProposals.merged(fine, np.zeros((fine.size, 0), dtype=bool), [])
    assert nothing.num_superpixels == 1


def test_a_file_gives_back_what_was_saved(tmp_path):
    _, found = regions()
    for number, these in enumerate(
        (found, found[[]], RegionProposals.from_masks([], None, (0, 0)))
    ):
        path = tmp_path / f"{number}.npz"
        with path.open("wb") as file:
            these.save(file)
        again = RegionProposals.load(path)
        assert torch.equal(again.superpixels, these.superpixels)
        assert torch.equal(again.members, these.members)
        assert torch.equal(again.scores, these.scores)


def test_foreign_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file of region"):
        RegionProposals.load(tmp_path / "nothing.npz")
    _, found = regions()
    found.save(tmp_path / "good.npz")
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no regions")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "objects.npz", format=np.array([{}], dtype=object))
    with np.load(tmp_path / "good.npz") as content:
        parts = dict(content)
    np.savez(tmp_path / "newer.npz", **{**parts, "format": np.array("regions 9")})
    np.savez(tmp_path / "narrow.npz", **{**parts, "members": parts["members"][:, :1]})
    np.savez(tmp_path / "high.npz", **{**parts, "superpixels": parts["superpixels"] + 1})
    np.save(tmp_path / "array.npy", parts["members"])
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("short", "text", "other", "objects", "newer", "narrow", "high", "array"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is no file of region proposals"):
            RegionProposals.load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("nested", [False, True])
def test_mcg_candidates(tmp_path, nested):
    partition = np.array([[1, 1, 2, 2], [1, 3, 3, 4], [5, 5, 3, 4]], dtype=np.uint16)
    labels = np.empty(3, dtype=object)
    labels[:] = [np.array([1, 2]), np.array([3]), np.array([4, 2, 5])]
    content = {"superpixels": partition, "labels": labels}
    io.savemat(tmp_path / "a.mat", {"candidates": content} if nested else content)
    found = RegionProposals.from_mcg_mat(tmp_path / "a.mat")
    expected = [np.isin(partition, ids) for ids in labels]
    np.testing.assert_array_equal(found.masks().numpy(), expected)
    assert found.scores.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert len(RegionProposals.from_mcg_mat(tmp_path / "a.mat", top=2)) == 2
    one = {**content, "labels": labels[:1], "scores": np.array([0.25])}
    io.savemat(tmp_path / "one.mat", one)
    assert RegionProposals.from_mcg_mat(tmp_path / "one.mat").scores.tolist() == [0.25]


def test_bad_mcg_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.mat"):
        RegionProposals.from_mcg_mat(tmp_path / "a.mat")
    (tmp_path / "a.mat").write_text("no matrix")
    with pytest.raises(ValueError, match=r"a\.mat is no MATLAB file"):
        RegionProposals.from_mcg_mat(tmp_path / "a.mat")
    io.savemat(tmp_path / "b.mat", {"superpixels": np.ones((2, 2))})
    with pytest.raises(ValueError, match=r"b\.mat has no MCG candidates"):
        RegionProposals.from_mcg_mat(tmp_path / "b.mat")
    io.savemat(tmp_path / "c.mat", {"superpixels": np.ones((2, 2)), "labels": np.array([7])})
    with pytest.raises(ValueError, match=r"c\.mat: regions name superpixels that are not"):
        RegionProposals.from_mcg_mat(tmp_path / "c.mat")


def test_parts_that_do_not_fit_are_refused():
    partition, members = torch.zeros((2, 2), dtype=torch.int32), torch.ones((1, 3)).bool()
    with pytest.raises(ValueError, match=r"superpixels of regions must be torch\.int32"):
        RegionProposals(partition.long(), members, torch.ones(3))
    with pytest.raises(ValueError, match=r"members of regions must be torch\.bool"):
        RegionProposals(partition, members[0], torch.ones(3))
    with pytest.raises(ValueError, match=r"scores do not fit 3 regions"):
        RegionProposals(partition, members, torch.ones(2))
    with pytest.raises(ValueError, match=r"in \[0, 1\), but they go from 1 to 1"):
        RegionProposals(partition + 1, members, torch.ones(3))
    with pytest.raises(ValueError, match=r"one image must have its size"):
        RegionProposals.from_masks(encode_masks(np.ones((1, 2, 3))), size_hw=(2, 2))
    with pytest.raises(ValueError, match=r"one image must have its size"):
        RegionProposals.from_masks([])
    with pytest.raises(ValueError, match=r"does not fit regions of an image of size \(2, 2\)"):
        RegionProposals(partition, members, torch.ones(3)).iou(np.ones((1, 2, 3), dtype=bool))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"instseg_ext\[sds\]"):
        RegionProposals.from_masks(np.ones((1, 2, 2), dtype=bool))
