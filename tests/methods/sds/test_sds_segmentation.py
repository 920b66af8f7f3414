"""The built-in region proposals: their parts against plain loops, and what they find."""

import sys

import cv2
import numpy as np
import pytest
import torch
from methods.sds.sds_pictures import SIZE, shapes_image
from scipy import ndimage, sparse

from instseg_ext.methods.sds import propose_regions, segmentation
from instseg_ext.methods.sds.graph_segments import graph_segments, pixel_edges
from instseg_ext.methods.sds.grouping import describe_segments, group_segments
from instseg_ext.methods.sds.segmentation import regions_of_boxes


def segments_by_loop(features, scale, min_size):
    """The rule of the paper over the edges of the spanning tree, one after the other."""
    edges = pixel_edges(features)
    num = features.shape[0] * features.shape[1]
    order = edges.weight.argsort(kind="stable")
    rank = np.empty(len(order))
    rank[order] = np.arange(1, len(order) + 1)
    graph = sparse.coo_array((rank, (edges.first, edges.second)), shape=(num, num)).tocsr()
    tree = np.sort(sparse.csgraph.minimum_spanning_tree(graph).data).astype(int) - 1
    label, inner = np.arange(num), np.zeros(num)
    for only_small in (False, True):
        for edge in order[tree]:
            a, b = label[edges.first[edge]], label[edges.second[edge]]
            sizes = (label == a).sum(), (label == b).sum()
            weight = edges.weight[edge]
            allowed = weight <= min(inner[a] + scale / sizes[0], inner[b] + scale / sizes[1])
            if a != b and (min(sizes) < min_size if only_small else allowed):
                label[label == b] = a
                inner[a] = weight
    _, first, place = np.unique(label, return_index=True, return_inverse=True)
    return first.argsort().argsort()[place]


@pytest.mark.parametrize("seed", range(3))
def test_segments_equal_the_loop(seed):
    rng = np.random.default_rng(seed)
    features = ndimage.gaussian_filter(rng.random((17, 23, 3)) * 255, (1, 1, 0))
    features = features.round(seed).astype(np.float32)  # with and without ties
    for scale, min_size in ((40.0, 1), (120.0, 6)):
        found = graph_segments(pixel_edges(features), 17 * 23, scale, min_size)
        np.testing.assert_array_equal(found, segments_by_loop(features, scale, min_size))


def test_segments_of_a_ramp_and_of_nothing():
    flat = np.zeros((6, 7, 3), dtype=np.float32)
    assert not graph_segments(pixel_edges(flat), 42, 50.0, 1).any()
    steps = np.arange(7, dtype=np.float32)[None, :, None] ** 2 + flat
    assert graph_segments(pixel_edges(steps), 42, 1e-3, 1).reshape(6, 7)[0].tolist() == [*range(7)]
    assert graph_segments(pixel_edges(flat[:1, :1]), 1, 50.0, 9).tolist() == [0]


def test_what_grouping_knows_of_segments():
    labels = np.array([[0, 0, 1], [0, 2, 1], [2, 2, 2]])
    colours = np.stack([labels * 10.0] * 3, axis=2).astype(np.float32)
    segments = describe_segments(labels, colours, pixel_edges(colours))
    assert segments.sizes.tolist() == [3, 2, 4]
    assert segments.boxes.tolist() == [[0, 0, 2, 2], [2, 0, 3, 2], [0, 1, 3, 3]]
    assert segments.borders.tolist() == [[0, 1], [0, 2], [1, 2]]
    step = 10 * 3**0.5
    np.testing.assert_allclose(
        segments.contrasts[:, 0] / segments.contrasts[:, 1], [step, 2 * step, step], 1e-6
    )
    # colours and gradients, each of sum 1
    np.testing.assert_allclose(segments.histograms.sum(axis=1), 2, 1e-6)


def similarity_by_definition(labels, colours, a, b, weights, histograms, contrast):
    """Of two sets of segments, from the pixels."""
    both = np.isin(labels, [*a, *b])
    y, x = np.nonzero(both)
    box = (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
    sizes = [np.isin(labels, list(s)).sum() for s in (a, b)]
    counts = np.bincount(labels.ravel())

    def histogram(segments):
        rows = sorted(segments)
        return np.average(histograms[rows], axis=0, weights=counts[rows])

    common = np.minimum(histogram(a), histogram(b)).sum()
    together, pixels = sum(sizes), labels.size
    size, fill = 1 - together / pixels, 1 - (box - together) / pixels
    return weights[0] * common + weights[1] * size + weights[2] * fill - weights[3] * contrast


def test_grouping_equals_its_definition():
    """Every step of the tree joins the most similar neighbours, measured anew on the pixels."""
    rng = np.random.default_rng(0)
    labels = np.kron(np.arange(12).reshape(3, 4), np.ones((4, 3), dtype=int))
    colours = (rng.random((12, 3))[labels] * 200 + rng.random((*labels.shape, 3)) * 50).astype(
        np.float32
    )
    edges = pixel_edges(colours)
    segments = describe_segments(labels, colours, edges)
    between = edges.between(labels.ravel())
    for weights in segmentation._SIMILARITIES:
        tree = group_segments(segments, weights)
        alive = {k: frozenset([k]) for k in range(12)}
        for new, (children, contrast) in enumerate(
            zip(tree.children.tolist(), tree.contrast, strict=True), start=12
        ):
            best = (-np.inf, None, 0)
            for a in alive:
                for b in alive:
                    touch = np.isin(between.first, list(alive[a])) & np.isin(
                        between.second, list(alive[b])
                    ) | np.isin(between.first, list(alive[b])) & np.isin(
                        between.second, list(alive[a])
                    )
                    if a < b and touch.any():
                        mean = between.weight[touch].astype(float).mean()
                        value = similarity_by_definition(
                            labels, colours, alive[a], alive[b], weights, segments.histograms, mean
                        )
                        best = max(best, (value, (a, b), mean), key=lambda entry: entry[0])
            assert set(children) == set(best[1])
            assert contrast == pytest.approx(best[2], rel=1e-6)
            alive[new] = alive.pop(children[0]) | alive.pop(children[1])
            assert set(np.flatnonzero(tree.leaves()[new])) == alive[new]
        assert len(alive) == 1
        assert tree.parents()[tree.children].tolist() == [[12 + k] * 2 for k in range(11)]
        assert tree.parents()[-1] == 22


@pytest.mark.parametrize("seed", range(2))
def test_acceptance_check_16_shapes_are_found(seed):
    image, masks = shapes_image(seed)
    found = propose_regions(image, seed=seed)
    assert 0 < len(found) <= 2000
    assert found.iou(masks).amax(dim=0).min() > 0.9
    areas = found.areas()
    assert areas.min() >= 12
    assert areas.max() <= 0.9 * masks[0].size
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    assert found.scores[0] == 1
    assert found.scores[-1] > 0
    # no two regions are equal
    assert len(torch.unique(found.members, dim=1).T) == len(found)


def test_acceptance_check_16_the_seed_decides():
    image, _ = shapes_image()
    first, again, other = (propose_regions(image, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.superpixels, again.superpixels)
    assert torch.equal(first.members, again.members)
    assert other.masks().shape == first.masks().shape
    assert not torch.equal(other.masks(), first.masks())
    few = propose_regions(image, max_regions=5, seed=3)
    assert torch.equal(few.masks(), first.masks(range(5)))
    # superpixels that the few do not need are one
    assert few.num_superpixels < first.num_superpixels
    assert len(propose_regions(image, max_regions=0)) == 0


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (1, 1), (1, 9), (2, 2), (30, 30)])
def test_acceptance_check_16_images_without_anything(size):
    found = propose_regions(np.full((*size, 3), 77, dtype=np.uint8))
    assert found.image_size == size
    assert len(found) == 0
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert len(propose_regions(noise)) <= 2000


def test_large_images_are_segmented_smaller(monkeypatch):
    image, masks = shapes_image()
    monkeypatch.setattr(segmentation, "_MAX_PIXELS", SIZE[0] * SIZE[1])
    large = image.repeat(3, 0).repeat(3, 1)[:-1]
    found = propose_regions(large)
    assert found.image_size == large.shape[:2]
    assert found.iou(masks.repeat(3, 1).repeat(3, 2)[:, :-1]).amax(dim=0).min() > 0.9


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)]
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 images, not for"):
        propose_regions(image)


def test_boxes_become_regions(monkeypatch):
    """The segments that lie at least half inside; boxes that come to the same count once."""
    image, masks = shapes_image()
    boxes = [[0.0, 0, 1, 1], [57, 42, 96, 69], [56.6, 41.7, 96.4, 69.2], [-5, -9, 200, 200]]
    found = regions_of_boxes(image, np.array(boxes), np.array([0.9, 0.8, 0.7, 0.6]))
    assert found.scores.tolist() == pytest.approx([0.8, 0.6])
    assert found.iou(masks)[0, 1] > 0.9  # a rectangle
    assert found.areas()[1] == masks[0].size
    assert len(regions_of_boxes(image, np.array(boxes), np.ones(4), max_regions=1)) == 1
    assert len(regions_of_boxes(image, np.zeros((0, 4)), np.ones(0))) == 0
    monkeypatch.setattr(segmentation, "_MAX_PIXELS", SIZE[0] * SIZE[1])
    large = regions_of_boxes(image.repeat(3, 0).repeat(3, 1), np.array(boxes) * 3, np.ones(4))
    assert large.image_size == (3 * SIZE[0], 3 * SIZE[1])
    assert large.iou(masks.repeat(3, 1).repeat(3, 2))[0, 1] > 0.9


def test_there_is_no_other_source():
    with pytest.raises(ValueError, match=r"not from 'mcg'"):
        propose_regions(shapes_image()[0], source="mcg")


@pytest.mark.parametrize(
    ("source", "package"), [("skimage", "scikit-image"), ("opencv", "opencv-contrib-python")]
)
def test_a_missing_package_is_named(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(ImportError, match=package):
        propose_regions(shapes_image()[0], source=source)


def test_segments_of_scikit_image():
    pytest.importorskip("skimage", reason="scikit-image is an optional source of segments")
    image, masks = shapes_image()
    found = propose_regions(image, source="skimage")
    assert found.iou(masks).amax(dim=0).min() > 0.9


def test_boxes_of_opencv():
    if not hasattr(cv2, "ximgproc"):
        pytest.skip("opencv-contrib-python is an optional source of boxes")
    image = shapes_image()[0].repeat(3, 0).repeat(3, 1)
    found = propose_regions(image, source="opencv")
    assert found.iou(shapes_image()[1].repeat(3, 1).repeat(3, 2)).amax(dim=0)[1] > 0.9
    assert torch.equal(propose_regions(image, source="opencv").members, found.members)
