"""DeepMask and SharpMask as a user meets them."""

import pytest
import torch
from detectron2.modeling import build_model
from methods.deepmask.deepmask_models import (
    SHARP_SIZE,
    config,
    model_of,
    patches,
    picture,
    sharp_model_of,
)
from pycocotools import mask as coco_mask

from instseg_ext import zoo
from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.engine import Trainer
from instseg_ext.evaluation.benchmark import build_floor

MODELS = pytest.mark.parametrize("make", [model_of, sharp_model_of], ids=["DeepMask", "SharpMask"])


@MODELS
def test_images_do_not_see_their_batch(make):
    model = make().eval()
    images = [picture(48, 64), picture(33, 90, seed=1), picture(16, 20, seed=2)]
    with torch.no_grad():
        together = model(images)
        alone = [model([image])[0] for image in images]
    for a, b, image in zip(together, alone, images, strict=True):
        assert a["instances"].image_size == (image["height"], image["width"])
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


@MODELS
def test_run_lengths_are_those_of_the_masks(make):
    model = make().eval()
    with torch.no_grad():
        plain = model([picture(40, 52)])[0]["instances"]
        model.mask_output = "rle"
        encoded = model([picture(40, 52)])[0]["instances"]
    assert torch.equal(plain.pred_boxes.tensor, encoded.pred_boxes.tensor)
    for mask, rle in zip(plain.pred_masks, encoded.pred_masks_rle, strict=True):
        assert (coco_mask.decode(rle) == mask.numpy()).all()


@MODELS
def test_few_windows_at_a_time_change_nothing(make):
    """Neither the budget for masks nor the number of windows that are refined at once counts."""
    model = make().eval()
    with torch.no_grad():
        expected = model([picture(40, 52)])[0]["instances"]
        model.mask_budget_mb = 0.05
        model.chunk = 3
        found = model([picture(40, 52)])[0]["instances"]
    assert torch.equal(found.scores, expected.scores)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-4


def test_rows_of_proposals_are_those_of_instances():
    model = sharp_model_of("MODEL.DEEPMASK.NMS_THRESH", 0.7).eval()
    with torch.no_grad():
        found = model([dict(picture(40, 52), height=80, width=104)])[0]
    assert set(found) == {"instances", "proposals"}
    fields = {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    assert set(found["instances"].get_fields()) == fields
    proposals = found["proposals"]
    assert proposals.image_size == (80, 104)
    assert (proposals.objectness_logits[:-1] >= proposals.objectness_logits[1:]).all()
    torch.testing.assert_close(
        proposals.objectness_logits.sigmoid(), found["instances"].scores, rtol=0, atol=0
    )


def test_sharpmask_starts_from_a_deepmask(tmp_path):
    """The second phase loads the first one's checkpoint; what it adds stays as it was drawn."""
    first = model_of()
    InstSegCheckpointer(first, str(tmp_path)).save("deepmask")
    second = sharp_model_of()
    drawn = {name: p.clone() for name, p in second.head.refine.state_dict().items()}
    InstSegCheckpointer(second).load(str(tmp_path / "deepmask.pth"), checkpointables=[])
    state = second.state_dict()
    assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
    assert all(torch.equal(p, drawn[name]) for name, p in second.head.refine.state_dict().items())


def test_floor_of_the_benchmark_is_the_network_at_every_scale():
    model = model_of().eval()
    images = [picture(48, 64), picture(33, 90, seed=1)]
    seen = []
    model.backbone.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        build_floor(model, images)()
        floor, seen[:] = list(seen), []
        model(images)
    assert len(floor) == 4
    assert all(torch.equal(a, b) for a, b in zip(floor, seen, strict=True))


def test_class_agnostic():
    cfg = config()
    assert zoo.method_of(cfg).name == "DeepMask"
    assert zoo.class_count(cfg) == 1
    # A data set of any number of classes changes nothing.
    before = cfg.dump()
    assert zoo.set_class_count(cfg, 37) == []
    assert cfg.dump() == before


@pytest.mark.parametrize("phase", ["deepmask_R_50", "sharpmask_R_50"])
def test_training_steps_of_the_trainer(phase, tmp_path):
    """Both phases on bundled tiles: patches from the sampler, finite losses, a checkpoint."""
    opts = [
        "DATASETS.TRAIN", ("nuclei_train",),
        "DATASETS.TEST", (),
        "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.IMS_PER_BATCH", 4,
        "SOLVER.MAX_ITER", 2,
        "SOLVER.STEPS", (),
        "OUTPUT_DIR", str(tmp_path),
        "SEED", 1,
    ]  # fmt: skip
    cfg = config(*opts, name=phase)
    trainer = Trainer(cfg, zoo.method_of(cfg))
    trainer.resume_or_load(resume=False)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    if "sharpmask" in phase:
        assert all(name.startswith("head.refine.") for name in moved)
    again = build_model(cfg)
    InstSegCheckpointer(again).load(str(tmp_path / "model_final.pth"), checkpointables=[])
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@MODELS
def test_lower_precision(make):
    model = make("INSTSEG.PRECISION", "bf16")
    side = SHARP_SIZE if make is sharp_model_of else 24
    losses = model.train()(patches(2, gt_size=side))
    assert all(loss.dtype is torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        found = model.eval()([picture(40, 52)])[0]
    assert found["instances"].scores.dtype is torch.float32
    assert found["proposals"].objectness_logits.dtype is torch.float32
