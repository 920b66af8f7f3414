"""``instseg propose``: the file of proposals, in its three forms."""

import argparse
import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as coco_mask

from instseg_ext import data
from instseg_ext.cli import propose
from instseg_ext.engine import proposing
from instseg_ext.evaluation import ProposalEvaluator
from instseg_ext.layers.mask_ops import RLEList
from instseg_ext.structures.rle import encode_masks

NAME = "blobs_to_propose"


@pytest.fixture
def blobs(use_blobs, tmp_path, picture):
    """Three pictures, the second without an object; ids are no positions."""
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for index, image in enumerate([picture(), np.zeros_like(picture()), picture(shift=7)]):
        Image.fromarray(image).save(folder / f"{index}.png")
        images.append({"id": 40 + index, "file_name": f"{index}.png", "height": 60, "width": 90})
    for number, (x, image_id) in enumerate(((5, 40), (12, 42)), start=1):
        box = [x, 10, 40, 10]
        polygon = [[x, 10, x + 40, 10, x + 40, 20, x, 20]]
        annotations.append(
            {"id": number, "image_id": image_id, "category_id": 6, "bbox": box, "iscrowd": 0,
             "area": 400, "segmentation": polygon}
        )  # fmt: skip
    categories = [{"id": 6, "name": "tall"}, {"id": 9, "name": "wide"}]
    path = tmp_path / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    data.register(NAME, path, folder)
    use_blobs.MODEL.RETINANET.SCORE_THRESH_TEST = 0.1
    use_blobs.DATALOADER.NUM_WORKERS = 0
    yield tmp_path / "out" / "proposals.file"
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    del data.registration._REGISTERED[NAME]


def run(output, *words):
    parser = argparse.ArgumentParser()
    propose.add_parser(parser.add_subparsers())
    args, rest = parser.parse_known_args(
        ["propose", "--dataset", NAME, "--output", str(output), *map(str, words)]
    )
    args.opts = rest
    return args.run(args)


def test_our_own_file_has_boxes_and_masks_of_every_image(blobs, caplog):
    with caplog.at_level(logging.INFO):
        assert run(blobs) == 0
    assert f"4 proposals with masks for 3 images of {NAME}" in caplog.text
    found = data.ProposalFile(blobs)
    assert found.ids == ["40", "41", "42"]
    boxes, logits = found[42]
    assert boxes.tolist() == [[12, 10, 52, 20], [60, 25, 70, 55]]
    assert logits.sigmoid().tolist() == pytest.approx([230 / 255, 102 / 255], abs=1e-4)
    assert [coco_mask.area(rle) for rle in found.masks(42)] == [400, 300]
    assert len(found[41][0]) == len(found.masks(41)) == 0
    assert [path.name for path in blobs.parent.iterdir()] == [blobs.name]


def test_the_pickle_is_what_detectron2_reads(blobs):
    """Check 16: the boxes as they were, sorted by logit, under the ids of the data set."""
    run(blobs, "--format", "detectron2-pickle")
    dicts = copy.deepcopy(DatasetCatalog.get(NAME))
    loaded = load_proposals_into_dataset(dicts, str(blobs))
    run(blobs.with_name("ours.pth"))
    ours = data.ProposalFile(blobs.with_name("ours.pth"))
    for record in loaded:
        boxes, logits = ours[record["image_id"]]
        assert record["proposal_boxes"].tolist() == boxes.tolist()
        assert record["proposal_objectness_logits"].tolist() == logits.tolist()
        assert (np.diff(record["proposal_objectness_logits"]) <= 0).all()
    assert max(logits) > 1  # a logit, no probability
    assert sum(len(record["proposal_boxes"]) for record in loaded) == 4


def test_coco_results_hold_masks_and_probabilities(blobs):
    run(blobs, "--format", "json", "--top", 1)
    results = json.loads(blobs.read_text())
    assert [r["image_id"] for r in results] == [40, 42]
    assert results[1]["bbox"] == [12, 10, 40, 10]
    assert results[1]["score"] == pytest.approx(230 / 255, abs=1e-4)
    assert {r["category_id"] for r in results} == {6}
    evaluator = ProposalEvaluator(NAME)
    for result in results:
        found = Instances((60, 90), scores=torch.tensor([result["score"]]))
        found.pred_masks_rle = RLEList([result["segmentation"]])
        evaluator.process([{"image_id": result["image_id"]}], [{"instances": found}])
    assert evaluator.evaluate()["proposals"]["segm_AR@10"] == pytest.approx(100)


def test_no_proposal_at_all_is_valid_json(blobs, use_blobs):
    use_blobs.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    run(blobs, "--format", "json")
    assert json.loads(blobs.read_text()) == []


def test_an_existing_file_is_kept_unless_told_otherwise(blobs):
    blobs.parent.mkdir()
    blobs.write_text("precious")
    with pytest.raises(FileExistsError, match="exists; choose another"):
        run(blobs)
    assert blobs.read_text() == "precious"
    run(blobs, "--force", "--top", 1)
    assert len(data.ProposalFile(blobs)[40][0]) == 1


def test_a_run_that_fails_leaves_nothing(blobs, monkeypatch):
    monkeypatch.setattr(data, "write_coco_results", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(blobs, "--format", "json")
    assert not list(blobs.parent.iterdir())


def test_what_is_wrong_is_said_at_once(blobs, use_blobs):
    with pytest.raises(ValueError, match="--top must be 0"):
        run(blobs, "--top", -1)
    use_blobs.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="--weights is missing"):
        run(blobs)
    assert tuple(propose.FORMS) == proposing.FORMS


def test_methods_that_propose_give_their_own_scores():
    """Their rows are those of the instances; boxes without masks are proposals too."""
    instances = Instances((8, 8), scores=torch.tensor([0.9, 0.2]))
    boxes = data.proposal_mapper.Boxes(torch.tensor([[0.0, 0, 4, 4], [1, 1, 2, 2]]))
    proposals = Instances((8, 8), proposal_boxes=boxes, objectness_logits=torch.tensor([-3.0, 5]))
    found, logits, masks = proposing._proposals(
        {"instances": instances, "proposals": proposals}, None
    )
    assert logits.tolist() == [5, -3]
    assert found.tolist() == boxes.tensor[[1, 0]].tolist()
    assert masks is None


def test_what_two_processes_find_becomes_one_file(tmp_path, monkeypatch):
    file = tmp_path / "proposals.pth"
    masks = encode_masks(np.ones((1, 4, 4), dtype=bool))
    monkeypatch.setattr(proposing.comm, "get_world_size", lambda: 2)
    for rank in (1, 0):  # the main process joins the parts, so here it comes last
        monkeypatch.setattr(proposing.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(proposing.comm, "is_main_process", lambda rank=rank: rank == 0)
        found = (str(rank), torch.full((1, 4), float(rank)), torch.zeros(1), masks)
        proposing.write_found(file, iter([found]))
    joined = data.ProposalFile(file)
    assert joined.ids == ["0", "1"]
    assert joined.masks(1) == masks
    assert joined[1][0].tolist() == [[1.0] * 4]
    assert list(tmp_path.iterdir()) == [file]


def imported(tmp_path, output, results, *words):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    return run(output, "--from-file", path, *words)


def test_proposals_of_another_program(blobs, tmp_path, caplog):
    """The others of the data set's images have none; masks come along."""
    mask = encode_masks(np.ones((1, 60, 90), dtype=bool))[0]
    results = [
        {"image_id": 42, "score": score, "segmentation": mask, "bbox": [0, 0, 90, 60]}
        for score in (0.2, 0.7)
    ]
    with caplog.at_level(logging.WARNING):
        assert imported(tmp_path, blobs, results, "--top", 1) == 0
    assert f"names 1 of the 3 images of {NAME}" in caplog.text
    found = data.ProposalFile(blobs)
    assert found.ids == ["40", "41", "42"]
    assert found[42][1].sigmoid().tolist() == pytest.approx([0.7])
    assert found.masks(42) == [mask]
    assert found.masks(40) == []


def test_proposals_for_other_data_are_refused(blobs, tmp_path):
    mask = encode_masks(np.ones((1, 9, 9), dtype=bool))[0]
    result = {"image_id": 42, "score": 0.5, "segmentation": mask}
    with pytest.raises(ValueError, match=r"Image 42 is \[60, 90\] pixels .* masks of \[9, 9\]"):
        imported(tmp_path, blobs, [result])
    with pytest.raises(ValueError, match=r"for 1 images, none of which is of blobs"):
        imported(tmp_path, blobs, [{**result, "image_id": 1}])
    with pytest.raises(ValueError, match=r"--from-file needs no model"):
        imported(tmp_path, blobs, [result], "--weights", "model.pth")
    assert not blobs.exists()
