"""Precomputed proposals: a file that runs no code, and boxes that go where the image goes."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

from instseg_ext import data
from instseg_ext.config import add_shared_config
from instseg_ext.data import proposals
from instseg_ext.structures.rle import encode_masks

BOXES = torch.tensor([[0.0, 0, 10, 5], [2.5, 1, 8, 9], [30, 30, 40, 40]])
LOGITS = torch.tensor([-1.0, 3, 0.5])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "proposals.pth"
    data.write_proposals(
        path, [("7", BOXES, LOGITS), ("empty", BOXES[:0], LOGITS[:0]), ("9", BOXES[:1], LOGITS[:1])]
    )
    return path


def test_a_file_gives_back_what_was_written_best_first(file):
    stored = data.ProposalFile(file)
    assert stored.ids == ["7", "empty", "9"]
    boxes, logits = stored[7]
    assert torch.equal(logits, LOGITS[[1, 2, 0]])
    assert torch.equal(boxes, BOXES[[1, 2, 0]])
    assert [len(part) for part in stored["empty"]] == [0, 0]
    assert torch.equal(stored[9][0], BOXES[:1])
    assert 7 in stored
    assert 8 not in stored


def square_masks(sides, size_hw=(40, 60)):
    masks = np.zeros((len(sides), *size_hw), dtype=bool)
    for mask, side in zip(masks, sides, strict=True):
        mask[:side, :side] = True
    return encode_masks(masks)


def test_masks_follow_their_boxes(tmp_path):
    path, masks = tmp_path / "masks.pth", square_masks([3, 4, 5])
    as_bytes = [{**rle, "counts": rle["counts"].encode()} for rle in square_masks([6], (9, 9))]
    data.write_proposals(
        path,
        [
            ("7", BOXES, LOGITS, masks),
            ("empty", BOXES[:0], LOGITS[:0], []),
            ("void", BOXES[:0], LOGITS[:0]),
            ("9", BOXES[:1], LOGITS[:1], as_bytes),
        ],
    )
    stored = data.ProposalFile(path)
    assert stored.has_masks
    assert stored.masks(7) == [masks[1], masks[2], masks[0]]
    assert stored.masks("empty") == stored.masks("void") == []
    assert stored.masks(9) == square_masks([6], (9, 9))
    assert torch.equal(stored[7][0], BOXES[[1, 2, 0]])


def test_a_file_without_masks_says_so(file, tmp_path):
    """It stays readable for earlier releases, which know the first form only."""
    stored = data.ProposalFile(file)
    assert not stored.has_masks
    assert stored.masks(7) is None
    assert torch.load(file, weights_only=True)["format"] == "instseg_ext proposals 1"


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([("7", BOXES, LOGITS, square_masks([3, 4]))], r"Image 7 has 3 proposals and 2 masks"),
        (
            [("7", BOXES, LOGITS, square_masks([3, 4, 5])), ("8", BOXES, LOGITS)],
            r"Image 8 has 3 proposals and no masks",
        ),
        (
            [("7", BOXES[:2], LOGITS[:2], square_masks([3]) + square_masks([3], (9, 9)))],
            r"Image 7: masks of different sizes, \[\(9, 9\), \(40, 60\)\]",
        ),
    ],
    ids=["too few", "some images", "sizes"],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, items, match):
    with pytest.raises(ValueError, match=match):
        data.write_proposals(tmp_path / "masks.pth", items)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"image_sizes": torch.zeros(2, 2, dtype=torch.int64)},
        {"mask_starts": torch.tensor([0, 1])},
        {"mask_starts": torch.tensor([0, 99])},
        {"mask_counts": torch.zeros(3)},
    ],
    ids=str,
)
def test_parts_of_masks_that_do_not_fit_are_refused(tmp_path, change):
    path = tmp_path / "masks.pth"
    data.write_proposals(path, [("7", BOXES[:1], LOGITS[:1], square_masks([3]))])
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(ValueError, match=r"masks\.pth is no proposal file of ours"):
        data.ProposalFile(path)


@pytest.mark.parametrize("counts", [b"\xff\xff\xff", b"0000", b"00o", b"0Z9999999"])
def test_a_damaged_mask_is_named(tmp_path, counts):
    """pycocotools would write beyond its buffers."""
    path = tmp_path / "masks.pth"
    data.write_proposals(path, [("7", BOXES[:1], LOGITS[:1], square_masks([3]))])
    content = torch.load(path, weights_only=True)
    content["mask_counts"] = torch.frombuffer(bytearray(counts), dtype=torch.uint8)
    content["mask_starts"] = torch.tensor([0, len(counts)])
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"masks\.pth, image 7: damaged mask, "):
        data.ProposalFile(path).masks(7)


def test_no_image_at_all(tmp_path):
    data.write_proposals(tmp_path / "none.pth", [])
    assert data.ProposalFile(tmp_path / "none.pth").ids == []


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_file_that_would_run_code_is_refused(tmp_path, writer):
    path, sprung = tmp_path / "proposals.pkl", tmp_path / "sprung"
    content = {"ids": [1], "boxes": [np.zeros((1, 4))], "objectness_logits": Trap(sprung)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"no proposal file of ours .*write_proposals"):
        data.ProposalFile(path)
    assert not sprung.exists()


def test_files_that_are_damaged_or_foreign_are_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no proposal file .*gone\.pth"):
        data.ProposalFile(tmp_path / "gone.pth")
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no proposal file of ours"):
        data.ProposalFile(tmp_path / "weights.pth")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "boxes": content["boxes"][1:]}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="lengths that do not fit"):
        data.ProposalFile(tmp_path / "short.pth")
    (tmp_path / "half.pth").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="no proposal file of ours"):
        data.ProposalFile(tmp_path / "half.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"ids": "7"},
        {"ids": [7, "empty", "9"]},
        {"starts": []},
        {"starts": [0, 3, 3, 4]},
        {"starts": torch.zeros(0, dtype=torch.int64)},
        {"starts": torch.zeros(0, 4)},
        {"boxes": torch.zeros(4)},
        {"boxes": torch.zeros(4, 4, dtype=torch.int64)},
        {"objectness_logits": None},
        {"objectness_logits": torch.zeros(4, 1)},
    ],
    ids=str,
)
def test_parts_that_are_not_what_they_should_be_are_refused(file, change):
    content = torch.load(file, weights_only=True)
    torch.save({**content, **change}, file)
    with pytest.raises(ValueError, match=r"proposals\.pth is no proposal file of ours"):
        data.ProposalFile(file)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", {}], ids=str)
def test_other_things_that_torch_writes_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is no proposal file of ours"):
        data.ProposalFile(tmp_path / "other.pth")


def test_proposals_are_held_once(tmp_path, monkeypatch):
    """When the file is written, nothing is left of what its tensors were put together from."""
    size, save, alive = 917, torch.save, []

    def counting_save(content, file):
        alive.extend(o for o in gc.get_objects() if type(o) is torch.Tensor and len(o.shape) > 0)
        save(content, file)

    monkeypatch.setattr(proposals.torch, "save", counting_save)
    found = ((str(i), torch.full((size, 4), float(i)), torch.arange(size)) for i in range(8))
    data.write_proposals(tmp_path / "eight.pth", found)
    lengths = [len(tensor) for tensor in alive]
    assert lengths.count(8 * size) == 2
    # Of the last image there still are what was given and its order.
    assert lengths.count(size) <= 3
    boxes, logits = data.ProposalFile(tmp_path / "eight.pth")[1]
    assert boxes.tolist() == [[1.0] * 4] * size
    assert logits.tolist() == list(range(size))[::-1]


def test_every_training_set_has_its_file(file):
    first, second = [{"image_id": 7}, {"image_id": 9}], [{"image_id": 9}]
    assigned = data.assign_proposals([first, second], [str(file), str(file)])
    assert [d["image_id"] for d in assigned] == [7, 9, 9]
    assert {d["proposal_file"] for d in assigned} == {str(file)}
    assert "proposal_file" not in first[0]
    with pytest.raises(ValueError, match=r"each of the 2 sets .*PROPOSAL_FILES_TRAIN has 1"):
        data.assign_proposals([first, second], [str(file)])
    with pytest.raises(ValueError, match=r"proposals\.pth .*lacks 1 of 2 images, .*id 11"):
        data.assign_proposals([[{"image_id": 11}, {"image_id": 7}]], [str(file)])


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    polygon = [[10.0, 10, 20, 10, 20, 20, 10, 20]]
    annotation = {"category_id": 0, "segmentation": polygon, "iscrowd": 0}
    return {
        "file_name": str(tmp_path / "picture.png"),
        "image_id": 7,
        "height": 40,
        "width": 60,
        "annotations": [annotation],
    }


def mapper(*augmentations, **options):
    return data.InstSegDatasetMapper(
        is_train=True, augmentations=augmentations, image_format="BGR", **options
    )


def test_proposals_go_where_the_image_goes(file, picture):
    """The best stay, clipped to the image; those that a crop leaves nothing of are dropped."""
    moved = data.ProposalMapper(mapper(T.Resize((80, 120)), T.HFlipTransform(120)))
    (assigned,) = data.assign_proposals([[picture]], [str(file)])
    proposals = moved(assigned)["proposals"]
    assert proposals.image_size == (80, 120)
    expected = [[104, 2, 115, 18], [40, 60, 60, 80], [100, 0, 120, 10]]
    assert proposals.proposal_boxes.tensor.tolist() == expected
    assert proposals.objectness_logits.tolist() == [3, 0.5, -1]
    best = data.ProposalMapper(mapper(T.CropTransform(5, 0, 20, 40), proposal_topk=1))
    proposals = best(assigned)["proposals"]
    assert proposals.proposal_boxes.tensor.tolist() == [[0, 1, 3, 9]]
    assert "proposal_file" in assigned


def test_a_worker_maps_the_file_for_itself(file, picture):
    used = data.ProposalMapper(mapper())
    (assigned,) = data.assign_proposals([[picture]], [str(file)])
    used(assigned)
    content = pickle.dumps(used)
    assert len(content) < 2000
    assert len(pickle.loads(content)(assigned)["proposals"]) == 3


@pytest.fixture
def cfg(file, picture):
    name = "one_picture_with_proposals"
    DatasetCatalog.register(name, lambda: [picture])
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    cfg = get_cfg()
    add_shared_config(cfg)
    data.add_data_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (str(file),)
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = 2
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.INPUT.MIN_SIZE_TEST = 80
    cfg.MODEL.LOAD_PROPOSALS = True
    yield cfg
    DatasetCatalog.remove(name)


def test_the_loaders_read_them(cfg):
    (sample,) = next(iter(data.build_train_loader(cfg, data.build_mapper(cfg, True), seed=0)))
    assert sample["proposals"].objectness_logits.tolist() == [3, 0.5]
    assert len(sample["instances"]) == 1
    loader = data.build_test_loader(cfg, cfg.DATASETS.TEST[0], data.build_mapper(cfg, False))
    (sample,) = next(iter(loader))
    assert sample["proposals"].objectness_logits.tolist() == [3]
    assert sample["proposals"].proposal_boxes.tensor.tolist() == [[5, 2, 16, 18]]
    assert "proposal_rles" not in sample


def test_the_test_loader_attaches_masks_of_the_same_proposals(cfg, tmp_path):
    """Row i of the masks is row i of the boxes, also where a box is dropped; size of the file."""
    path = tmp_path / "masks.pth"
    outside = torch.tensor([[70.0, 0, 80, 10]])
    boxes, masks = torch.cat([outside, BOXES]), square_masks([3, 4, 5, 6])
    logits = torch.cat([torch.tensor([9.0]), LOGITS])
    data.write_proposals(path, [("7", boxes, logits, masks)])
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(path),)
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 2
    cfg.INSTSEG.PROPOSAL_MASKS = True
    loader = data.build_test_loader(cfg, cfg.DATASETS.TEST[0], data.build_mapper(cfg, False))
    (sample,) = next(iter(loader))
    assert sample["proposals"].objectness_logits.tolist() == [3, 0.5]
    assert list(sample["proposal_rles"]) == [masks[2], masks[3]]
    assert sample["image"].shape[1:] == (80, 120)
    best = sample["proposal_rles"][torch.tensor([False, True])]
    assert list(best) == [masks[3]]


def test_what_the_test_loader_lacks_is_asked_for(cfg, file, tmp_path):
    name, build = cfg.DATASETS.TEST[0], data.build_mapper(cfg, False)
    cfg.INSTSEG.PROPOSAL_MASKS = True
    with pytest.raises(ValueError, match=r"PROPOSAL_FILES_TEST has boxes only, .* wants the masks"):
        data.build_test_loader(cfg, name, build)
    cfg.INSTSEG.STRETCH = [64, 64]
    with pytest.raises(ValueError, match=r"INSTSEG\.STRETCH .* would not follow"):
        data.build_test_loader(cfg, name, build)
    with pytest.raises(ValueError, match=r"a file of proposals for other_set"):
        data.proposal_mapper.proposal_file_of(cfg, "other_set")
    data.check_proposal_files(cfg, "TEST")
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    with pytest.raises(ValueError, match=r"the 1 sets of DATASETS\.TEST, .*_TEST has 0; `instseg"):
        data.check_proposal_files(cfg, "TEST")
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "gone.pth"),)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth \(DATASETS\.PROPOSAL_FILES_TEST\)"):
        data.check_proposal_files(cfg, "TEST")
    cfg.MODEL.LOAD_PROPOSALS = False
    data.check_proposal_files(cfg, "TEST")
