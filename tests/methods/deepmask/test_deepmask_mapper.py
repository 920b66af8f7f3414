"""DeepMask's training samples. Numbers in docstrings: acceptance checks of DeepMask."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from instseg_ext.config import add_shared_config
from instseg_ext.data import TrainLoader, add_data_config, make_shapes
from instseg_ext.data.coco import load_coco
from instseg_ext.methods.deepmask.config import add_deepmask_config
from instseg_ext.methods.deepmask.mapper import HeadPlan, ImageCache, build_patch_source
from instseg_ext.methods.deepmask.patches import PAD_VALUE


def make_cfg(**changes):
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    add_deepmask_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.SOLVER.IMS_PER_BATCH = 4
    for key, value in changes.items():
        node = cfg
        *parents, leaf = key.split("__")
        for name in parents:
            node = node[name]
        node[leaf] = value
    return cfg


def small(**changes):
    """Windows of 32 px in patches of 64, for pictures of 48 px."""
    sizes = {"INPUT_SIZE": 32, "CONTEXT": 16, "GT_SIZE": 24, "SHIFT": 4.0, "MIN_AREA": 1.0}
    return make_cfg(**{f"MODEL__DEEPMASK__{key}": value for key, value in sizes.items()} | changes)


@pytest.fixture(scope="module")
def dicts(tmp_path_factory):
    return load_coco(
        *make_shapes(tmp_path_factory.mktemp("shapes"), num_images=10, size=48, seed=3)
    )[0]


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def samples_of(cfg, dicts, count, seed=0, **arguments):
    """The first samples of the training stream."""
    source = build_patch_source(cfg, dicts, seed)
    loader = TrainLoader(dicts, None, batch_size=4, seed=seed, source=source, **arguments)
    return list(itertools.islice(itertools.chain.from_iterable(loader), count))


def square_scene(tmp_path, side=92, **changes):
    """One picture of 400 x 300 with a white square in the middle, as polygons."""
    pixels = np.zeros((300, 400, 3), dtype=np.uint8)
    left, top = 200 - side // 2, 150 - side // 2
    pixels[top : top + side, left : left + side] = 255
    Image.fromarray(pixels).save(tmp_path / "square.png")
    right, bottom = left + side, top + side
    annotation = {
        "bbox": [left, top, side, side],
        "bbox_mode": 1,
        "category_id": 0,
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    }
    return [
        {
            "file_name": str(tmp_path / "square.png"),
            "height": 300,
            "width": 400,
            "image_id": 7,
            "annotations": [annotation | changes],
        }
    ]


# --- samples --------------------------------------------------------------------------------------


def test_fields_of_samples(dicts):
    for position, sample in enumerate(samples_of(make_cfg(), dicts, 8)):
        assert sample["image"].shape == (3, 192, 192)
        assert sample["image"].dtype is torch.float32
        assert sample["image"].is_contiguous()
        assert -0.001 < sample["image"].min() < sample["image"].max() < 255.001
        assert sample["is_mask"] is (position % 2 == 0)
        assert (sample["height"], sample["width"]) == (48, 48)
        assert sample["file_name"].endswith(".png")
        assert ("target" in sample, "label" in sample) == (sample["is_mask"], not sample["is_mask"])
        if sample["is_mask"]:
            assert sample["target"].shape == (112, 112)
            assert sample["target"].dtype is torch.bool
            assert sample["target"].any()
        else:
            assert sample["label"] in (1.0, -1.0)


@pytest.mark.parametrize("gt_size", [112, 160])
@pytest.mark.parametrize("side", [46, 92, 184])
def test_a_centred_square_without_jitter(tmp_path, side, gt_size, generator):
    """Check 10: the label's positive side is 92 / 160 of it, centred."""
    cfg = make_cfg(
        MODEL__DEEPMASK__SHIFT=0.0,
        MODEL__DEEPMASK__SCALE=0.0,
        MODEL__DEEPMASK__SCORE_FREQ=0.0,
        MODEL__DEEPMASK__GT_SIZE=gt_size,
    )
    sample = build_patch_source(cfg, square_scene(tmp_path, side), 0)(0, generator)
    target = sample["target"]
    rows, columns = (target.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    for found in (rows, columns):
        assert abs(len(found) - 92 / 160 * gt_size) <= 1
        assert abs(found.float().mean() - (gt_size - 1) / 2) <= 0.5
    assert target[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    # The image agrees: white where the mask is, black elsewhere, but for the edges.
    white = sample["image"][0, 16:176, 16:176] > 128
    share = white.float().mean() - target.float().mean()
    assert abs(share) < 0.02
    assert white.any(dim=0).nonzero().flatten().float().mean() == pytest.approx(79.5, abs=0.5)


def test_masks_fit_their_images(dicts):
    """Section 3.3: objects of one colour; the authors' masks are a pixel of 48 off, ours fit."""
    overlap = {}
    for legacy in (False, True):
        cfg = make_cfg(MODEL__DEEPMASK__SCORE_FREQ=0.0, MODEL__DEEPMASK__LEGACY_SAMPLER=legacy)
        values = []
        for sample in samples_of(cfg, dicts, 24):
            mask = sample["instances"].gt_masks.tensor[0]
            inside = sample["image"][:, mask].median(dim=1).values
            alike = (sample["image"] - inside[:, None, None]).abs().amax(dim=0) < 30
            mask, alike = (area[16:176, 16:176] for area in (mask, alike))
            values.append(float((mask & alike).sum() / (mask | alike).sum()))
        overlap[legacy] = np.median(values)
    assert overlap[False] > max(0.8, overlap[True] + 0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"INPUT__RANDOM_FLIP": "horizontal"},
        {"INPUT__RANDOM_FLIP": "vertical"},
        {"INPUT__RANDOM_FLIP": "none", "INSTSEG__AUGMENTATIONS__ROTATE90": True},
    ],
)
def test_flips_commute(dicts, changes):
    """Check 10: image and label are mirrored or turned together, and not always."""
    plain = small(INPUT__RANDOM_FLIP="none", MODEL__DEEPMASK__SCORE_FREQ=0.0)
    changed = small(**changes, MODEL__DEEPMASK__SCORE_FREQ=0.0)
    operations = {
        "none": lambda t: t,
        "horizontal": lambda t: t.flip(-1),
        "vertical": lambda t: t.flip(-2),
        **{f"turn {k}": (lambda t, k=k: torch.rot90(t, k, (-2, -1))) for k in (1, 2, 3)},
    }
    seen = []
    pairs = zip(samples_of(plain, dicts, 24), samples_of(changed, dicts, 24), strict=True)
    for before, after in pairs:
        fits = [
            name
            for name, move in operations.items()
            if torch.equal(move(before["image"]), after["image"])
            and torch.equal(move(before["target"]), after["target"])
        ]
        assert fits
        seen.append(fits[0])
    if changes["INPUT__RANDOM_FLIP"] == "none":
        assert len(set(seen)) == 4
    else:
        assert 4 < seen.count("none") < 20


def test_outside_the_image_is_grey_also_after_a_change_of_brightness(tmp_path):
    cfg = make_cfg(INPUT__RANDOM_FLIP="none")
    cfg.INSTSEG.AUGMENTATIONS.BRIGHTNESS = [0.5, 0.5]
    scene = square_scene(tmp_path, 280)
    for sample in samples_of(cfg, scene, 4):
        image = sample["image"]
        if sample["is_mask"]:
            assert (image[:, 0] == PAD_VALUE).all()
            assert image[0, 96, 96] == pytest.approx(127.5, abs=1)


def test_pictures_show_the_object(tmp_path, generator):
    cfg = make_cfg(MODEL__DEEPMASK__SHIFT=0.0, MODEL__DEEPMASK__SCALE=0.0)
    source = build_patch_source(cfg, square_scene(tmp_path), 0)
    instances = source(0, generator)["instances"]
    assert instances.image_size == (192, 192)
    box = instances.gt_boxes.tensor[0]
    np.testing.assert_allclose(box.numpy(), [50, 50, 142, 142], atol=1.5)
    assert len(source(1, generator)["instances"]) == 0


# --- the stream -----------------------------------------------------------------------------------


def prints(samples):
    return [
        (
            s["image"].numpy().tobytes(),
            s["target"].numpy().tobytes() if s["is_mask"] else s["label"],
            s["image_id"],
        )
        for s in samples
    ]


@pytest.mark.parametrize("arguments", [{"num_workers": 2}, {"start_iteration": 3}])
def test_samples_follow_from_seed_and_position(dicts, arguments):
    reference = prints(samples_of(small(), dicts, 20))
    skipped = 4 * arguments.get("start_iteration", 0)
    assert prints(samples_of(small(), dicts, 8, **arguments)) == reference[skipped : skipped + 8]
    assert prints(samples_of(small(), dicts, 8, seed=1)) != reference[:8]
    # Positive patches have no jitter: two may be equal.
    assert len(set(reference)) > 15


def test_processes_and_micro_batches_share_the_samples(dicts):
    reference = prints(samples_of(small(), dicts, 8))
    ranks = [prints(samples_of(small(), dicts, 4, rank=r, world_size=2)) for r in (0, 1)]
    assert [s for k in (0, 2) for part in ranks for s in part[k : k + 2]] == reference
    assert prints(samples_of(small(), dicts, 8, accumulate=2)) == reference


def test_the_source_travels_to_spawned_workers(dicts, generator):
    source = build_patch_source(small(INPUT__RANDOM_FLIP="none"), dicts, 0)
    copy = pickle.loads(pickle.dumps(source))
    assert prints([source(0, generator)]) == prints([copy(0, np.random.default_rng(0))])


@pytest.mark.parametrize(("share", "batch", "parts"), [(0.5, 8, 4), (0.25, 32, 8), (0.3, 40, 4)])
def test_every_part_of_a_batch_has_its_share_of_score_patches(share, batch, parts, caplog):
    plan = HeadPlan(share, batch)
    plan.warn_of_uneven_parts(parts)
    assert not caplog.records
    for first in range(10**7 * batch, (10**7 + 3) * batch, batch // parts):
        masks = [plan.is_mask(first + k) for k in range(batch // parts)]
        assert masks.count(False) == round(share * batch / parts)


def test_parts_that_differ_are_mentioned(caplog):
    """A step then depends on the number of processes; with one patch each, heads take turns."""
    plan = HeadPlan(0.5, 2)
    plan.warn_of_uneven_parts(2)
    assert "SCORE_FREQ 0.5 of SOLVER.IMS_PER_BATCH 2 patches in 2" in caplog.text
    assert [HeadPlan(0.5, 1).is_mask(position) for position in range(4)] == [True, False] * 2


@pytest.mark.parametrize(("share", "expected"), [(0.0, True), (1.0, False)])
def test_one_head_alone(share, expected):
    for alternate in (False, True):
        plan = HeadPlan(share, 4, alternate=alternate)
        assert {plan.is_mask(position) for position in range(100)} == {expected}


def test_alternating_steps_train_one_head_each():
    """Section 4: every process agrees, since the choice follows from the step's number."""
    plan = HeadPlan(0.25, 32, alternate=True, seed=5)
    steps = [{plan.is_mask(32 * step + k) for k in (0, 7, 31)} for step in range(400)]
    assert all(len(heads) == 1 for heads in steps)
    assert sum(heads == {False} for heads in steps) == pytest.approx(100, abs=30)
    other = HeadPlan(0.25, 32, alternate=True, seed=6)
    assert [{other.is_mask(32 * step)} for step in range(400)] != steps


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT__CROP__ENABLED", True),
        ("INSTSEG__AUGMENTATIONS__SSD__ENABLED", True),
        ("INSTSEG__STRETCH", [64, 64]),
    ],
)
def test_settings_that_patches_cannot_follow_are_refused(dicts, key, value):
    with pytest.raises(ValueError, match=rf"{key.replace('__', '.')} must be off"):
        build_patch_source(make_cfg(**{key: value}), dicts, 0)


def test_sets_without_a_large_object_are_refused(dicts):
    cfg = make_cfg(DATASETS__TRAIN=("shapes",), MODEL__DEEPMASK__MIN_AREA=1e6)
    with pytest.raises(ValueError, match=r"'shapes'.*large enough.*MIN_AREA \(1e\+06\)"):
        build_patch_source(cfg, dicts, 0)


def test_a_missing_image_is_named(dicts, tmp_path, generator):
    broken = [{**dicts[0], "file_name": str(tmp_path / "gone.png"), "image_id": 3}]
    with pytest.raises(FileNotFoundError, match=r"gone.png \(image id 3\) is missing"):
        build_patch_source(small(), broken, 0)(0, generator)


def test_the_cache_keeps_what_was_read_last(tmp_path):
    records = []
    for number in range(4):
        Image.fromarray(np.full((10, 10, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
        records.append({"file_name": str(tmp_path / f"{number}.png")})
    cache = ImageCache("RGB", limit=2 * 300)
    first = cache.read(records[0])
    cache.read(records[1])
    assert cache.read(records[0]) is first
    cache.read(records[2])
    assert cache.read(records[0]) is first
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError):
        cache.read(records[1])
    assert ImageCache("RGB", limit=299).read(records[3])[0, 0, 0] == 3
    none = ImageCache("RGB", limit=0)
    assert none.read(records[3]) is not none.read(records[3])
