"""From planted embeddings and classes to masks."""

import math

import numpy as np
import pytest
import torch
from methods.metric_learning.metric_toys import boxes, planted
from pycocotools import mask as coco_mask

from instseg_ext.methods.metric_learning.inference import InferenceOptions, detect, to_instances
from instseg_ext.methods.metric_learning.masks import MaskOptions, greedy_keep, keep_parts
from instseg_ext.methods.metric_learning.seeds import SeedRule
from instseg_ext.methods.metric_learning.similarity import radii, radius

TAUS = (0.25, 0.5, 0.75, 0.9)
# Three objects on 12 x 16 cells: two apart, one in two parts.
MASKS = boxes((12, 16), (1, 1, 6, 6), (8, 1, 14, 7), (1, 8, 5, 12))
MASKS[2, 8:12, 9:14] = True
LABELS = torch.where(MASKS.any(dim=0), MASKS.to(torch.uint8).argmax(dim=0), 3)
CLASSES = [2, 0, 2]
SURE = 8.0


def outputs(labels=LABELS, classes=CLASSES, num_classes=3, tau=1):
    """Return embeddings and logits of cells that know their object and its class."""
    height, width = labels.shape
    points = planted(labels, len(classes)).T.unflatten(1, (height, width))
    logits = torch.zeros(len(TAUS), num_classes + 1, height, width)
    kinds = torch.tensor([*classes, num_classes])[labels]
    logits.scatter_(1, kinds.expand(len(TAUS), 1, height, width), SURE)
    logits[tau] *= 1.5
    return points, logits


def found_of(given=None, **options):
    masks = {key: options.pop(key) for key in list(options) if key in MaskOptions.__annotations__}
    points, logits = outputs() if given is None else given
    return detect(
        points,
        logits,
        radii=radii(TAUS),
        options=InferenceOptions(masks=MaskOptions(**masks), seed_min=0.5, **options),
    )


def binary(found):
    return found.maps(slice(None)) > 0.5


def test_acceptance_check_6_planted_objects_come_back():
    found = found_of()
    order = [MASKS[:, y, x].nonzero()[0, 0].item() for y, x in cells(found.seeds)]
    assert sorted(order) == [0, 1, 2]
    assert torch.equal(binary(found), MASKS[order])
    assert found.classes.tolist() == [CLASSES[i] for i in order]
    expected = math.exp(SURE * 1.5) / (math.exp(SURE * 1.5) + 3)
    assert found.scores.tolist() == pytest.approx([expected] * 3)


def cells(seeds):
    return [divmod(seed, LABELS.shape[1]) for seed in seeds.tolist()]


def test_acceptance_check_6_without_suppression_every_seed_has_its_mask():
    found = found_of(mask_nms=1.0, seeds=SeedRule(num_seeds=30))
    assert len(found.scores) == 30
    # The first three are of different objects.
    firsts = {LABELS.flatten()[seed].item() for seed in found.seeds[:3].tolist()}
    assert firsts == {0, 1, 2}


def test_masks_reach_as_far_as_the_similarity_of_their_seed():
    """Cells on a line of embeddings: a seed with tau .9 takes fewer than one with .25."""
    for index, tau in enumerate(TAUS):
        line = torch.arange(40.0) * 0.1
        logits = torch.zeros(len(TAUS), 2, 1, 40)
        logits[index, 0, 0, 0] = SURE
        found = found_of((line.view(1, 1, 40), logits), min_cells=1, parts="all")
        keep = found.seeds == 0
        assert keep.sum() == 1
        mask = binary(found)[keep][0, 0]
        assert mask.tolist() == (line.square() <= radius(tau)).tolist()


def test_small_masks_are_dropped():
    assert len(found_of(min_cells=26).scores) == 2
    assert len(found_of(min_cells=37).scores) == 0


def test_best_detections_are_kept():
    points, logits = outputs()
    logits[1, 2, MASKS[2]] += 1
    found = found_of((points, logits), max_detections=1)
    assert torch.equal(binary(found)[0], MASKS[2])


def test_equal_masks_of_different_classes_both_stay():
    points, logits = outputs()
    logits[1, 2, 1:6, 1:3], logits[1, 1, 1:6, 1:3] = 0, 20
    found = found_of((points, logits))
    on_first = [binary(found)[i, 1, 1].item() for i in range(len(found.scores))]
    assert sorted(found.classes[torch.tensor(on_first)].tolist()) == [1, 2]


@pytest.mark.parametrize("parts", ["seed", "largest"])
def test_one_part_of_a_mask(parts):
    found = found_of(parts=parts)
    sizes = sorted(binary(found).sum(dim=(1, 2)).tolist())
    # 4 x 4 and 5 x 4 cells: either part of the third object has seeds.
    assert sizes == ([16, 20, 25, 36] if parts == "seed" else [20, 25, 36])


def test_keep_parts_on_the_device_of_the_masks():
    masks = boxes((4, 9), (0, 0, 2, 2), (0, 0, 9, 4))
    masks[0, 3, 5:9] = True
    masks[0, 2, 2] = True
    seeds = torch.tensor([3 * 9 + 5, 0])
    assert keep_parts(masks.flatten(1), seeds, (4, 9), "seed").sum(dim=1).tolist() == [4, 36]
    # The corner belongs to the square.
    assert keep_parts(masks.flatten(1), seeds, (4, 9), "largest").sum(dim=1).tolist() == [5, 36]
    nothing = torch.zeros(1, 36, dtype=torch.bool)
    for which in ("seed", "largest"):
        assert not keep_parts(nothing, seeds[:1], (4, 9), which).any()


def test_greedy_suppression():
    ious = torch.tensor([[1, 0.6, 0.2], [0.6, 1, 0.7], [0.2, 0.7, 1]])
    assert greedy_keep(ious, 0.5) == [0, 2]
    assert greedy_keep(ious, 0.65) == [0, 1]
    assert greedy_keep(ious, 1.0) == [0, 1, 2]


def test_merged_masks_are_averages_by_scores():
    """Two seeds on a line whose masks overlap by more than .4: both count in the better one's."""
    line = torch.linspace(0, 3, 31).view(1, 1, 31)
    logits = torch.zeros(len(TAUS), 2, 1, 31)
    logits[:, 1] = SURE
    logits[0, :, 0, 10] = torch.tensor([SURE, 0])
    logits[0, :, 0, 16] = torch.tensor([1.0, 0])
    plain = found_of((line, logits), min_cells=1, mask_nms=1.0)
    first, second = binary(plain)[:, 0].float()
    merged = found_of((line, logits), min_cells=1, mask_nms=0.2, merge=True)
    weights = plain.scores / plain.scores.sum()
    average = weights[0] * first + weights[1] * second
    assert len(merged.scores) == 1
    assert torch.equal(binary(merged)[0, 0], average > 0.2)
    assert (binary(merged)[0, 0].float() > first).any()


def test_no_cell_is_sure_enough():
    points, logits = outputs()
    found = found_of((points, torch.zeros_like(logits)))
    assert len(found.scores) == 0
    assert found.maps(slice(None)).shape == (0, 12, 16)


def test_embeddings_that_are_not_finite_give_no_seed():
    points, logits = outputs()
    points[0, 1, 1] = torch.nan
    found = found_of((points, logits))
    assert LABELS.shape[1] + 1 not in found.seeds.tolist()
    assert len(found.scores) == 3


def test_working_memory_does_not_change_the_result():
    points, logits = outputs()
    options = InferenceOptions(masks=MaskOptions(mask_nms=1.0), seed_min=0.5)
    results = [
        detect(points, logits, radii=radii(TAUS), options=options, budget_mb=budget)
        for budget in (256, 1e-3)
    ]
    assert torch.equal(*(found.seeds for found in results))
    assert torch.equal(*(binary(found) for found in results))


def sized(found, output="bool", nearest=False, output_hw=(93, 117), budget_mb=256):
    return to_instances(
        found,
        stride=8,
        size_hw=(12, 16),
        input_hw=(93, 124),
        output_hw=output_hw,
        nearest=nearest,
        budget_mb=budget_mb,
        output=output,
    )


def test_similarities_are_resized_then_compared():
    found = found_of(upsample="similarity")
    result = sized(found, output_hw=(93, 124))
    points, _ = outputs()
    for row, seed in enumerate(found.seeds.tolist()):
        distances = (points.flatten(1)[:, seed, None] - points.flatten(1)).square().sum(dim=0)
        sigma = (2 / (1 + distances.exp())).view(1, 1, 12, 16)
        size = (96, 128)
        large = torch.nn.functional.interpolate(sigma, size, mode="bilinear", align_corners=False)
        expected = large[0, 0, :93, :124] >= 0.5
        assert (result.pred_masks[row] != expected).sum() == 0
    assert result.pred_boxes.tensor.shape == (3, 4)


@pytest.mark.parametrize("tau", range(4))
def test_centred_borders_are_halfway_whatever_tau_is(tau):
    """The object of 5 x 5 cells of 8 pixels; compared as they are, similarities grow or shrink."""
    wide = {}
    for upsample in ("centred", "similarity"):
        found = found_of(outputs(tau=tau), upsample=upsample)
        first = (sized(found, output_hw=(93, 124)).pred_boxes.tensor[:, :2] < 12).all(dim=1)
        box = sized(found, output_hw=(93, 124)).pred_boxes.tensor[first][0]
        wide[upsample] = (box[2] - box[0]).item()
    assert wide["centred"] == 40
    assert wide["similarity"] == [44, 40, 36, 34][tau]


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("budget_mb", [256, 1e-3])
def test_run_lengths_are_those_of_the_masks(nearest, budget_mb):
    found = found_of()
    masks = sized(found, nearest=nearest)
    rles = sized(found, "rle", nearest=nearest, budget_mb=budget_mb)
    decoded = np.stack([coco_mask.decode(rle) for rle in rles.pred_masks_rle]).astype(bool)
    assert np.array_equal(decoded, masks.pred_masks.numpy())
    assert torch.equal(rles.pred_boxes.tensor, masks.pred_boxes.tensor)


def test_legacy_masks_are_cells():
    found = found_of()
    result = sized(found, nearest=True, output_hw=(93, 124))
    whole = binary(found).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, :93, :124]
    assert torch.equal(result.pred_masks, whole)
    half = sized(found, nearest=True, output_hw=(186, 248))
    assert torch.equal(half.pred_masks[:, ::2, ::2], result.pred_masks)
