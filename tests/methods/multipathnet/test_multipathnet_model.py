"""The whole model: proposals from a file, their masks, crowds, precision."""

import numpy as np
import pytest
import torch
from contract.cases import blobs
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from methods.multipathnet.multipathnet_toys import FROM_FILE, config, model_of, proposals_of

from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.data.proposal_mapper import transform_proposals
from instseg_ext.layers.mask_ops import RLEList, encode_rle
from instseg_ext.methods.multipathnet import METHOD
from instseg_ext.structures.rle import decode_masks

BOXES = [[4, 4, 30, 30], [20, 10, 60, 50], [0, 0, 64, 64], [5, 5, 29, 31]]


def sample(boxes=BOXES, objects=((4, 4, 30, 30), (22, 12, 58, 50)), masks=True):
    """An input with proposals, each of which has its box as mask."""
    given = dict(blobs(64, 64, list(objects)), proposals=proposals_of(*boxes))
    if masks:
        stack = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(stack, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        given["proposal_rles"] = RLEList(encode_rle(stack))
    return given


@pytest.fixture(scope="module")
def from_file():
    return model_of(*FROM_FILE)


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_acceptance_check_14_masks_are_those_of_the_proposals(from_file, output):
    """Whatever suppression and ranking do."""
    model = from_file.eval()
    model.mask_output = output
    model.roi_heads.detection = type(model.roi_heads.detection)(nms_iou=0.3, limit=3)
    with torch.no_grad():
        torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=1e-3)
        found = model([sample()])[0]["instances"]
    assert 0 < len(found) <= 3
    index = found.proposal_index.tolist()
    if output == "rle":
        masks = torch.from_numpy(decode_masks(found.pred_masks_rle))
    else:
        masks = found.pred_masks
    expected = decode_masks([sample()["proposal_rles"][i] for i in index])
    assert np.array_equal(masks.numpy(), expected)
    # the boxes have hardly moved
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor(BOXES)[index].float(), atol=2, rtol=0
    )


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_acceptance_check_13_an_image_without_proposals(from_file, output):
    model = from_file.train()
    model.mask_output = output
    losses = model([sample(boxes=[]), sample()])
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    with torch.no_grad():
        first, second = model.eval()([sample(boxes=[]), sample()])
    assert len(first["instances"]) == 0
    assert len(second["instances"]) > 0
    masks = first["instances"].get("pred_masks" if output == "bool" else "pred_masks_rle")
    assert len(masks) == 0


def test_images_without_objects_teach_nothing_with_published_background(from_file):
    losses = model_of(*FROM_FILE, "MODEL.MULTIPATH.BG_IOU_MIN", 0.1).train()([sample(objects=())])
    assert {name: value.item() for name, value in losses.items()} == {
        "loss_cls": 0, "loss_box_reg": 0
    }  # fmt: skip
    sum(losses.values()).backward()


def test_missing_masks_are_named(from_file):
    with pytest.raises(ValueError, match=r"INSTSEG\.PROPOSAL_MASKS"):
        from_file.eval()([sample(masks=False)])
    wrong = {**sample(), "height": 32, "width": 32, "file_name": "some.png"}
    with pytest.raises(ValueError, match=r"\[64, 64\] pixels.*some\.png"):
        from_file.eval()([wrong])


def test_acceptance_check_15_xywh_proposals_are_the_same():
    """The mode in the dictionary decides."""
    given = {}
    boxes = np.array(BOXES, dtype="float32")
    for mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        given[mode] = {
            "proposal_boxes": BoxMode.convert(boxes.copy(), BoxMode.XYXY_ABS, mode),
            "proposal_bbox_mode": mode,
            "proposal_objectness_logits": np.arange(4, 0, -1),
        }
        transform_proposals(given[mode], (64, 64), T.TransformList([]), 10)
    first, second = (x["proposals"].proposal_boxes.tensor for x in given.values())
    assert torch.equal(first, second)
    assert torch.equal(first, torch.from_numpy(boxes))


def test_acceptance_check_16_half_precision_probabilities():
    full, half = model_of(), model_of("INSTSEG.PRECISION", "bf16")
    half.load_state_dict(full.state_dict())
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    probs = []
    for model in (full.eval(), half.eval()):
        with torch.no_grad(), model.precision():
            features = model.backbone(model.preprocess_image([sample()]).tensor)
            maps = [features[name] for name in model.roi_heads.box_in_features]
            probs.append(model.roi_heads._predict(maps, boxes)[0])
    assert probs[1].dtype is torch.float32
    torch.testing.assert_close(probs[0], probs[1], atol=1e-2, rtol=0)


def test_crowds_are_left_out(monkeypatch):
    """The RPN does not learn them, and regions in them are not drawn."""
    model = model_of().train()
    given = sample(objects=((4, 4, 30, 30), (22, 12, 58, 50)))
    given["instances"].gt_is_crowd = torch.tensor([False, True])
    seen = {}
    generate, heads = model.proposal_generator.forward, model.roi_heads.forward

    def generated(images, features, targets):
        seen["rpn"] = targets
        proposals, losses = generate(images, features, targets)
        return [proposals_of(*BOXES) for _ in proposals], losses

    def headed(images, features, proposals, targets):
        seen["heads"], seen["shares"] = targets, proposals[0].crowd_share
        return heads(images, features, proposals, targets)

    monkeypatch.setattr(model.proposal_generator, "forward", generated)
    monkeypatch.setattr(model.roi_heads, "forward", headed)
    losses = model([given])
    assert all(value.isfinite() for value in losses.values())
    for who in ("rpn", "heads"):
        assert seen[who][0].gt_boxes.tensor.tolist() == [[4, 4, 30, 30]]
    assert seen["shares"][1] == pytest.approx(36 * 38 / 1600)


def test_the_mapper_keeps_crowds_in_training_only():
    assert METHOD.build_mapper(config(), True).keep_crowd
    assert not METHOD.build_mapper(config(), False).keep_crowd
    assert not METHOD.build_mapper(config("MODEL.MULTIPATH.CROWD_OVERLAP", 1.0), True).keep_crowd


@pytest.mark.parametrize(("iteration", "moves"), [(0, False), (2, True)])
def test_the_trunk_can_wait(event_storage, iteration, moves):
    event_storage.iter = iteration
    model = model_of(*FROM_FILE, "MODEL.MULTIPATH.FREEZE_TRUNK_ITERS", 2).train()
    sum(model([sample()]).values()).backward()
    gradients = [p.grad for p in model.backbone.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients)
    assert any(bool(g.ne(0).any()) for g in gradients) == moves
    assert model.roi_heads.box_head.shared.fc6.weight.grad.ne(0).any()


def test_a_turn_in_training(event_storage):
    event_storage.iter = 4
    model = model_of(*FROM_FILE, "MODEL.MULTIPATH.INTEGRAL_MODE", "alternate").train()
    sum(model([sample()]).values()).backward()
    moved = [bool(x.weight.grad.ne(0).any()) for x in model.roi_heads.box_predictor.cls_score]
    assert moved == [i == 4 for i in range(6)]


def test_last_stage_as_tower(tmp_path):
    opts = [
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res4"],
        "MODEL.RESNETS.NORM", "FrozenBN",
        "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
        "MODEL.MULTIPATH.IN_FEATURES", ["res4"],
        "MODEL.MULTIPATH.SCALES", [1.0],
        "MODEL.MULTIPATH.MAPS", [1],
        "MODEL.MULTIPATH.HET", False,
        "MODEL.MULTIPATH.TOWER", "res5",
        "MODEL.MULTIPATH.SKIP_NORM", "none",
        "MODEL.MULTIPATH.SHARE_TOWERS", False,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPoolV2",
    ]  # fmt: skip
    model = model_of(*FROM_FILE, *opts)
    sum(model.train()([sample()]).values()).backward()
    with torch.no_grad():
        assert len(model.eval()([sample()])[0]["instances"]) > 0
    # an ImageNet model has the backbone and, beside it, the last stage
    own = model.roi_heads.box_head.towers[0].blocks.state_dict()
    state = {name: torch.full_like(x, 3.0) for name, x in model.backbone.state_dict().items()}
    state |= {f"res5.{name}": torch.full_like(x, 2.0) for name, x in own.items()}
    file = tmp_path / "imagenet.pth"
    torch.save({"model": state, "__author__": "torchvision", "matching_heuristics": True}, file)
    InstSegCheckpointer(model, num_classes=1).load(str(file))
    assert all((x == 2).all() for x in model.roi_heads.box_head.state_dict().values())
    assert all((x == 3).all() for x in model.backbone.state_dict().values())
