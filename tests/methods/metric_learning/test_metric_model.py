"""The meta-architecture: scales, gradients, images of several sizes and without objects."""

import pytest
import torch
from contract.cases import TINY_RESNET, blobs
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage, get_event_storage
from methods.metric_learning.metric_toys import planted

import instseg_ext
from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.engine.optim import build_optimizer
from instseg_ext.methods.metric_learning import arch as arch_module
from instseg_ext.methods.metric_learning.head import DeepMetricOutputs
from instseg_ext.methods.metric_learning.labels import cell_labels, draw_cells

NODE = "MODEL.DEEP_METRIC."
TINY = (
    *TINY_RESNET,
    "MODEL.FPN.NORM", "",
    "MODEL.RESNETS.NORM", "FrozenBN",
    NODE + "HEAD_DIM", 32,
    NODE + "EMBED_DIM", 4,
    NODE + "PIXELS_OF_BACKGROUND", 10,
)  # fmt: skip
DILATED = (
    "MODEL.BACKBONE.NAME", "build_instseg_dilated_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES", ["res5"],
    "MODEL.RESNETS.RES5_DILATION", 4,
    NODE + "IN_FEATURES", ["res5"],
    NODE + "COORD_UNIT", 0.0,
)  # fmt: skip
OBJECTS = [
    blobs(64, 96, [(4, 4, 30, 30), (40, 20, 80, 60)]),
    blobs(96, 64, [(10, 10, 50, 70)]),
]
EMPTY = [blobs(64, 64, [])]


def make(*opts):
    torch.manual_seed(0)
    return build_model(instseg_ext.get_config("MetricLearning/nuclei_metric_R_18", [*TINY, *opts]))


@pytest.fixture(scope="module")
def model():
    return make()


def losses_of(model, batch, iteration=240, seed=0):
    with EventStorage(iteration):
        torch.manual_seed(seed)
        return model.train()(batch)


def gradients(model, loss, module):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad for p in module.parameters()]


def test_acceptance_check_10_each_loss_reaches_its_own_head(model):
    head = model.head
    losses = losses_of(model, OBJECTS)
    for of_embeddings in gradients(model, losses["loss_cls"], head.embed_head):
        assert of_embeddings is None
    assert all(
        g.abs().sum() > 0
        for g in gradients(model, losses_of(model, OBJECTS)["loss_cls"], head.cls_head.predictor)
    )
    losses = losses_of(model, OBJECTS)
    for of_classes in gradients(model, losses["loss_embed"], head.cls_head):
        assert of_classes is None
    assert model.head.embed_head.predictor.weight.grad.abs().sum() > 0
    assert model.backbone.bottom_up.fpn_output2.weight.grad.abs().sum() > 0


def test_acceptance_check_11_the_weight_is_logged(model):
    expected = {0: 0.0, 24: 0.0, 48: 0.1, 72: 0.2, 240: 0.2}
    for iteration, value in expected.items():
        with EventStorage(iteration):
            losses = model.train()(OBJECTS)
            logged, _ = get_event_storage().latest()["metric_learning/lambda"]
        assert logged == pytest.approx(value)
        assert (losses["loss_cls"] == 0) == (value == 0)


def test_acceptance_check_5_the_order_of_objects_does_not_matter(model, monkeypatch):
    """With the same cells; their numbers follow the objects."""
    values = []
    for order in ([0, 1, 2], [2, 0, 1]):
        sample = blobs(64, 96, [(4, 4, 30, 30), (40, 20, 80, 60), (0, 40, 30, 60)])
        sample["instances"] = sample["instances"][order]
        back = torch.tensor([order.index(i) for i in range(3)] + [3])

        def draw(labels, num, per_object, background, order=order, back=back):
            known = torch.cat([torch.tensor(order), torch.tensor([3])])
            first = torch.where(labels >= 0, known[labels.clamp(min=0)], labels)
            torch.manual_seed(5)
            found = draw_cells(first, num, per_object, background)
            return type(found)(found.cells, back[found.owners], found.sizes[known])

        monkeypatch.setattr(arch_module, "draw_cells", draw)
        values.append(losses_of(model, [sample]))
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name])


@pytest.mark.parametrize("background", ["instance", "negative_only", "none"])
def test_acceptance_check_13_an_image_without_objects(background):
    model = make(NODE + "BACKGROUND", background, NODE + "SEED_MIN", 0.51)
    losses = losses_of(model, EMPTY)
    assert losses["loss_embed"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        # Sure of the background.
        model.head.cls_head.predictor.bias.unflatten(0, (4, 2))[:, 1] = 5
        assert len(model(EMPTY)[0]["instances"]) == 0


def test_images_without_objects_do_not_dilute_the_loss(model):
    alone = losses_of(model, [OBJECTS[0]])
    assert losses_of(model, [OBJECTS[0], EMPTY[0]])["loss_embed"].item() == pytest.approx(
        alone["loss_embed"].item(), rel=0.05
    )


def test_acceptance_check_14_one_scale_is_the_map_of_the_backbone():
    model = make(*DILATED, NODE + "INPUT_SCALES", [1.0]).eval()
    batch = model.preprocess_image(OBJECTS).tensor
    with torch.no_grad():
        features = model.backbone.bottom_up(batch)["res5"]
        raw = model.head(model.backbone(batch))
        assert torch.equal(raw.embeddings, model.head.embed_head(features))
        logits = model.head.cls_head(features).unflatten(1, (4, 2))
        assert torch.equal(raw.class_logits, logits)
    assert raw.embeddings.shape == (2, 4, *(side // 8 for side in batch.shape[-2:]))


@pytest.mark.parametrize("scales", [[0.5, 1.0], [0.25, 0.5, 1.0, 2.0], [1.0, 0.75]])
def test_acceptance_check_14_more_scales_keep_the_size(scales):
    opts = (*DILATED, NODE + "REDUCE_DIM", 8)
    model = make(*opts, NODE + "INPUT_SCALES", scales).eval()
    batch = model.preprocess_image(OBJECTS).tensor
    features = model.backbone(batch)
    for scale, x in zip(scales, features.values(), strict=True):
        expected = tuple(max(side * scale, 32) / 8 for side in batch.shape[-2:])
        assert tuple(x.shape[-2:]) == expected
    raw = model.head(features)
    assert raw.embeddings.shape[-2:] == tuple(side // 8 for side in batch.shape[-2:])
    assert model.head.embed_head.convs[0].in_channels == 8 * len(scales)


def test_very_small_images_are_not_scaled_away():
    model = make(*DILATED, NODE + "INPUT_SCALES", [0.25, 1.0]).eval()
    features = model.backbone(model.preprocess_image([blobs(20, 24, [])]).tensor)
    assert {tuple(x.shape[-2:]) for x in features.values()} == {(4, 4)}


def test_acceptance_check_15_masks_have_the_size_of_their_image(model):
    """Planted objects in a padded batch; the padding is one more object, which is not found."""
    boxes = [[(8, 8, 40, 40), (56, 24, 88, 56)], [(8, 16, 56, 80)]]
    samples = [blobs(64, 96, boxes[0]), blobs(96, 64, boxes[1])]
    images = ImageList.from_tensors([sample["image"].float() for sample in samples])
    points, logits = [], []
    for sample in samples:
        labels = cell_labels(sample["instances"], 4, (24, 24))
        num = len(sample["instances"])
        padding = labels < 0
        labels[padding] = 0
        e = planted(labels, num).T.unflatten(1, (24, 24))
        points.append(torch.cat([e, torch.zeros(4 - len(e), 24, 24)]))
        is_object = (labels < num).expand(4, 24, 24)
        logits.append(torch.stack([is_object * 9.0, ~is_object * 9.0], dim=1))
    raw = DeepMetricOutputs(torch.stack(points), torch.stack(logits))
    given = [dict(samples[0], height=128, width=192), dict(samples[1], height=50, width=30)]
    found = model.eval().inference(raw, images, given)
    assert [f.image_size for f in found] == [(128, 192), (50, 30)]
    assert [tuple(f.pred_masks.shape) for f in found] == [(2, 128, 192), (1, 50, 30)]
    large = found[0].pred_masks[found[0].pred_boxes.tensor[:, 0].argsort()]
    for mask, (x0, y0, x1, y1) in zip(large, boxes[0], strict=True):
        wanted = torch.zeros_like(mask)
        wanted[2 * y0 : 2 * y1, 2 * x0 : 2 * x1] = True
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.95


def test_positions_are_pixels_of_the_image():
    """Neither padding nor the other sides of a batch change them."""
    model = make()
    coords = model.head._coords(torch.Size((3, 5)), torch.device("cpu"))[0]
    assert coords.shape == (2, 3, 5)
    assert coords[0, 0].tolist() == pytest.approx([(i + 0.5) * 4 / 32 for i in range(5)])
    assert coords[1, :, 2].tolist() == pytest.approx([(i + 0.5) * 4 / 32 for i in range(3)])
    larger = model.head._coords(torch.Size((6, 9)), torch.device("cpu"))[0]
    assert torch.equal(larger[:, :3, :5], coords)


def test_rates_of_the_backbone():
    opts = [*TINY, NODE + "BACKBONE_LR_MULT", 0.1, "SOLVER.BASE_LR", 1.0]
    cfg = instseg_ext.get_config("MetricLearning/nuclei_metric_R_18", opts)
    model = build_model(cfg)
    rates = {
        parameter: group["lr"]
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == pytest.approx(0.1 if name.startswith("backbone.") else 1)


def test_global_counts_are_means_over_processes(monkeypatch):
    """As if all processes had three times the objects and cells of this one."""
    monkeypatch.setattr(arch_module, "mean_over_processes", lambda counts: counts * 3)
    local = losses_of(make(), OBJECTS)
    across = losses_of(make("INSTSEG.LOSS_NORMALIZER", "global"), OBJECTS)
    for name, value in local.items():
        torch.testing.assert_close(across[name] * 3, value)


def test_weights_of_a_plain_resnet_reach_the_backbone(tmp_path):
    """Names as in detectron2's ImageNet files."""
    model = make(*DILATED)
    trunk = {k: torch.rand_like(v) for k, v in model.backbone.bottom_up.state_dict().items()}
    file = tmp_path / "trunk.pth"
    torch.save({"model": trunk, "matching_heuristics": True}, file)
    InstSegCheckpointer(model).load(str(file))
    loaded = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trunk.items())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ([NODE + "INPUT_SCALES", [0.5, 2.0]], "INPUT_SCALES must be .* with 1.0 among them"),
        ([NODE + "INPUT_SCALES", [1.0, 1.0]], "INPUT_SCALES must be different"),
        ([NODE + "IN_FEATURES", ["p9"]], "IN_FEATURES names 'p9'; the backbone has p2"),
        ([NODE + "IN_FEATURES", []], "IN_FEATURES is empty"),
        ([NODE + "TAUS", []], "TAUS must be similarities between 0 and 1"),
        ([NODE + "TAUS", [0.5, 1.0]], "TAUS must be similarities between 0 and 1"),
        ([NODE + "BACKGROUND", "no"], "BACKGROUND must be one of instance, negative_only, none"),
        ([NODE + "PAIR_WEIGHT", "no"], "PAIR_WEIGHT must be one of"),
        ([NODE + "SEED_RULE", "no"], "SEED_RULE must be one of log, sim"),
        ([NODE + "PARTS", "no"], "PARTS must be one of all, largest, seed"),
        ([NODE + "LAMBDA_START", 0.5], "LAMBDA_END 0.3 must not be below .*LAMBDA_START 0.5"),
        ([NODE + "CLS_IOU", 0.4], r"CLS_IOU must be in \[0.5, 1\]"),
        ([NODE + "MASK_NMS", 1.1], "MASK_NMS must be in"),
        ([NODE + "HEAD_NORM", "GN", NODE + "HEAD_DIM", 40], "HEAD_NORM 'GN' cannot be used with"),
        ([NODE + "HEAD_NORM", "no"], "HEAD_NORM 'no' cannot be used"),
    ],
)
def test_settings_that_make_no_sense(opts, message):
    with pytest.raises(ValueError, match=message):
        make(*opts)
