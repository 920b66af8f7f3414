"""The region heads against the authors' network written out step by step, on random weights."""

import torch
import torch.nn.functional as F
from layers.roi_pool_loop import pooled_by_loop
from methods.multipathnet.multipathnet_toys import features_of, heads_of

OPTS = [
    "MODEL.MULTIPATH.SHARE_TOWERS", False,
    "MODEL.MULTIPATH.L2_SCALE", 1000.0,
    "MODEL.MULTIPATH.DROPOUT", 0.5,
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPoolV2",
]  # fmt: skip
# What deltas are divided by: 1 / MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS.
STD = torch.tensor([0.1, 0.1, 0.2, 0.2])


def crops_by_hand(box):
    """The four crops of a box that begins at 1."""
    x, y, x2, y2 = box
    w, h = x2 - x, y2 - y
    corners = [(x, y, w, h), (x - w * 0.25, y - h * 0.25, w * 1.5, h * 1.5)]
    corners += [(x - w * 0.5, y - h * 0.5, w * 2, h * 2), (x - w * 1.5, y - h * 1.5, w * 4, h * 4)]
    return [(x, y, x + w, y + h) for x, y, w, h in corners]


def tower_by_hand(tower, maps, crop):
    """Maps with their strides, coarse to fine; one crop that begins at 1."""
    parts = []
    for features, stride in maps:
        roi = torch.tensor([[0.0, *(v - 1 for v in crop)]])
        pooled = pooled_by_loop(features, roi, 7, 1 / stride).flatten()
        parts.append((pooled / (pooled.square().sum() + 1e-10).sqrt()).view(-1, 7, 7))
    mixed = F.conv2d(torch.cat(parts)[None] * 1000, tower.mix.weight, tower.mix.bias)
    return tower.fc7(tower.fc6(mixed.flatten()).relu()).relu()


def network_by_hand(heads, maps, box):
    """Probabilities with the background first, and the boxes of all classes that begin at 1."""
    crops = crops_by_hand(box)
    towers = heads.box_head.towers
    seen = [
        tower_by_hand(tower, maps[:count], crop)
        for tower, count, crop in zip(towers, (3, 2, 2, 1, 3), [*crops, crops[1]], strict=True)
    ]
    joined = torch.cat(seen[:4])
    probs = torch.stack(
        [layer(joined).roll(1).softmax(0) for layer in heads.box_predictor.cls_score]
    )
    deltas = heads.box_predictor.bbox_pred(seen[4]).view(-1, 4) * STD
    x, y, x2, y2 = box
    w, h = x2 - x, y2 - y
    centre = torch.stack([(x + x2) / 2 + deltas[:, 0] * w, (y + y2) / 2 + deltas[:, 1] * h], dim=1)
    size = torch.stack([deltas[:, 2].exp() * w, deltas[:, 3].exp() * h], dim=1)
    return probs.mean(dim=0), torch.cat([centre - size / 2, centre + size / 2], dim=1)


def test_equals_the_authors_network():
    heads = heads_of(*OPTS).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in (*heads.box_predictor.cls_score, heads.box_predictor.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.02, generator=generator)
    features = features_of(size=(128, 160))
    maps = [(features[name], stride) for name, stride in (("p4", 16), ("p3", 8), ("p2", 4))]
    boxes = torch.tensor([[10.3, 20.6, 90.1, 70.2], [0, 0, 160, 128], [100, 5, 118, 31.5]])
    with torch.no_grad():
        probs, found = heads._predict([x for x, _ in maps], boxes)
        expected = [network_by_hand(heads, maps, (box + 1).unbind()) for box in boxes]
    # classes and boxes really differ
    assert probs.std(dim=0).min() > 1e-4
    torch.testing.assert_close(probs.roll(1, dims=1), torch.stack([x[0] for x in expected]))
    by_hand = torch.stack([x[1] for x in expected]) - 1
    torch.testing.assert_close(found.view(3, 3, 4), by_hand, atol=1e-3, rtol=1e-5)
