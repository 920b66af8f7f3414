"""Proposals of other programs: read as data, in whatever form their boxes are."""

import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode

from instseg_ext import data
from instseg_ext.structures.rle import encode_masks

XYXY = np.array([[2.0, 3, 12, 9], [0, 0, 5, 5]], dtype=np.float32)
XYWH = np.array([[2.0, 3, 10, 6], [0, 0, 5, 5]], dtype=np.float32)
LOGITS = np.array([-1.0, 2.5], dtype=np.float32)


def pickled(tmp_path, **content):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps({"ids": [7], "objectness_logits": [LOGITS], **content}))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"boxes": [XYXY]},
        {"boxes": [XYXY], "bbox_mode": BoxMode.XYXY_ABS},
        {"boxes": [XYWH], "bbox_mode": BoxMode.XYWH_ABS},
        {"boxes": [XYWH.astype(np.float64)], "bbox_mode": 1},
    ],
    ids=["none", "xyxy", "xywh", "number"],
)
def test_a_pickle_says_how_its_boxes_are_written(tmp_path, content):
    """Sheet multipathnet, check 15: the mode makes no difference to what a model is given."""
    boxes, logits, masks = data.read_foreign_proposals(pickled(tmp_path, **content))["7"]
    assert boxes.tolist() == XYXY.tolist()
    assert logits.tolist() == LOGITS.tolist()
    assert masks is None


def test_a_pickle_of_detectron(tmp_path):
    path = tmp_path / "old.pkl"
    content = {"indexes": ["a", "b"], "boxes": [XYXY, XYXY[:0]], "scores": [LOGITS, LOGITS[:0]]}
    path.write_bytes(pickle.dumps(content))
    found = data.read_foreign_proposals(path)
    assert [len(found[key][1]) for key in ("a", "b")] == [2, 0]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"boxes": [XYXY], "bbox_mode": BoxMode.XYWHA_ABS}, "mode XYWHA_ABS"),
        ({"boxes": [XYXY], "bbox_mode": 99}, "99 is not a valid BoxMode"),
        ({"boxes": [XYXY[:1]]}, "image 7 has 1 boxes and 2 scores"),
        ({"boxes": [XYXY[:, :3]]}, "cannot reshape"),
        ({"boxes": [XYXY], "ids": [7, 8]}, "zip"),
        ({"boxes": [XYXY * np.nan]}, "image 7 has boxes that are no numbers"),
        ({}, "KeyError 'boxes'"),
    ],
    ids=["rotated", "mode", "scores", "columns", "ids", "nan", "none"],
)
def test_pickles_that_make_no_sense_are_refused(tmp_path, content, match):
    with pytest.raises(ValueError, match=r"proposals\.pkl cannot be read as proposals .*" + match):
        data.read_foreign_proposals(pickled(tmp_path, **content))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    sprung = tmp_path / "sprung"
    with pytest.raises(ValueError, match=r"it refers to (io|_io|builtins)\.open"):
        data.read_foreign_proposals(pickled(tmp_path, boxes=[Trap(sprung)]))
    assert not sprung.exists()


def results(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def square(side):
    mask = np.zeros((1, 20, 30), dtype=bool)
    mask[0, :side, :side] = True
    return encode_masks(mask)[0]


def test_results_with_masks_boxes_or_both(tmp_path):
    """As the DeepMask authors publish theirs: masks alone, whose tight boxes are the boxes."""
    first = {"image_id": 7, "category_id": 1, "score": 0.5, "segmentation": square(4)}
    second = {**first, "score": 0.9, "bbox": [1, 2, 3, 4]}
    found = data.read_foreign_proposals(results(tmp_path, [first, second]))
    boxes, logits, masks = found["7"]
    assert boxes.tolist() == [[0, 0, 4, 4], [1, 2, 4, 6]]
    assert torch.allclose(logits.sigmoid(), torch.tensor([0.5, 0.9]))
    assert masks == [square(4)] * 2
    del second["segmentation"]
    path = results(tmp_path, [second, {**second, "score": 7.5}])
    _, logits, masks = data.read_foreign_proposals(path)["7"]
    assert masks is None
    assert logits.tolist() == pytest.approx([0.9, 7.5])  # no probabilities
    with pytest.raises(ValueError, match="some results of image 7 have masks"):
        data.read_foreign_proposals(results(tmp_path, [first, second]))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[{", "Expecting"),
        ("3", "TypeError"),
        ([{"image_id": 7}], "KeyError 'score'"),
        ([{"image_id": 7, "score": 1}], "image 7 has neither bbox nor"),
        (
            [{"image_id": 7, "score": 1, "segmentation": {"size": [9, 9], "counts": "~~"}}],
            "image 7: undecodable RLE",
        ),
        (
            [{"image_id": 7, "score": 1, "segmentation": [[0, 0, 1, 1]]}],
            "image 7: RLE without",
        ),
    ],
    ids=["json", "number", "score", "shape", "mask", "polygon"],
)
def test_results_that_make_no_sense_are_refused(tmp_path, content, match):
    with pytest.raises(ValueError, match=r"results\.json cannot be read .*(" + match + ")"):
        data.read_foreign_proposals(results(tmp_path, content))


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of proposals .*gone\.pkl"):
        data.read_foreign_proposals(tmp_path / "gone.pkl")
    (tmp_path / "boxes.mat").touch()
    with pytest.raises(ValueError, match=r"boxes\.mat: proposals are read from \.pkl"):
        data.read_foreign_proposals(tmp_path / "boxes.mat")
