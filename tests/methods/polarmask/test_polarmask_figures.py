"""``instseg visualize rays`` and ``upper-bound``: what is drawn, compared and measured."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

import instseg_ext
from instseg_ext import data
from instseg_ext.config import add_shared_config
from instseg_ext.engine.predictor import Predictor
from instseg_ext.method import FigurePicture
from instseg_ext.methods.polarmask import figures, upper_bound
from instseg_ext.methods.polarmask.config import add_polarmask_config
from instseg_ext.structures.rle import encode_masks
from instseg_ext.zoo import method_of

HW = (96, 128)
ORANGE, CYAN, WHITE = figures._PREDICTED, figures._TARGET, figures._OBJECT


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_shared_config(cfg)
    data.add_data_config(cfg)
    add_polarmask_config(cfg)
    return cfg


def disc(x, y, radius, size_hw=HW):
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def annotation(mask, category=0, crowd=0):
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return {
        "bbox": [x, y, w, h],
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": encode_masks(mask[None])[0],
        "category_id": category,
        "iscrowd": crowd,
    }


def predictor(points, lengths, size_hw=HW):
    """Make a predictor that finds the same rays in every picture."""
    points = torch.tensor(points, dtype=torch.float32).reshape(-1, 2)
    found = SimpleNamespace(
        points=points,
        distances=torch.tensor(lengths).reshape(-1, 1).repeat(1, 36),
        scores=torch.linspace(0.9, 0.5, len(points)),
        classes=torch.zeros(len(points), dtype=torch.int64),
    )
    model = SimpleNamespace(
        preprocess_image=lambda batch: SimpleNamespace(tensor=None, image_sizes=[size_hw]),
        precision=nullcontext,
        backbone=lambda tensor: tensor,
        head=lambda features: features,
        detections=lambda raw, frames: [found],
    )
    return SimpleNamespace(
        model=model, names=["disc"], to_input=lambda picture: picture, threshold=0.1
    )


def has(image, colour):
    return bool((np.abs(image.astype(int) - colour).max(axis=2) <= 3).any())


def pictures(*annotations):
    grey = np.full((*HW, 3), 100, dtype=np.uint8)
    return [FigurePicture(f"p{i}", grey, entry) for i, entry in enumerate(annotations)]


def test_rays_with_and_without_annotations(cfg, tmp_path):
    discs = [annotation(disc(40, 50, 20)), annotation(disc(96, 40, 16))]
    find = predictor([(40, 52), (44, 48), (96, 40)], [18.0, 15.0, 22.0])
    files = figures.draw_rays(cfg, lambda: find, pictures(discs, None, []), tmp_path)
    names = [f"p{i}_{kind}.png" for i in range(3) for kind in ("overview", "rays")]
    assert [file.name for file in files] == names
    compared, _, alone, *_ = (cv2.imread(str(file)) for file in files[1:])
    assert all(has(compared, colour) for colour in (ORANGE, CYAN, WHITE))
    assert has(alone, ORANGE)
    assert not has(alone, CYAN)
    # Three cells for each of two objects; one for each of three detections.
    assert compared.shape[0] == alone.shape[0]
    assert compared.shape[1] > 1.4 * alone.shape[1]


def test_the_overview_shows_polygons_where_they_are_in_the_picture(cfg, tmp_path):
    """The network input is half as high and twice as wide."""
    find = predictor([(128, 24)], [10.0], size_hw=(48, 256))
    overview, _ = figures.draw_rays(cfg, lambda: find, pictures(None), tmp_path)
    image = cv2.imread(str(overview))
    factor = image.shape[1] / HW[1]
    strip = image.shape[0] - round(HW[0] * factor)
    for x, y in ((138, 24), (118, 24), (128, 34), (128, 14)):
        column, row = (x + 0.5) / 2 * factor, (y + 0.5) * 2 * factor + strip
        window = image[round(row) - 2 : round(row) + 3, round(column) - 2 : round(column) + 3]
        # A thin line, blended with what is under it.
        assert (window[..., 2].astype(int) - window[..., 0]).max() > 100


TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.POLARMASK.WIDTH", 32,
    "MODEL.POLARMASK.SCORE_THRESH", 0.0,
    "INSTSEG.STRETCH", [64, 96],
]  # fmt: skip


def test_a_model_draws_its_rays(tmp_path):
    cfg = instseg_ext.get_config("PolarMask/nuclei_polarmask_R_18_FPN", TINY)
    find = Predictor(cfg, method_of(cfg))
    wanted = pictures([annotation(disc(40, 50, 20))], None)
    files = figures.draw_rays(cfg, lambda: find, wanted, tmp_path)
    assert len(files) == 4
    # The size of the network input as the upper bound takes it.
    images = find.model.preprocess_image([find.to_input(wanted[0].picture)])
    assert images.image_sizes[0] == upper_bound.input_size(cfg, HW)


def test_nothing_detected_leaves_the_overview(cfg, tmp_path):
    find = predictor([], [])
    files = figures.draw_rays(cfg, lambda: find, pictures([annotation(disc(40, 50, 20))]), tmp_path)
    assert [file.name for file in files] == ["p0_overview.png"]


def test_a_model_without_rays_is_refused(cfg, tmp_path):
    cfg.MODEL.POLARMASK.WITH_MASK = False
    with pytest.raises(ValueError, match="WITH_MASK is False"):
        figures.draw_rays(cfg, None, pictures(None), tmp_path)


def test_each_object_is_shown_with_its_best_detection(cfg):
    masks = torch.from_numpy(np.stack([disc(40, 50, 20), disc(96, 40, 16), disc(0, 0, 0)]))
    find = predictor([(96, 40), (44, 48), (96, 44), (40, 50)], [22.0, 15.0, 9.0, 20.0])
    found, _ = figures._predict(find, np.zeros((*HW, 3), np.uint8), cfg.MODEL.POLARMASK)
    assert figures._examples(found, masks) == [(0, 1), (1, 0)]
    assert figures._examples(found, masks[:0]) == [(i, None) for i in range(4)]
    far = torch.from_numpy(disc(120, 90, 2))[None]
    assert figures._examples(found, far) == [(i, None) for i in range(4)]


def test_the_target_is_that_of_the_location(cfg):
    node = cfg.MODEL.POLARMASK
    node.RAY_TARGET = "exact"
    objects = figures._objects([annotation(disc(40, 50, 20))], HW, HW)
    target = figures._target(torch.tensor([46.0, 50.0]), objects, 0, node, ["disc"], HW)
    assert target.label == "disc"
    # Down, right, up, left.
    expected = [(20**2 - 6**2) ** 0.5, 14, (20**2 - 6**2) ** 0.5, 26]
    assert target.lengths[::9].tolist() == pytest.approx(expected, abs=1)
    assert target.polygon[9].tolist() == pytest.approx([60, 50], abs=1)
    assert len(target.contour) > 60


def test_upper_bound_needs_no_model(cfg, tmp_path):
    cfg.INSTSEG.STRETCH = [384, 512]
    entries = [annotation(disc(40, 50, 20)), annotation(disc(96, 40, 30))]
    entries.append(annotation(disc(9, 9, 9), crowd=1))
    files = figures.draw_upper_bound(cfg, None, pictures(None, entries, []), tmp_path)
    assert [file.name for file in files] == ["upper_bound.json", "upper_bound.png"]
    summary = json.loads(files[0].read_text())
    assert (summary["objects"], summary["pictures"], summary["input"]) == (2, 1, "512 x 384")
    means = {(r["centre"], r["target"], r["rays"]): r["iou"] for r in summary["mean_mask_iou"]}
    assert len(means) == 2 * 2 * 6
    assert means["mass", "exact", 120] > means["mass", "exact", 18]
    assert means["mass", "exact", 36] > means["mass", "bins", 36] - 0.01
    assert cv2.imread(str(files[1])).shape[1] > 600


@pytest.mark.parametrize("entries", [None, [], [{"bbox": [1, 1, 5, 5], "category_id": 0}]])
def test_upper_bound_without_annotations_says_so(cfg, tmp_path, entries):
    with pytest.raises(ValueError, match="None of the 2 pictures has annotated objects"):
        figures.draw_upper_bound(cfg, None, pictures(entries, entries), tmp_path)


def test_overlaps_of_simple_objects():
    """A disc is nearly its rays; a ring loses its hole; a far part of an object is lost."""
    ring = disc(40, 50, 20) & ~disc(40, 50, 10)
    parts = disc(40, 50, 20) | disc(110, 50, 10)
    masks = np.stack([disc(40, 50, 20), ring, parts, np.zeros(HW, bool)])
    overlaps = upper_bound.ray_overlaps(torch.from_numpy(masks))
    assert overlaps.shape == (2, 2, 6, 3)
    mass, exact, most = 0, 0, -1
    full, hollow, double = overlaps[mass, exact, most].tolist()
    assert full > 0.96
    assert hollow == pytest.approx(0.75, abs=0.04)
    assert double == pytest.approx(0.8, abs=0.04)
    # The box centre of the third object lies outside its larger part.
    assert overlaps[1, exact, most, 2] < double - 0.04
    assert upper_bound.ray_overlaps(torch.zeros((0, *HW), dtype=torch.bool)).shape == (2, 2, 6, 0)


def test_upper_bound_of_real_annotations():
    """Check 16 of the facts on the bundled nuclei: the authors' bins cost, and more rays help."""
    data.register_bundled()
    entries = DatasetCatalog.get("nuclei_val")[:3]
    parts = []
    for entry in entries:
        source_hw = entry["height"], entry["width"]
        masks, _ = upper_bound.object_masks(entry["annotations"], source_hw, (256, 256))
        parts.append(upper_bound.ray_overlaps(masks))
    means = torch.cat(parts, dim=3).mean(dim=3)
    exact, bins = means[0]
    assert (exact.diff() > -0.002).all()
    assert exact[2] == pytest.approx(0.94, abs=0.02)
    assert 0.01 < exact[2] - bins[2] < 0.06


def test_rays_from_the_mass_centre_are_better_for_a_lopsided_object():
    rows, columns = np.mgrid[:96, :128]
    corner = (columns < 60) & (rows < 80) & ((columns < 28) | (rows < 28))
    overlaps = upper_bound.ray_overlaps(torch.from_numpy(corner[None]))[..., 0]
    mass, box = overlaps[:, 0]
    assert (mass > box + 0.02).all()


def test_chunks_change_nothing(monkeypatch):
    masks = torch.from_numpy(np.stack([disc(20 + 20 * i, 50, 8 + i) for i in range(5)]))
    whole = upper_bound.ray_overlaps(masks)
    monkeypatch.setattr(upper_bound, "_BUDGET_MB", 0)
    # But for vertices whose last bit decides which pixel they are cut off to.
    torch.testing.assert_close(upper_bound.ray_overlaps(masks), whole, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("stretch", "shorter", "expected"),
    [
        ([96, 160], 0, (96, 160)),
        ([96, 160], 50, (96, 160)),
        ([0, 0], 50, (50, 75)),
        ([0, 0], 70, (60, 90)),
        ([0, 0], 0, (40, 60)),
    ],
)
def test_the_size_of_the_network_input(cfg, stretch, shorter, expected):
    cfg.INSTSEG.STRETCH, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = stretch, shorter, 90
    assert upper_bound.input_size(cfg, (40, 60)) == expected


def test_objects_are_drawn_at_the_size_of_the_network_input():
    polygon = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]
    entries = [
        {"segmentation": [polygon], "category_id": 3, "iscrowd": 0},
        {"segmentation": [polygon], "category_id": 3, "iscrowd": 1},
        {"segmentation": None, "category_id": 3},
    ]
    masks, classes = upper_bound.object_masks(entries, HW, (192, 64))
    assert classes == [3]
    rows, columns = np.nonzero(masks[0].numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 5, 14)
