"""The whole SOLOv2: gradients, degenerate inputs, formats, padding, name clashes."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from instseg_ext.methods.solo.arch import SOLOv2
from instseg_ext.modeling.dense import register_meta_architecture
from instseg_ext.modeling.runtime import RuntimeOptions

RECTANGLE = (8, 8, 40, 36, 1)
PIXEL = (63, 47, 64, 48, 0)
BORDERS = (0, 0, 64, 48, 2)


def lowered(make_model, **kwargs):
    """Return a model whose fresh weights detect something."""
    options = {"score_thresh": 0.0, "update_thresh": 0.0, **kwargs}
    model = make_model(**options)
    torch.nn.init.normal_(model.head.kernel_pred.weight, std=1.0)
    torch.nn.init.constant_(model.head.category_pred.bias, 0.0)
    return model.eval()


@pytest.mark.parametrize(
    "batch",
    [
        [(48, 64, [RECTANGLE, PIXEL, BORDERS]), (64, 64, [RECTANGLE])],
        [(48, 64, []), (64, 64, [RECTANGLE])],
        [(48, 64, [PIXEL])],
        [(48, 64, []), (48, 48, [])],
    ],
    ids=["mixed", "half-empty", "pixel", "empty"],
)
def test_losses_are_finite_and_reach_every_parameter(make_model, make_sample, batch):
    model = make_model().train()
    losses = model([make_sample(*spec) for spec in batch])
    assert set(losses) == {"loss_cls", "loss_mask"}
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert losses["loss_mask"].item() <= 3.0 + 1e-5
    if not any(spec[2] for spec in batch):
        assert losses["loss_mask"].item() == 0
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_ground_truth_with_an_empty_mask_is_skipped(make_model, make_sample):
    sample = make_sample(64, 64, [RECTANGLE])
    sample["instances"].gt_masks.tensor.zero_()
    losses = make_model().train()([sample])
    assert losses["loss_mask"].item() == 0
    assert losses["loss_cls"].isfinite()


def test_low_scores_give_empty_instances(make_model, make_sample):
    results = make_model().eval()([make_sample(48, 64), make_sample(64, 40)])
    for result, size in zip(results, [(48, 64), (64, 40)], strict=True):
        instances = result["instances"]
        assert len(instances) == 0
        assert instances.pred_masks.shape == (0, *size)
        assert instances.pred_masks.dtype == torch.bool
        assert instances.pred_boxes.tensor.shape == (0, 4)
        assert instances.pred_classes.dtype == torch.int64


def test_mixed_sizes_and_output_sizes(make_model, make_sample):
    model = lowered(make_model)
    samples = [make_sample(48, 64), make_sample(64, 40)]
    samples[0].update(height=101, width=130)
    with torch.no_grad():
        first, second = (r["instances"] for r in model(samples))
    assert first.image_size == (101, 130)
    assert second.pred_masks.shape[1:] == (64, 40)
    for result in (first, second):
        assert 0 < len(result) <= 100
        assert (result.scores.diff() <= 0).all()


def test_rle_output(make_model, make_sample):
    runtime = RuntimeOptions(mask_output="rle")
    model = lowered(make_model, runtime=runtime)
    with torch.no_grad():
        instances = model([make_sample(48, 64)])[0]["instances"]
    assert not instances.has("pred_masks")
    assert len(instances.pred_masks_rle) == len(instances) > 0


def test_equal_sizes_do_not_influence_each_other_but_padding_does(make_model, make_sample):
    """Coordinates and grids span the padding: documented, so tested."""
    model = lowered(make_model)
    small, other, large = make_sample(64, 64), make_sample(64, 64), make_sample(64, 128)

    def masks_of(batch):
        images = model.preprocess_image(batch)
        return model.head(model.backbone(images.tensor))

    with torch.no_grad():
        alone, together, padded = (
            masks_of([small]),
            masks_of([small, other]),
            masks_of([small, large]),
        )
    for a, b in zip(alone.category_logits, together.category_logits, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        alone.mask_features[0], together.mask_features[0], atol=1e-5, rtol=1e-5
    )
    moved = (alone.category_logits[0][0] - padded.category_logits[0][0]).abs().max()
    assert moved > 1e-4


def test_memory_formats_agree(make_model, make_sample):
    sample = make_sample(64, 96)
    first = lowered(make_model, runtime=RuntimeOptions(memory_format="channels_last"))
    second = lowered(make_model, runtime=RuntimeOptions(memory_format="contiguous"))
    second.load_state_dict(first.state_dict())
    outputs = []
    for model in (first, second):
        images = model.preprocess_image([sample])
        with torch.no_grad():
            outputs.append(model.head(model.backbone(images.tensor)))
    assert outputs[0].mask_features.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(outputs[0].kernels, outputs[1].kernels, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[0].mask_features, outputs[1].mask_features)


def test_bf16_trains_and_predicts(make_model, make_sample):
    model = make_model(runtime=RuntimeOptions(precision="bf16")).train()
    losses = model([make_sample(48, 64, [RECTANGLE])])
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    model = lowered(make_model, runtime=RuntimeOptions(precision="bf16"))
    with torch.no_grad():
        assert len(model([make_sample(48, 64)])[0]["instances"]) > 0


def test_broken_features_give_no_detections(make_model, make_sample):
    model = lowered(make_model)
    for bad in (float("nan"), float("inf")):
        model.backbone.stem.bias.data.fill_(bad)
        with torch.no_grad():
            assert len(model([make_sample(48, 64)])[0]["instances"]) == 0


def test_copies_predict_the_same(make_model, make_sample):
    model, sample = lowered(make_model), make_sample(64, 64)
    with torch.no_grad():
        expected = model([sample])[0]["instances"]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = other([sample])[0]["instances"]
            assert torch.equal(found.scores, expected.scores)
            assert torch.equal(found.pred_masks, expected.pred_masks)


def test_state_dict_has_two_prefixes_and_no_buffers(make_model):
    names = make_model().state_dict()
    assert {name.split(".")[0] for name in names} == {"backbone", "head"}


def test_registered_name_and_clash():
    assert META_ARCH_REGISTRY.get("SOLOv2") is SOLOv2
    other = type("SOLOv2", (), {"__module__": "somewhere.else"})
    with pytest.raises(RuntimeError, match="'instseg_ext' and 'somewhere'"):
        register_meta_architecture(other)
