"""What is drawn for fine-tuning, and what the linear classifiers learn from."""

import torch

from instseg_ext.methods.sds.targets import (
    WindowOptions,
    draw_windows,
    latent_positives,
    svm_negatives,
    window_labels,
)

# Two objects, of classes 1 and 0, then five regions.
CLASSES = torch.tensor([1, 0])
IOU = torch.tensor([[1, 0], [0, 1], [0.6, 0.1], [0.5, 0.1], [0.1, 0.3], [0.1, 0.19], [0, 0.7]])


def test_labels_follow_the_best_object():
    assert window_labels(IOU, CLASSES, 3, 0.5).tolist() == [1, 0, 1, 1, 3, 3, 0]
    assert window_labels(IOU[:, :0], CLASSES[:0], 3, 0.5).tolist() == [3] * 7


def test_draws():
    options = WindowOptions(foreground=8, background=24)
    labels = window_labels(IOU, CLASSES, 3, 0.5)
    drawn = labels[draw_windows(labels, 3, options)]
    assert (drawn[:8] < 3).all()
    assert (drawn[8:] == 3).all()
    assert len(drawn) == 32
    for only in ([0, 1], [4, 5]):  # the other kind takes the missing one's place
        assert len(draw_windows(labels[only], 3, options)) == 32
    assert len(draw_windows(labels[:0], 3, options)) == 0


def test_negatives_of_a_class():
    """Bad regions and the objects of other classes; everything but objects of its own."""
    assert svm_negatives(IOU, CLASSES, 0, 0.2).int().tolist() == [1, 0, 1, 1, 0, 1, 0]
    assert svm_negatives(IOU, CLASSES, 1, 0.2).int().tolist() == [0, 1, 0, 0, 1, 1, 1]
    assert svm_negatives(IOU, CLASSES, 2, 0.2).int().tolist() == [1] * 7


def test_latent_positives_are_the_best_scored_near_an_object():
    scores = torch.tensor([9.0, 9, 1, 2, 3, 4, 5])
    assert latent_positives(IOU, CLASSES, 1, scores, 0.5).tolist() == [2]  # 0.5 is not above
    assert latent_positives(IOU, CLASSES, 1, scores, 0.4).tolist() == [3]
    assert latent_positives(IOU, CLASSES, 0, scores, 0.8).tolist() == []
    assert latent_positives(IOU, CLASSES, 2, scores, 0.5).tolist() == []
