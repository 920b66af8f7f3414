"""Losses of DeepMask and SharpMask, and what a step trains."""

import math

import pytest
import torch
import torch.nn.functional as F
from methods.deepmask.deepmask_models import (
    SHARP_SIZE,
    config,
    model_of,
    patches,
    sharp_model_of,
)
from torch import nn

from instseg_ext.engine.optim import build_optimizer
from instseg_ext.methods.deepmask.losses import enlarge, mean_loss


def backward(model, samples):
    losses = model.train()(samples)
    sum(losses.values()).backward()
    return losses


def zeroed(model):
    with torch.no_grad():
        for layer in (model.head.mask.fc, model.head.score.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def test_zero_logits_cost_ln_2():
    """Check 7, first half: of the mask loss, in units of its weight, and of the score loss."""
    losses = zeroed(model_of()).train()(patches(4, 4))
    assert losses["loss_mask"].item() == pytest.approx(32 * math.log(2), rel=1e-5)
    assert losses["loss_score"].item() == pytest.approx(math.log(2), rel=1e-5)
    refined = sharp_model_of()
    nn.init.zeros_(refined.head.refine.predict.weight)
    nn.init.zeros_(refined.head.refine.predict.bias)
    losses = refined.train()(patches(3, gt_size=SHARP_SIZE))
    assert set(losses) == {"loss_mask"}
    assert losses["loss_mask"].item() == pytest.approx(32 * math.log(2), rel=1e-5)


def test_gradient_of_the_masks_is_32_times_that_of_their_mean():
    """Check 7, second half, with the published weight."""
    logits = torch.randn(4, 12, 12, requires_grad=True)
    targets = torch.rand(4, 24, 24) > 0.5
    model = model_of()
    signs = targets.float() * 2 - 1
    mean = F.softplus(-signs * enlarge(logits, 24)).mean()
    (expected,) = torch.autograd.grad(mean, logits)
    model.head.mask.forward = lambda codes: logits
    maps = model.patch_maps(patches(4))[1]
    (found,) = torch.autograd.grad(
        model.mask_losses(maps, [0, 1, 2, 3], targets)["loss_mask"], logits
    )
    torch.testing.assert_close(found, 32 * expected)


def test_loss_is_the_soft_margin():
    logits = torch.tensor([[2.0, -3.0], [0.5, 60.0]])
    positive = torch.tensor([[True, True], [False, False]])
    expected = sum(math.log1p(math.exp(v)) if v < 50 else v for v in (-2.0, 3.0, 0.5, 60.0)) / 4
    assert mean_loss(logits, positive).item() == pytest.approx(expected)
    assert mean_loss(logits.bfloat16(), positive).dtype is torch.float32


def test_each_patch_counts_for_its_own_head():
    """Mask patches do not reach the score, score patches not the masks."""
    model = model_of()
    both = model.train()
    torch.manual_seed(1)
    samples = patches(3, 3)
    losses = both(samples)
    only_masks = both.mask_losses(
        both.patch_maps(samples[:3])[1], [0, 1, 2], torch.stack([s["target"] for s in samples[:3]])
    )
    torch.testing.assert_close(losses["loss_mask"], only_masks["loss_mask"])
    for name, other in (("loss_mask", "score"), ("loss_score", "mask")):
        parameters = list(getattr(both.head, other).parameters())
        gradients = torch.autograd.grad(
            losses[name], parameters, retain_graph=True, allow_unused=True
        )
        assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize(("masks", "scores"), [(2, 0), (0, 2)])
def test_every_parameter_has_a_gradient_without_patches_of_a_kind(masks, scores):
    model = model_of()
    losses = backward(model, patches(masks, scores))
    assert set(losses) == {"loss_mask", "loss_score"}
    assert [losses[k].item() for k in losses].count(0.0) == 1
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("masks", "scores", "idle"), [(3, 0, "score"), (0, 3, "mask")])
def test_strict_steps_leave_the_other_head_alone(masks, scores, idle):
    """Check 8: bit-identical, in spite of momentum and weight decay."""
    cfg = config("MODEL.DEEPMASK.ALTERNATE", True, "SOLVER.BASE_LR", 0.1)
    model = model_of("MODEL.DEEPMASK.ALTERNATE", True)
    optimizer = build_optimizer(cfg, model)
    # Momentum of an earlier step on both.
    for samples in (patches(2), patches(0, 2)):
        optimizer.zero_grad(set_to_none=True)
        backward(model, samples)
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad(set_to_none=True)
    losses = backward(model, patches(masks, scores))
    assert set(losses) == {"loss_mask" if idle == "score" else "loss_score"}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not [name for name in moved if name.startswith(f"head.{idle}.")]
    assert {name for name in before if not name.startswith(f"head.{idle}.")} == moved


def test_sharpmask_trains_its_refinement_alone():
    model = sharp_model_of("MODEL.RESNETS.NORM", "BN")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    backward(model, patches(4, gt_size=SHARP_SIZE))
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("head.refine.")}
    # Running statistics do not move either.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.backbone.training
    assert model.head.refine.training


def test_sharpmask_can_train_everything():
    options = ["MODEL.SHARPMASK.FREEZE_TRUNK", False, "MODEL.DEEPMASK.SCORE_FREQ", 0.5]
    model = sharp_model_of(*options)
    losses = backward(model, patches(3, 2, gt_size=SHARP_SIZE))
    assert set(losses) == {"loss_mask", "loss_coarse", "loss_score"}
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DEEPMASK.GT_SIZE", 24], "GT_SIZE must be INPUT_SIZE 32"),
        (["MODEL.DEEPMASK.SCORE_FREQ", 0.5], "SCORE_FREQ must be 0.0"),
        (["MODEL.SHARPMASK.FREEZE_TRUNK", False], "SCORE_FREQ must be above 0"),
        (["MODEL.SHARPMASK.DIM", 24], "DIM must be a multiple of 16"),
        (["MODEL.SHARPMASK.CHUNK", 0], "CHUNK must be positive"),
        (["MODEL.DEEPMASK.INPUT_SIZE", 40], "INPUT_SIZE must be a multiple of 16"),
        (["MODEL.DEEPMASK.CONTEXT", 8], "CONTEXT must be a multiple of 16"),
        (["MODEL.DEEPMASK.OUT_SIZE", 0], "OUT_SIZE must be positive"),
        (["MODEL.DEEPMASK.MASK_THRESH", 1.0], "MASK_THRESH must be in"),
        (["MODEL.DEEPMASK.PAD_MODE", "wrap"], "PAD_MODE must be one of"),
        (["MODEL.DEEPMASK.HEADS", "both"], "HEADS must be one of"),
        (["MODEL.DEEPMASK.TEST_SCALES", []], "TEST_SCALES must be a list"),
        (["MODEL.DEEPMASK.LEGACY_PASTE", True, "INPUT.MIN_SIZE_TEST", 64], "MIN_SIZE_TEST to 0"),
        (["INSTSEG.STRETCH", [64, 64]], "STRETCH must be"),
    ],
)
def test_values_that_are_not_allowed(opts, message):
    with pytest.raises(ValueError, match=message):
        sharp_model_of(*opts)


def test_patches_of_another_size_are_named():
    samples = patches(2)
    samples[1]["image"] = torch.zeros(3, 64, 60)
    with pytest.raises(ValueError, match=r"64 x 64 pixels, but 1\.png gives \(64, 60\)"):
        model_of().train()(samples)
