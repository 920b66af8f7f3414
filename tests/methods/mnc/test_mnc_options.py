"""What MNC's keys do, which values they take, and losses by hand."""

import pytest
import torch
import torch.nn.functional as F
from methods.mnc.mnc_toys import OBJECTS, batch, config, model_of, proposals_of, randomise

from instseg_ext.layers.mask_voting import VotingRule
from instseg_ext.methods.mnc.arch import MNCRCNN
from instseg_ext.methods.mnc.config import MNCOptions

BOXES = [[6, 6, 42, 38], [10, 12, 36, 44], [48, 8, 84, 54], [0, 40, 30, 64], [60, 30, 96, 64]]


def test_every_key_of_the_vote_and_the_cascade_is_read():
    changes = {
        "NUM_STAGES": 3, "TRAIN_STAGES": 3, "BINARY_THRESH": 0.35, "BOX_GRAD_CLIP": 0.25,
        "BRIDGE_DENORM_TRAIN": False, "MIX_INDEX": False, "FG_SEG_THRESH": 0.45, "MIN_SIDE": 12.0,
        "MASK_LOSS_WEIGHT": 3.0, "VOTE_NMS": 0.25, "VOTE_IOU": 0.55, "VOTE_MIN_SCORE": 0.125,
        "VOTE_REENCODE": True, "LEGACY_BOXES": True,
    }  # fmt: skip
    opts = [x for key, value in changes.items() for x in (f"MODEL.MNC.{key}", value)]
    opts += ["TEST.DETECTIONS_PER_IMAGE", 7, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.75]
    defaults = config()
    assert all(defaults.MODEL.MNC[key] != value for key, value in changes.items())
    model = model_of(opts)
    vote = {"nms_threshold": 0.25, "voter_iou": 0.55, "mask_threshold": 0.35, "min_score": 0.125}
    assert model.voting == VotingRule.mnc(reencode=True, max_detections=7, **vote)
    assert (model.legacy_boxes, model.mix_index, model.min_side) == (True, False, 12.0)
    assert model.proposal_generator.extra_pixel
    assert model.roi_heads.options == MNCOptions(
        num_stages=3,
        train_stages=3,
        mask_threshold=0.35,
        seg_iou=0.45,
        mask_weight=3.0,
        beta=0.75,
        box_gradient=0.25,
        denormalize=False,
        legacy=True,
    )
    assert MNCOptions.from_config(config(["MODEL.MNC.BOX_GRAD", False])).box_gradient == 0


def test_losses_of_two_stages_by_hand():
    """Boxes are divided by all regions of an image, masks by its foreground; masks weigh 2."""
    model = randomise(model_of(["MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0]))
    heads, inputs = model.roi_heads, batch(*OBJECTS)
    targets = [item["instances"] for item in inputs]
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        samples = heads.sample([proposals_of(BOXES), proposals_of(BOXES)], targets)
        outputs, losses = heads._train_pass(features, samples, targets, "s3")
        logits = heads.masks(features, [s.boxes for s in samples], heads.pooler)[1]
        goals = heads._mask_targets(samples, targets)
        of_boxes = heads._box_targets(samples, targets)
    masks, boxes, classes, row, goal = 0.0, 0.0, 0.0, 0, 0
    for sample in samples:
        number, foreground = len(sample), sample.num_foreground
        assert 0 < foreground < number
        for i in range(number):
            label = int(sample.labels[i])
            classes += float(-outputs.box_logits[row].log_softmax(0)[label]) / number / 2
            if i < foreground:
                error = (outputs.deltas[row, 4 * label : 4 * label + 4] - of_boxes[goal]).abs()
                smooth = torch.where(error < 1, 0.5 * error**2, error - 0.5).sum()
                boxes += float(smooth) / number / 2
                signed = torch.where(goals[goal], -logits[row], logits[row])
                masks += float(F.softplus(signed).mean()) / foreground / 2
                goal += 1
            row += 1
    assert float(losses["loss_mask_s3"]) == pytest.approx(2 * masks, rel=1e-4)
    assert float(losses["loss_box_reg_s3"]) == pytest.approx(boxes, rel=1e-4)
    assert float(losses["loss_cls_s3"]) == pytest.approx(classes, rel=1e-4)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.MNC.VOTE_NMS", 1.0], r"MODEL\.MNC\.VOTE_NMS must be in \[0, 1\), not 1\.0"),
        (["MODEL.MNC.VOTE_IOU", -0.1], r"MODEL\.MNC\.VOTE_IOU must be in \[0, 1\), not -0\.1"),
        (["MODEL.MNC.BINARY_THRESH", 0.0], r"MODEL\.MNC\.BINARY_THRESH must be in \(0, 1\)"),
        (["TEST.DETECTIONS_PER_IMAGE", -1], r"TEST\.DETECTIONS_PER_IMAGE must be positive, not -1"),
        (["MODEL.MNC.MASK_CONV_DIM", -3], r"MODEL\.MNC\.MASK_CONV_DIM must be in \[0, inf\)"),
        (["MODEL.MNC.MASK_INIT_STD", -0.1], r"MODEL\.MNC\.MASK_INIT_STD must be in \[0, inf\)"),
        (["MODEL.MNC.FG_SEG_THRESH", 2.0], r"MODEL\.MNC\.FG_SEG_THRESH must be in \[0, 1\], not 2"),
        (["MODEL.MNC.MIN_SIDE", -5.0], r"MODEL\.MNC\.MIN_SIDE must be in \[0, inf\), not -5"),
        (["MODEL.MNC.MASK_LOSS_WEIGHT", -1.0], r"MODEL\.MNC\.MASK_LOSS_WEIGHT must be in"),
        (
            ["MODEL.MNC.EXT_WARP", "direct14", "MODEL.MNC.WARP_MODE", "maxsample"],
            r"MODEL\.MNC\.EXT_WARP direct14 changes nothing with MODEL\.MNC\.WARP_MODE maxsample",
        ),
        (
            ["MODEL.MNC.MIN_SIDE", 16.0, "INPUT.CROP.ENABLED", True],
            r"MODEL\.MNC\.MIN_SIDE .* INPUT\.CROP\.ENABLED",
        ),
        (
            ["TEST.AUG.ENABLED", True],
            r"MNCRCNN has no test-time augm.* TEST\.AUG\.ENABLED",
        ),
    ],
)
def test_values_out_of_range_are_named(opts, message):
    with pytest.raises(ValueError, match=message):
        MNCRCNN.from_config(config(opts))
