"""The meta-architecture: from ground truth to losses, from raw outputs to masks of any size."""

import math

import pytest
import torch
from contract.cases import TINY_RESNET, blobs
from detectron2.modeling import build_model
from detectron2.structures import ImageList

import instseg_ext
from instseg_ext.evaluation.coco import instances_to_results
from instseg_ext.methods.polarmask import arch
from instseg_ext.methods.polarmask.head import PolarMaskOutputs
from instseg_ext.structures.contours import trace_contours

TINY = (
    *TINY_RESNET,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.FPN.NORM", "",
    "MODEL.POLARMASK.WIDTH", 16,
    "MODEL.POLARMASK.NORM", "",
    "MODEL.POLARMASK.NUM_CONVS", 1,
    # The authors' rules, where the recipe for nuclei has others.
    "MODEL.POLARMASK.COORDINATES", "indices",
)  # fmt: skip
NODE = "MODEL.POLARMASK."
FCOS = (
    NODE + "WITH_MASK", False,
    NODE + "CENTERNESS", "fcos",
    NODE + "CENTERNESS_BIAS", 0.0,
    NODE + "CENTER", "none",
)  # fmt: skip
SIZES = ((8, 8), (4, 4), (2, 2))
OBJECTS = [
    blobs(64, 64, [(5, 6, 40, 50), (30, 30, 60, 62)]),
    blobs(64, 64, [(10, 20, 50, 40)]),
]


def make(*opts):
    torch.manual_seed(0)
    return build_model(
        instseg_ext.get_config("PolarMask/nuclei_polarmask_R_18_FPN", [*TINY, *opts])
    )


@pytest.fixture(scope="module")
def model():
    return make()


def raw_of(objects, num_rays=36, num_classes=1):
    """Return raw outputs of one 64 x 64 image: (location, prob, centerness, sides, length)."""
    count = sum(h * w for h, w in SIZES)
    logits = torch.full((1, count, num_classes), -20.0)
    ctr = torch.full((1, count), -20.0)
    boxes, rays = torch.zeros(1, count, 4), torch.zeros(1, count, num_rays)
    for location, prob, centerness, sides, length in objects:
        logits[0, location, 0] = math.log(prob / (1 - prob))
        ctr[0, location] = math.log(centerness / (1 - centerness))
        boxes[0, location] = torch.tensor(sides).log()
        rays[0, location] = torch.as_tensor(length).log()
    return PolarMaskOutputs(logits, ctr, boxes, rays, SIZES)


def infer(model, raw, height, width):
    images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    return model.eval().inference(raw, images, [{"height": height, "width": width}])[0]


# --- inference ------------------------------------------------------------------------------------


def test_polygon_and_mask_come_out_at_unequal_scales(model):
    """Check 13: location 27 is (28, 28) in the input, (42, 14) in a result of 32 x 96."""
    found = infer(model, raw_of([(27, 0.9, 0.5, [8.0] * 4, 8.0)]), 32, 96)
    polygon = found.pred_polygons[0]
    torch.testing.assert_close(polygon[0], torch.tensor([42.0, 18]), atol=1e-4, rtol=0)
    torch.testing.assert_close(polygon[9], torch.tensor([54.0, 14]), atol=1e-4, rtol=0)
    ys, xs = found.pred_masks[0].nonzero().unbind(1)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (30, 54, 10, 18)
    # Reaching over the last pixel.
    expected = torch.tensor([[30.0, 10, 55, 19]])
    torch.testing.assert_close(found.pred_boxes.tensor, expected, atol=1e-4, rtol=0)


def test_a_disk_is_drawn_as_it_is_decoded(model):
    """Check 2: a disk around its centre, seen from there."""
    ys, xs = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    masks = (xs - 28) ** 2 + (ys - 28) ** 2 <= 26**2
    found = infer(model, raw_of([(27, 0.9, 0.5, [26.0] * 4, 26.0)]), 64, 64)
    got = found.pred_masks[0]
    assert (got & masks).sum() / (got | masks).sum() > 0.95


def test_no_mask_is_empty(model):
    """Check 13: rays of no length, and a polygon pressed against the left border."""
    to_the_left = torch.where(torch.arange(36) > 18, 1000.0, 1e-3)
    raw = raw_of([(27, 0.9, 0.5, [8.0] * 4, 1e-6), (0, 0.8, 0.5, [4.0] * 4, to_the_left)])
    found = infer(model, raw, 64, 64)
    # Tips just left of and above a pixel's centre are cut down to the pixel before.
    assert found.pred_masks[0, 28, 28]
    assert found.pred_masks[0].sum() <= 4
    assert found.pred_masks[1, :, 0].sum() > 1


@pytest.mark.parametrize("side", [48, 64, 96])
def test_areas_draw_the_disk_where_it_is(side):
    """The authors' rule moves a mask towards the upper left corner, at the same size, too."""
    scale = side / 64
    # The middle of pixel 28 of the input, whose border pixels end half a pixel behind the tips.
    centre, radius = 28.5 * scale - 0.5, 20.5 * scale
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wanted = (xs - centre) ** 2 + (ys - centre) ** 2 <= radius**2
    overlap = {}
    for coordinates in ("indices", "areas"):
        model = make(NODE + "COORDINATES", coordinates)
        raw = raw_of([(27, 0.9, 0.5, [20.0] * 4, 20.0)])
        got = infer(model, raw, side, side).pred_masks[0]
        overlap[coordinates] = (got & wanted).sum() / (got | wanted).sum()
    assert overlap["areas"] > 0.975
    assert overlap["areas"] > overlap["indices"] + 0.02


def test_run_lengths_are_those_of_the_masks():
    objects = [(27, 0.9, 0.5, [8.0] * 4, 8.0), (70, 0.8, 0.5, [20.0] * 4, 25.0)]
    masks = infer(make(), raw_of(objects), 100, 80)
    rles = infer(make("INSTSEG.MASK_OUTPUT", "rle"), raw_of(objects), 100, 80)
    assert not rles.has("pred_masks")
    decoded = torch.stack([torch.from_numpy(decode(rle)) for rle in rles.pred_masks_rle])
    assert torch.equal(decoded.bool(), masks.pred_masks)


def decode(rle):
    from pycocotools import mask as coco_mask

    return coco_mask.decode(rle)


def test_two_classes_are_evaluated():
    """Check 15: the authors' evaluation takes the results of two classes for something else."""
    model = make(NODE + "NUM_CLASSES", 2, "INSTSEG.MASK_OUTPUT", "rle")
    raw = raw_of([(27, 0.9, 0.5, [8.0] * 4, 8.0), (70, 0.8, 0.5, [20.0] * 4, 25.0)], num_classes=2)
    raw.class_logits[0, 70] = raw.class_logits[0, 70].flip(0)
    results = instances_to_results(infer(model, raw, 64, 64), 5, [1, 2])
    assert [result["category_id"] for result in results] == [1, 2]
    assert all(decode(result["segmentation"]).any() for result in results)


def test_without_rays_there_are_boxes_only():
    model = make(*FCOS)
    raw = raw_of([(27, 0.9, 0.5, [8.0] * 4, 8.0)])._replace(ray_logs=None)
    found = infer(model, raw, 64, 64)
    assert sorted(found.get_fields()) == ["pred_boxes", "pred_classes", "scores"]
    torch.testing.assert_close(found.scores, torch.tensor([0.45]))
    assert found.pred_boxes.tensor.tolist() == [[20.0, 20.0, 37.0, 37.0]]


# --- training -------------------------------------------------------------------------------------


def test_contours_of_the_loader_and_traced_ones_are_the_same(model):
    traced = []
    for sample in OBJECTS:
        gt = sample["instances"][:]
        gt.gt_contours, gt.gt_centers, _ = trace_contours(gt.gt_masks.tensor)
        gt.remove("gt_masks")
        traced.append({**sample, "instances": gt})
    model.train()
    for name, loss in model(OBJECTS).items():
        torch.testing.assert_close(model(traced)[name], loss, msg=name)


def test_an_object_without_a_pixel_is_left_out(model):
    sample = blobs(64, 64, [(5, 6, 40, 50), (9, 9, 9, 9)])
    other = blobs(64, 64, [(5, 6, 40, 50)])
    model.train()
    for name, loss in model([sample]).items():
        torch.testing.assert_close(model([other])[name], loss, msg=name)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        (NODE + "CENTERNESS", "none"),
        (NODE + "CENTERNESS", "fcos", NODE + "RAY_ORIGIN", "left"),
        (NODE + "MASK_LOSS", "smooth_l1", NODE + "CENTER", "box"),
        (NODE + "CENTERNESS", "soft", NODE + "WITH_BOX", False, NODE + "NMS_ON", "mask"),
        (NODE + "NUM_RAYS", 72, NODE + "RAY_TARGET", "bins"),
        (NODE + "NUM_RAYS", 18),
        FCOS,
    ],
    ids=lambda opts: " ".join(str(o).removeprefix(NODE) for o in opts) or "default",
)
def test_every_kind_trains_every_parameter(opts):
    model = make(*opts, NODE + "NUM_CLASSES", 2).train()
    for batch in (OBJECTS, [blobs(64, 64, [])]):
        model.zero_grad()
        losses = model(batch)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        missing = [n for n, p in model.head.named_parameters() if p.grad is None]
        assert not missing
    with torch.no_grad():
        model.eval()(OBJECTS)


def test_the_class_loss_is_divided_by_positives_and_images(model):
    model.train()
    images = model.preprocess_image(OBJECTS)
    raw = model.head(model.backbone(images.tensor))
    gts = [sample["instances"] for sample in OBJECTS]
    targets = model.targets(raw, images, gts)
    positive = targets.labels < 1
    assert positive.sum() == len(targets.positives.index) > 0
    prob = raw.class_logits.sigmoid()[..., 0]
    wrong = torch.where(positive, 1 - prob, prob)
    alpha = torch.where(positive, 0.25, 0.75)
    expected = -(alpha * wrong**2 * (1 - wrong).log()).sum() / (positive.sum() + 2)
    torch.testing.assert_close(model.losses(raw, images, gts)["loss_cls"], expected)


def test_one_positive_location_in_two_processes(monkeypatch):
    """Under a global normaliser it counts fully, wherever it is; the other process has none."""

    def mean(sums):
        return (sums + torch.tensor([1.0, 0.0, 0.0])) / 2

    monkeypatch.setattr(arch, "mean_over_processes", mean)
    monkeypatch.setattr(arch.comm, "get_world_size", lambda: 2)
    model = make("INSTSEG.LOSS_NORMALIZER", "global")
    divisors = model._normalizers(torch.tensor([0.25]), num_images=1)
    assert [float(x) for x in divisors] == [1.5, 0.125, 0.5]
    divisors = make()._normalizers(torch.tensor([0.25]), num_images=1)
    assert [float(x) for x in divisors] == [2.0, 0.25, 1.0]


def test_lengths_at_the_start():
    model = make(NODE + "INIT_LENGTH", 16.0).eval()
    images = model.preprocess_image(OBJECTS)
    with torch.no_grad():
        raw = model.head(model.backbone(images.tensor))
    for logs in (raw.box_logs, raw.ray_logs):
        assert logs.exp().mean() == pytest.approx(16, rel=0.1)


def test_weights_multiply_the_losses():
    keys = ("CLS", "BOX", "MASK", "CENTERNESS")
    opts = [x for n, key in enumerate(keys) for x in (f"{NODE}LOSS_WEIGHT_{key}", n + 2.0)]
    plain, weighted = make().train()(OBJECTS), make(*opts).train()(OBJECTS)
    for n, key in enumerate(keys):
        name = f"loss_{key.lower()}"
        torch.testing.assert_close(weighted[name], plain[name] * (n + 2))


def test_extreme_logarithms_stay_finite(model):
    """Check 15: logarithms of +-20, also when the head computes in bfloat16."""
    count = sum(h * w for h, w in SIZES)
    gts = [sample["instances"] for sample in OBJECTS]
    for dtype in (torch.float32, torch.bfloat16):
        for value in (20.0, -20.0):
            logs = torch.full((2, count, 36), value, dtype=dtype, requires_grad=True)
            raw = PolarMaskOutputs(
                torch.zeros(2, count, 1),
                torch.zeros(2, count),
                torch.zeros(2, count, 4),
                logs,
                SIZES,
            )
            losses = model.losses(raw, None, gts)
            losses["loss_mask"].backward()
            assert losses["loss_mask"].isfinite()
            assert logs.grad.isfinite().all()


def test_all_centerness_zero_is_finite(model, monkeypatch):
    """Check 9: a ray of length zero makes a polar centerness of zero."""
    gt = blobs(64, 64, [(5, 6, 40, 50)])["instances"]
    raw = raw_of([])
    targets = model.targets(raw, None, [gt])
    assert targets.rays.min() > 0
    zero = targets._replace(centerness=torch.zeros_like(targets.centerness))
    monkeypatch.setattr(model, "targets", lambda *arguments: zero)
    losses = model.losses(raw, None, [gt])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (("WITH_BOX", False), "NMS_ON mask"),
        (("WITH_MASK", False), "CENTERNESS polar"),
        (("WITH_MASK", False, "CENTERNESS", "fcos", "NMS_ON", "mask"), "NMS_ON box"),
        (("NUM_RAYS", 35), "NUM_RAYS"),
        (("NUM_RAYS", 18, "CENTERNESS", "soft"), "divisible by 4"),
        (("NUM_RAYS", 18, "RAY_ORIGIN", "left"), "divisible by 4"),
        (("SIZE_RANGES", [64.0, 32.0]), "SIZE_RANGES"),
        (("SIZE_RANGES", [64.0]), "SIZE_RANGES"),
        (("CENTER", "middle"), "CENTER"),
        (("RAY_TARGET", "nearest"), "RAY_TARGET"),
        (("RAY_ORIGIN", "up"), "RAY_ORIGIN"),
        (("CENTERNESS", "iou"), "CENTERNESS"),
        (("MASK_LOSS", "l2"), "MASK_LOSS"),
        (("NMS_ON", "rays"), "NMS_ON"),
        (("COORDINATES", "pixels"), "COORDINATES"),
        (("INIT_LENGTH", 0.0), "INIT_LENGTH"),
    ],
)
def test_settings_that_do_not_fit_name_their_key(opts, words):
    named = [NODE + x if n % 2 == 0 else x for n, x in enumerate(opts)]
    with pytest.raises(ValueError, match=words):
        make(*named)
