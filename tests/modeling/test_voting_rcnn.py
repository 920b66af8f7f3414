"""Two-stage models with voted masks: scaling, voting and output of whatever the heads return."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from torch import nn

import instseg_ext
from instseg_ext.layers.mask_voting import VotingRule, vote_masks
from instseg_ext.modeling.runtime import RuntimeOptions
from instseg_ext.modeling.voting_rcnn import VotingRCNN, original_boxes
from instseg_ext.structures.rle import decode_masks


class Pyramid(nn.Module):
    """A backbone of one layer."""

    size_divisibility, padding_constraints = 0, {}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        return {"only": self.conv(images)}


class Proposals(nn.Module):
    def forward(self, images, features, targets=None):
        return [Instances(size) for size in images.image_sizes], {}


class Heads(nn.Module):
    """Returns the same candidates for every image."""

    def __init__(self, boxes, masks, scores):
        super().__init__()
        self.candidates = boxes, masks, scores

    def forward(self, images, features, proposals, targets=None):
        boxes, masks, scores = self.candidates
        fields = {"candidate_masks": masks, "candidate_scores": scores}
        return [
            Instances(p.image_size, candidate_boxes=Boxes(boxes), **fields) for p in proposals
        ], {}


def candidates(num=12, classes=3, extent=60.0):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(num, 2, generator=generator) * extent * 0.7
    side = extent * (0.1 + 0.3 * torch.rand(num, 2, generator=generator))
    masks = torch.rand(num, 21, 21, generator=generator)
    scores = torch.rand(num, classes + 1, generator=generator).mul(4).softmax(dim=1)
    return torch.cat([corner, corner + side], dim=1), masks, scores[:, :classes]


def model(found, **options):
    runtime = options.pop("runtime", None)
    return VotingRCNN(
        backbone=Pyramid(),
        proposal_generator=Proposals(),
        roi_heads=Heads(*found),
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
        runtime=runtime,
        **options,
    ).eval()


def image(height=60, width=80, original=(90, 120)):
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    return {"image": pixels, "height": original[0], "width": original[1]}


@torch.no_grad()
def detect(net, *images):
    return [result["instances"] for result in net([*images])]


@pytest.mark.parametrize("rule", [VotingRule.mnc(), VotingRule.fcis(), None])
def test_candidates_are_voted_on_in_the_original_image(rule):
    found = candidates()
    before = [tensor.clone() for tensor in found]
    # Two sizes in a batch, one of them the size of the network input.
    first, second = detect(model(found, voting=rule), image(), image(original=(60, 80)))
    for result, size in ((first, (90, 120)), (second, (60, 80))):
        boxes = (found[0] * (size[0] / 60)).clamp(min=0)
        boxes[:, 0::2].clamp_(max=size[1])
        boxes[:, 1::2].clamp_(max=size[0])
        wanted = vote_masks(boxes, *found[1:], size, rule or VotingRule.own_masks())
        assert result.image_size == size
        assert len(result) == len(wanted.scores) > 0
        torch.testing.assert_close(result.pred_boxes.tensor, wanted.boxes)
        assert torch.equal(result.scores, wanted.scores)
        assert torch.equal(result.pred_classes, wanted.classes)
        assert torch.equal(result.pred_masks, wanted.masks)
        assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    assert all(map(torch.equal, found, before))


def test_run_lengths_on_demand():
    found = candidates()
    plain = detect(model(found, voting=VotingRule.mnc()), image())[0]
    options = RuntimeOptions(mask_output="rle", mask_budget_mb=1)
    coded = detect(model(found, voting=VotingRule.mnc(), runtime=options), image())[0]
    assert not coded.has("pred_masks")
    assert np.array_equal(decode_masks(coded.pred_masks_rle), plain.pred_masks.numpy())
    # The list follows an index, as all fields do.
    assert len(coded[coded.scores > coded.scores[2]].pred_masks_rle) == 2


def test_no_candidates_and_candidates_beside_the_image():
    empty = [tensor[:0] for tensor in candidates()]
    beside = candidates()
    beside[0][:] = torch.tensor([100.0, 5, 120, 20])
    for found in (empty, beside):
        result = detect(model(found, voting=VotingRule.fcis()), image())[0]
        assert len(result) == 0
        assert result.pred_masks.shape == (0, 90, 120)
        assert result.pred_masks.dtype == torch.bool
        assert result.pred_boxes.tensor.shape == (0, 4)


def test_without_postprocessing_the_candidates_come_back():
    found = candidates()
    with torch.no_grad():
        result = model(found).inference([image()], do_postprocess=False)[0]
    assert result.image_size == (60, 80)
    assert torch.equal(result.candidate_boxes.tensor, found[0])
    assert torch.equal(result.candidate_scores, found[2])


def test_given_boxes_are_refused():
    given = [Instances((60, 80), pred_boxes=Boxes(torch.zeros(0, 4)))]
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED"):
        model(candidates()).inference([image()], given)


def test_legacy_boxes_are_scaled_and_clipped_by_their_last_pixels():
    boxes = torch.tensor([[16.0, 8, 32, 41], [-5.0, -9, 900, 700], [950.0, 5, 990, 20]])
    # 375 x 500 became 600 x 800, and the limit was not reached.
    found = original_boxes(boxes, (600, 800), (375, 500), legacy_max_size=1000)
    first, last = boxes[:, :2] / 1.6, (boxes[:, 2:] - 1) / 1.6
    limit = torch.tensor([499.0, 374.0])
    wanted = torch.cat([first, last + 1], dim=1)
    wanted[:, :2] = torch.minimum(first.clamp(min=0), limit)
    wanted[:, 2:] = torch.minimum(last.clamp(min=0), limit) + 1
    torch.testing.assert_close(found, wanted)
    plain = original_boxes(boxes, (600, 800), (375, 500))
    torch.testing.assert_close(plain[0], boxes[0] / 1.6)
    assert plain[1].tolist() == [0, 0, 500, 375]
    # 333 x 500 became 666 x 1000: the longer side, which reached the limit, tells the factor.
    longer = original_boxes(boxes[:1], (667, 1000), (333, 500), legacy_max_size=1000)
    torch.testing.assert_close(longer[0, :2], boxes[0, :2] / 2)


def test_legacy_boxes_refuse_stretched_images():
    with pytest.raises(ValueError, match=r"INSTSEG\.STRETCH"):
        model(candidates(), legacy_boxes=True, stretch_size=(32, 32))


def test_the_config_tells_the_size_limit():
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True, "INPUT.MAX_SIZE_TEST", 777])
    cfg.merge_from_list(["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4])
    cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 8])
    assert VotingRCNN(cfg).max_size == 777


MEMORY = """
import resource, sys, torch
from instseg_ext.layers.mask_voting import VotingRule, vote_masks

def peak_kb():
    # pages of the libraries count as resident too, and come and go with the machine's file cache
    with open("/proc/self/status") as status:
        files = [int(line.split()[1]) for line in status if line.startswith("RssFile")]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - files[0]

def vote(num, size, budget_mb):
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(4, 2, generator=generator) * 0.1
    boxes = torch.cat([low, 1 - low], dim=1) * torch.tensor([size[1], size[0]]).repeat(2)
    # one detection of each class, with all candidates as voters
    scores = torch.rand(4, num, generator=generator) + 0.1
    masks = torch.rand(4, 21, 21, generator=generator)
    return vote_masks(boxes, masks, scores, size, rule, budget_mb, output="rle")

rule = getattr(VotingRule, sys.argv[1])(reencode=len(sys.argv) > 5)
num, scale, budget_mb = map(int, sys.argv[2:5])
vote(4, (40, 50), 1)
before = peak_kb()
found = vote(num, (4 * scale, 5 * scale), budget_mb)
assert len(found.masks) == num
sys.stdout.write(f"rise_mb={(peak_kb() - before) / 1024:.1f}")
"""


def rise_mb(*args):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("rise_mb=")[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_masks_of_large_images_are_made_under_the_budget():
    # Twelve masks of 2400 x 3000 are 86 MB of bool, and 345 MB of floats.
    assert rise_mb("fcis", 12, 600, 32) < 60


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rule", "num", "more"), [("mnc", 100, ()), ("fcis", 100, ()), ("mnc", 20, ("reencode",))]
)
def test_many_detections_at_5000x4000(rule, num, more):
    assert rise_mb(rule, num, 1000, 256, *more) < 400
