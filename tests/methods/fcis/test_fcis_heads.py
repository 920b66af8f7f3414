"""What is read out of the score maps, and the losses (acceptance checks 4 to 9, 11, 16, 17)."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from methods.fcis.fcis_toys import config, heads_of, maps_of, objects_of, proposals_of
from torch import nn

from instseg_ext.methods.fcis.arch import FCISRCNN
from instseg_ext.methods.fcis.losses import (
    RegionLosses,
    class_logits,
    hardest,
    image_losses,
    mask_logits,
    region_losses,
)
from instseg_ext.methods.fcis.roi_heads import FCISROIHeads, ScoreMaps
from instseg_ext.methods.fcis.sampling import Regions, SamplingOptions

WEIGHTS = (1.0, 10.0, 1.0)


def scores_of(regions=1, classes=2, side=21):
    """Outside and inside 0 everywhere; the last class is background."""
    return torch.zeros(regions, classes + 1, 2, side, side)


def regions_of(classes, num_classes=2, mask=1.0):
    """Boxes do not matter; all foreground cells have the same mask value and deltas are zero."""
    classes = torch.tensor(classes)
    return Regions(
        torch.zeros(len(classes), 4),
        classes,
        torch.zeros_like(classes),
        torch.zeros(len(classes), 4),
        torch.full((int((classes < num_classes).sum()), 21, 21), mask),
    )


@pytest.mark.parametrize(("inside", "logit"), [(1.5, 1.5), (-0.7, 0.0)])
def test_acceptance_check_4_logit_and_mask_of_one_class(inside, logit):
    scores = scores_of()
    scores[0, 1, 1] = inside
    assert class_logits(scores)[0].tolist() == pytest.approx([0.0, logit, 0.0])
    mask = mask_logits(scores, torch.tensor([1])).sigmoid()
    torch.testing.assert_close(mask, torch.full((1, 21, 21), 1 / (1 + math.exp(-inside))))


def test_acceptance_check_5_a_constant_moves_the_logit_and_no_mask():
    scores = torch.randn(3, 4, 2, 21, 21)
    moved = scores.clone()
    moved[:, 2] += 0.25
    change = class_logits(moved) - class_logits(scores)
    torch.testing.assert_close(change[:, 2], torch.full((3,), 0.25))
    assert torch.equal(change[:, [0, 1, 3]], torch.zeros(3, 3))
    classes = torch.full((3,), 2)
    torch.testing.assert_close(mask_logits(moved, classes), mask_logits(scores, classes))


def test_ties_send_the_gradient_outside():
    scores = scores_of().requires_grad_()
    class_logits(scores).sum().backward()
    assert scores.grad[:, :, 0].sum() == pytest.approx(3.0)
    assert not scores.grad[:, :, 1].any()


def test_acceptance_check_6_channels_of_the_maps():
    """Class 3 of the published order, which counts background first, is class 2 here."""
    heads, maps = heads_of(3), maps_of(3, cells=(24, 24))
    for x in maps:
        x.zero_()
    maps.classes[:, ((2 * 2 + 1) * 7 + 2) * 7 + 5] = 1
    maps.boxes[:, (3 * 7 + 6) * 7 + 1] = 1
    scores, deltas = heads.pool(maps, torch.tensor([[0, 16.0, 16.0, 352.0, 352.0]]))
    expected = scores_of(classes=3)
    expected[0, 2, 1, 6:9, 15:18] = 1
    assert torch.equal(scores, expected)
    assert deltas[0].tolist() == pytest.approx([0, 0, 0, 9 / 441])


def test_acceptance_check_7_masks_are_those_of_the_best_foreground_class():
    heads, maps = heads_of(2), maps_of(2)
    pairs = maps.classes.unflatten(1, (3, 2, 49))
    pairs.zero_()
    pairs[:, 0, 1], pairs[:, 1, 1], pairs[:, 2, 1] = 1.0, 2.0, 9.0
    found = heads.candidates(maps, torch.tensor([[16.0, 16.0, 100.0, 100.0]]), (128, 128))
    assert found.candidate_scores.shape == (2, 2)
    assert found.candidate_scores.sum() < 0.01
    torch.testing.assert_close(
        found.candidate_masks, torch.full((2, 21, 21), 1 / (1 + math.exp(-2.0)))
    )


class TestLosses:
    def test_acceptance_check_9_one_region_that_knows_nothing(self):
        losses = region_losses(scores_of(), torch.zeros(1, 4), regions_of([0]))
        total = image_losses(losses, 128, WEIGHTS)
        assert float(total["loss_mask"]) == pytest.approx(10 * math.log(2) / 128)
        assert float(total["loss_cls"]) == pytest.approx(math.log(3))
        assert float(total["loss_box_reg"]) == 0

    def test_background_has_neither_mask_nor_box_loss(self):
        losses = region_losses(scores_of(3), torch.ones(3, 4), regions_of([2, 1, 2]))
        assert losses.masks.tolist() == pytest.approx([0, math.log(2), 0])
        assert losses.boxes.tolist() == [0, 2, 0]
        assert losses.classes.tolist() == pytest.approx([math.log(3)] * 3)

    def test_boxes_are_linear_beyond_one(self):
        deltas = torch.tensor([[0.5, 3.0, 0.0, -1.0]])
        losses = region_losses(scores_of(), deltas, regions_of([0]))
        assert losses.boxes.tolist() == pytest.approx([0.125 + 2.5 + 0.5])

    def test_mask_target(self):
        scores = scores_of()
        scores[0, 0, 1] = 2.0
        inside = region_losses(scores, torch.zeros(1, 4), regions_of([0]))
        outside = region_losses(scores, torch.zeros(1, 4), regions_of([0], mask=0.0))
        assert float(inside.masks[0]) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
        assert float(outside.masks[0]) == pytest.approx(math.log(1 + math.exp(2)), rel=1e-5)

    def test_rank_of_a_region(self):
        losses = RegionLosses(*torch.tensor([[1.0, 2.0], [0.5, 0.0], [4.0, 1.0]]))
        assert losses.weighted(WEIGHTS).tolist() == [10.0, 3.0]


class TestHardRegions:
    @staticmethod
    def scene(regions, most=128):
        """Heads, maps, proposals in a row and one object: IoU 1 of the last of them."""
        heads = heads_of(1, options=SamplingOptions(num_regions=most, append_gt=False))
        maps = maps_of(1, cells=(8, 24))
        boxes = [[x, 10, x + 60, 70] for x in range(regions)]
        return heads, maps, proposals_of(boxes, (128, 384)), objects_of(boxes[-1], [0], (128, 384))

    def test_acceptance_check_8_the_largest_losses_are_kept(self):
        losses = torch.randperm(300).float()
        assert set(hardest(losses, 128).tolist()) == set(losses.argsort()[-128:].tolist())
        assert sorted(hardest(losses[:90], 128).tolist()) == list(range(90))

    def test_acceptance_check_8_they_are_ranked_by_all_three_losses(self):
        heads, maps, proposals, target = self.scene(300)
        options = SamplingOptions(num_regions=1000, append_gt=False)
        everything = heads_of(1, options=options).sample_regions(maps, proposals, target)
        assert len(everything) == 300
        rois = torch.cat([torch.zeros(300, 1), everything.boxes], dim=1)
        losses = region_losses(*heads.pool(maps, rois), everything).weighted(WEIGHTS)
        kept = heads.sample_regions(maps, proposals, target)
        assert len(kept) == 128
        expected = everything.boxes[losses.topk(128).indices]
        assert set(map(tuple, kept.boxes.tolist())) == set(map(tuple, expected.tolist()))
        assert len(kept.masks) == int(kept.foreground(1).sum()) > 0

    @pytest.mark.parametrize("regions", [300, 90])
    def test_acceptance_check_8_no_gradient_from_others_and_the_divisor(self, regions):
        heads, maps, proposals, target = self.scene(regions)
        maps = ScoreMaps(*(x.requires_grad_() for x in maps))
        with EventStorage():
            losses = heads.losses(maps, [proposals], [target])
        sum(losses.values()).backward()
        kept = heads.sample_regions(maps, proposals, target)
        assert len(kept) == min(regions, 128)
        again = ScoreMaps(*(x.detach().clone().requires_grad_() for x in maps))
        rois = torch.cat([torch.zeros(len(kept), 1), kept.boxes], dim=1)
        parts = region_losses(*heads.pool(again, rois), kept)
        wanted = parts.classes.mean() + (10 * parts.masks.sum() + parts.boxes.sum()) / 128
        wanted.backward()
        assert float(sum(losses.values()).detach()) == pytest.approx(
            float(wanted.detach()), rel=1e-5
        )
        for ours, theirs in zip(maps, again, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


class TestRounds:
    def test_acceptance_check_11_zero_deltas_repeat_the_first_round(self):
        heads, maps = heads_of(2), maps_of(2)
        maps.boxes.zero_()
        boxes = torch.tensor([[-5.0, 3.0, 60.0, 50.0], [20.0, 20.0, 140.0, 90.0]])
        found = heads.candidates(maps, boxes, (128, 128))
        clipped = torch.tensor([[0.0, 3.0, 60.0, 50.0], [20.0, 20.0, 128.0, 90.0]])
        torch.testing.assert_close(found.candidate_boxes.tensor[2:], clipped)
        inside = heads.candidates(maps, clipped, (128, 128))
        torch.testing.assert_close(inside.candidate_scores[:2], inside.candidate_scores[2:])
        torch.testing.assert_close(inside.candidate_masks[:2], inside.candidate_masks[2:])

    def test_refined_boxes_are_pooled_again(self):
        heads, maps = heads_of(2), maps_of(2)
        maps.boxes.unflatten(1, (4, 49))[:, 0] = 0.5  # dx of a tenth of the width
        maps.boxes.unflatten(1, (4, 49))[:, 1:] = 0
        boxes = torch.tensor([[20.0, 20.0, 100.0, 100.0]])
        found = heads.candidates(maps, boxes, (128, 128))
        moved = torch.tensor([[28.0, 20.0, 108.0, 100.0]])
        torch.testing.assert_close(found.candidate_boxes.tensor, torch.cat([boxes, moved]))
        alone = heads.candidates(maps, moved, (128, 128))
        torch.testing.assert_close(found.candidate_masks[1], alone.candidate_masks[0])

    def test_small_candidates_are_dropped(self):
        heads, maps = heads_of(2, rounds=1, min_size=16.0), maps_of(2)
        boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 40.0, 15.9]])
        assert len(heads.candidates(maps, boxes, (128, 128))) == 1

    def test_candidates_are_what_training_looks_at(self):
        """The pooling of inference reads the same maps the same way, of each image its own."""
        heads, maps = heads_of(2, rounds=1).eval(), maps_of(2, images=2)
        corners = torch.rand(30, 2) * 60
        boxes = torch.cat([corners, corners + 20 + torch.rand(30, 2) * 40], dim=1)
        found = heads.candidates(maps.of_image(1), boxes, (128, 128))
        scores, _ = heads.pool(maps, torch.cat([torch.ones(30, 1), boxes], dim=1))
        logits = class_logits(scores)
        torch.testing.assert_close(found.candidate_scores, logits.softmax(dim=1)[:, :2])
        best = logits[:, :2].argmax(dim=1)
        torch.testing.assert_close(found.candidate_masks, mask_logits(scores, best).sigmoid())


class TestNothingToLookAt:
    """Acceptance check 16."""

    @pytest.mark.parametrize("hard", [True, False])
    @pytest.mark.parametrize("proposals", [[], [[0, 0, 30, 40], [60, 60, 100, 90]]])
    @pytest.mark.parametrize("objects", [[], [[20, 30, 90, 100]]])
    def test_losses_are_finite_and_connected(self, hard, proposals, objects):
        heads = heads_of(2, options=SamplingOptions(hard=hard, num_regions=8))
        features = {"res5": torch.randn(1, 4, 8, 8)}
        with EventStorage():
            _, losses = heads(
                None,
                features,
                [proposals_of(proposals)],
                [objects_of(objects, [1] * len(objects))],
            )
        assert sorted(losses) == ["loss_box_reg", "loss_cls", "loss_mask"]
        assert all(torch.isfinite(value) for value in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
        if not objects:
            assert not losses["loss_mask"].any()
            assert not losses["loss_box_reg"].any()

    def test_no_proposals_in_inference(self):
        heads = heads_of(2).eval()
        with torch.no_grad():
            found, _ = heads(None, {"res5": torch.randn(1, 4, 8, 8)}, [proposals_of([])])
        assert len(found[0]) == 0
        assert found[0].candidate_masks.shape == (0, 21, 21)
        assert found[0].candidate_scores.shape == (0, 2)


def test_acceptance_check_17_a_batch_is_the_mean_of_its_images():
    options = SamplingOptions(num_regions=6)
    heads = heads_of(2, options=options)
    features = torch.randn(2, 4, 8, 8)
    proposals = [
        proposals_of([[0, 0, 30, 40], [60, 60, 100, 90], [25, 30, 80, 90]]),
        proposals_of([[x, 10, x + 50, 60] for x in range(9)]),
    ]
    targets = [objects_of([[20, 30, 90, 100]], [1]), objects_of([[5, 10, 50, 60]], [0])]
    with EventStorage():
        _, together = heads(None, {"res5": features}, proposals, targets)
        alone = [
            heads(None, {"res5": features[i : i + 1]}, [proposals[i]], [targets[i]])[1]
            for i in range(2)
        ]
    for name, value in together.items():
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(value, mean)


def test_initial_values_and_rate():
    heads = heads_of(2, channels=64, head_lr_factor=3.0)
    for layer in (heads.conv_new, heads.cls_seg, heads.bbox):
        assert isinstance(layer, nn.Conv2d)
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert not layer.bias.any()
    assert heads.conv_new.lr_factor == 3.0
    assert heads.cls_seg.out_channels == 3 * 2 * 49
    assert heads.bbox.out_channels == 4 * 49


def test_autocast_leaves_pooling_in_float32():
    heads = heads_of(2).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = heads(None, {"res5": torch.randn(1, 4, 8, 8)}, [proposals_of([[0, 0, 90, 90]])])
    for value in (found[0].candidate_masks, found[0].candidate_scores):
        assert value.dtype == torch.float32
    assert isinstance(found[0], Instances)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FCIS.POOLED_SIZE", 20], r"POOLED_SIZE 20 must be a multiple of .*GROUP_SIZE 7"),
        (["MODEL.FCIS.LOSS_WEIGHT", [1.0, 1.0]], r"LOSS_WEIGHT needs three numbers"),
        (["MODEL.FCIS.HEAD_DIM", 0], r"MODEL\.FCIS\.HEAD_DIM must be in \[1, inf\), not 0"),
        (["MODEL.FCIS.HEAD_LR_MULT", -1.0], r"MODEL\.FCIS\.HEAD_LR_MULT must be in \[0, inf\)"),
        (["MODEL.FCIS.FG_FRACTION", 2.0], r"MODEL\.FCIS\.FG_FRACTION must be in \[0, 1\], not 2"),
        (["MODEL.FCIS.MIN_DROP_SIZE", -2.0], r"MODEL\.FCIS\.MIN_DROP_SIZE must be in \[0, inf\)"),
        (["MODEL.FCIS.BINARY_THRESH", 1.0], r"MODEL\.FCIS\.BINARY_THRESH must be in \(0, 1\)"),
        (["MODEL.FCIS.ITER", 0], r"MODEL.FCIS.ITER must be at least 1, not 0"),
        (["MODEL.FCIS.BBOX_STDS", [0.1, 0.1, 0.2, 0.0]], r"BBOX_STDS must be four positive"),
        (["MODEL.FCIS.BG_IOU", [0.5, 0.1]], r"BG_IOU must be two rising numbers from 0 to .* 0.5"),
        (["MODEL.FCIS.BG_IOU", [0.1, 0.6]], r"BG_IOU must be two rising numbers from 0 to .* 0.5"),
        (["MODEL.FCIS.OHEM_ROIS", 0], r"MODEL.FCIS.OHEM_ROIS must be positive"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["res4", "res5"]], r"IN_FEATURES of FCIS is one name"),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5]], r"FCIS needs one number in .*IOU_THRESH"),
    ],
)
def test_settings_that_make_no_sense(opts, message):
    cfg = config(*opts)
    shape = {name: ShapeSpec(channels=8, stride=16) for name in ("res4", "res5")}
    with pytest.raises(ValueError, match=message):
        FCISROIHeads(cfg, shape)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.FCIS.VOTE_NMS", 1.0, r"MODEL\.FCIS\.VOTE_NMS must be in \[0, 1\), not 1\.0"),
        ("MODEL.FCIS.VOTE_IOU", 1.5, r"MODEL\.FCIS\.VOTE_IOU must be in \[0, 1\), not 1\.5"),
        ("TEST.DETECTIONS_PER_IMAGE", 0, r"TEST\.DETECTIONS_PER_IMAGE must be positive, not 0"),
        ("TEST.AUG.ENABLED", True, r"FCISRCNN has no test-time augm.* TEST\.AUG\.ENABLED"),
    ],
)
def test_settings_of_the_vote_that_make_no_sense(key, value, message):
    with pytest.raises(ValueError, match=message):
        FCISRCNN.from_config(config(key, value))
