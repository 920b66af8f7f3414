"""Trunk, heads and refinement of DeepMask and SharpMask."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from methods.deepmask.deepmask_models import config, model_of, patches, sharp_model_of
from methods.project import Project, build, count
from torch import nn

from instseg_ext.layers.symmetric_pad import symmetric_pad
from instseg_ext.methods.deepmask.heads import DeepMaskHead
from instseg_ext.methods.deepmask.refine import Refinement

PROJECT = Project("DeepMask")


def shapes_of(model, side):
    """Return the shapes that a model of the meta device gives for one patch."""
    patch = {"image": torch.empty(3, side, side, device="meta")}
    found = model.eval().patch_outputs([patch])
    return {
        name: tuple(value.shape) for name, value in found._asdict().items() if value is not None
    }


def test_released_deepmask():
    """Check 1: the vector of 512, masks of 56 x 56 and, in training, 112 x 112; all parameters."""
    model = build(PROJECT.config("deepmask_R_50"))
    _, maps = model.patch_maps([{"image": torch.empty(3, 192, 192, device="meta")}])
    assert maps.codes.shape == (1, 512, 1, 1)
    assert shapes_of(model, 192) == {"mask_logits": (1, 56, 56), "score_logits": (1,)}
    assert model.loss_options.gt_size == 112
    assert count(model.backbone, model.head.reduce, model.head.encode) == 15_198_016
    assert count(model.head.reduce, model.head.encode) == 6_685_312
    assert (count(model.head.mask), count(model.head.score)) == (1_608_768, 526_337)
    assert count(model) == 17_333_121


def test_released_sharpmask():
    """Check 2: 160 x 160, exactly as many parameters more, sizes of the stages."""
    model = build(PROJECT.config("sharpmask_R_50"))
    sizes = []
    for stage in model.head.refine.topdown:
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(2 * out.shape[-1]))
    assert shapes_of(model, 192)["refined_logits"] == (1, 160, 160)
    assert sizes == [20, 40, 80, 160]
    refine = model.head.refine
    assert count(refine) == count(model) - 17_333_121 == 2_750_535
    assert count(refine.encode, refine.topdown) == 1_660_050
    assert count(refine.lateral) == 1_090_466
    assert count(refine.predict) == 19
    assert [p.requires_grad for p in model.parameters()].count(True) == len(
        list(refine.parameters())
    )


def test_first_paper():
    """VGG-A with about 75 M parameters; the score's map has the masks' size."""
    model = build(PROJECT.config("deepmask_VGG_A"))
    assert shapes_of(model, 224) == {"mask_logits": (1, 56, 56), "score_logits": (1,)}
    assert count(model) == pytest.approx(75e6, rel=0.02)
    features = model.backbone(torch.empty(1, 3, 480 + 224, 635 + 224, device="meta"))
    maps = model.head(features)
    assert maps.codes.shape == (1, 512, 31, 41)
    assert maps.scores.shape == (1, 31, 41)


def test_score_branch_of_the_first_paper_scores_every_window_as_if_alone():
    """Over an image, the pooled maps that begin at even and odd cells interleave."""
    torch.manual_seed(0)
    head = DeepMaskHead(
        {"conv5": ShapeSpec(channels=5, stride=16)},
        in_feature="conv5",
        window_size=64,
        reduce_dim=4,
        code_dim=6,
        out_size=8,
        score_dim=7,
        score_dropout=0.5,
        separate=True,
    ).eval()
    features = torch.randn(1, 5, 9, 7)
    scores = head({"conv5": features}).scores[0]
    assert scores.shape == (6, 4)
    for row, col in [(0, 0), (1, 3), (5, 2)]:
        window = features[:, :, row : row + 4, col : col + 4]
        pooled = F.max_pool2d(window, 2)
        hidden = F.relu(F.linear(pooled.flatten(1), head.score.encode.weight.flatten(1),
                                 head.score.encode.bias))  # fmt: skip
        expected = head.score.fc2(F.relu(head.score.fc1(hidden)))
        torch.testing.assert_close(scores[row, col], expected[0, 0])


def test_one_window_is_fully_connected():
    """Check 4: at cell (i, j), the convolution equals the linear layer on the 10 x 10 slice."""
    torch.manual_seed(0)
    shape = {"res4": ShapeSpec(channels=1024, stride=16)}
    head = DeepMaskHead(
        shape, in_feature="res4", window_size=160, reduce_dim=128, code_dim=512, out_size=56,
        score_dim=1024, score_dropout=0.5,
    ).eval()  # fmt: skip
    features = torch.randn(1, 1024, 13, 12)
    maps = head({"res4": features})
    assert maps.codes.shape == (1, 512, 4, 3)
    reduced = F.relu(head.reduce(features))
    for i, j in [(0, 0), (3, 2), (1, 2)]:
        window = reduced[0, :, i : i + 10, j : j + 10].reshape(1, -1)
        code = F.linear(window, head.encode.weight.reshape(512, -1), head.encode.bias)
        torch.testing.assert_close(maps.codes[0, :, i, j], code[0], rtol=1e-4, atol=1e-4)
        hidden = F.threshold(head.score.fc1(code), 0, 1e-6)
        score = head.score.fc2(hidden)[0, 0]
        torch.testing.assert_close(maps.scores[0, i, j], score, rtol=1e-4, atol=1e-4)


def padded_convs(module):
    """Let every 3x3 and 7x7 convolution of a plain ResNet mirror its input's border."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1:
            pad, conv.padding = conv.padding[0], (0, 0)
            conv.register_forward_pre_hook(lambda _m, args, pad=pad: symmetric_pad(args[0], pad))
    return module


@pytest.mark.parametrize(("depth", "width"), [(18, 64), (50, 16)])
def test_trunk_is_a_resnet_with_mirrored_borders(depth, width):
    """The same weights in detectron2's ResNet, whose convolutions get a mirrored input."""
    cfg = config("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", width)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4"]
    torch.manual_seed(0)
    trunk = build_backbone(cfg).eval()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    plain = build_backbone(cfg).eval()
    plain.load_state_dict(trunk.state_dict())
    image = torch.randn(1, 3, 53, 70)
    with torch.no_grad():
        found, expected = trunk(image), padded_convs(plain)(image)
    assert list(found) == ["res2", "res3", "res4"]
    for name, feature in found.items():
        torch.testing.assert_close(feature, expected[name])
        shape = trunk.output_shape()[name]
        assert feature.shape[1] == shape.channels
        assert feature.shape[2:] == (-(-53 // shape.stride), -(-70 // shape.stride))


def test_trunk_hands_out_the_map_before_pooling():
    cfg = config("MODEL.RESNETS.OUT_FEATURES", ["stem", "res4"], "MODEL.BACKBONE.FREEZE_AT", 2)
    trunk = build_backbone(cfg)
    features = trunk(torch.randn(1, 3, 64, 64))
    assert {name: feature.shape[1:] for name, feature in features.items()} == {
        "stem": (8, 32, 32),
        "res4": (64, 4, 4),
    }
    frozen = {name.split(".")[0] for name, p in trunk.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


def authors_refinement(refine, code, skips):
    """The authors' modules one after the other, for one window and its cropped features."""
    x = F.linear(code, refine.encode.weight, refine.encode.bias).view(1, -1, 2, 2)
    for lateral, topdown, skip in zip(refine.lateral, refine.topdown, skips, strict=True):
        h, v = skip, x
        for i, conv in enumerate(lateral):
            h = F.conv2d(symmetric_pad(h, 1), conv.weight, conv.bias)
            h = F.relu(h) if i < 2 else h
        for i, conv in enumerate(topdown):
            v = F.conv2d(symmetric_pad(v, 1), conv.weight, conv.bias)
            v = F.relu(v) if i < 1 else v
        x = F.relu(h + v).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(symmetric_pad(x, 1), refine.predict.weight, refine.predict.bias)[0, 0]


def test_refinement_equals_the_authors_modules():
    torch.manual_seed(0)
    refine = Refinement((6, 5, 4, 3), code_dim=8, cells=2, mask_dim=16, pad_mode="symmetric").eval()
    assert [conv.out_channels for conv in refine.lateral[1]] == [64, 8, 4]
    assert [conv.out_channels for conv in refine.lateral[3]] == [32, 2, 1]
    assert [conv.out_channels for conv in refine.topdown[2]] == [4, 2]
    code = torch.randn(1, 8)
    skips = [torch.randn(1, c, 2 << i, 2 << i) for i, c in enumerate((6, 5, 4, 3))]
    names = ("res4", "res3", "res2", "stem")
    laterals = refine.laterals(dict(zip(names, skips, strict=True)))
    found = refine(code, laterals)
    assert found.shape == (1, 32, 32)
    torch.testing.assert_close(found[0], authors_refinement(refine, code, skips))


def test_patches_are_cropped_to_the_window():
    """SharpMask's features lose the context: 1, 2, 4 and 8 cells per side."""
    model = sharp_model_of().eval()
    samples = patches(2)
    images, maps = model.patch_maps(samples)
    features = model.backbone(images.tensor)
    cropped = {
        name: feature[:, :, c:-c, c:-c]
        for (name, feature), c in zip(features.items(), (8, 4, 2, 1), strict=True)
    }
    assert [lateral.shape[-1] for lateral in maps.laterals] == [2, 4, 8, 16]
    for lateral, expected in zip(maps.laterals, model.head.refine.laterals(cropped), strict=True):
        torch.testing.assert_close(lateral, expected)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.OUT_FEATURES", ["res3"]], "feature of stride 16"),
        (["MODEL.RESNETS.DEPTH", 20], "MODEL.RESNETS.DEPTH"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, False]], "DEFORM_ON_PER_STAGE"),
        (["MODEL.BACKBONE.NAME", "build_deepmask_vgg_backbone"], "PAD_MODE must be zeros"),
    ],
)
def test_trunks_that_do_not_fit(opts, message):
    with pytest.raises(ValueError, match=message):
        model_of(*opts)


def test_sharpmask_names_the_features_that_it_misses():
    with pytest.raises(ValueError, match=r"add stem, res3 to MODEL\.RESNETS"):
        sharp_model_of("MODEL.RESNETS.OUT_FEATURES", ["res2", "res4"])
