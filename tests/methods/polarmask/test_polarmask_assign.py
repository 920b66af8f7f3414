"""Positive locations: worked cases, and all pairs of locations and objects as oracle."""

import pytest
import torch

from instseg_ext.methods.polarmask.assign import AssignOptions, assign, locations

STRIDES = (8, 16, 32, 64, 128)
FULL = ((96, 160), (48, 80), (24, 40), (12, 20), (6, 10))  # of 768 x 1280
SMALL = ((16, 32), (8, 16), (4, 8), (2, 4), (1, 2))  # of 128 x 256


def options(**changes):
    return AssignOptions(**{"strides": STRIDES, "size_ranges": (64, 128, 256, 512), **changes})


def single(box, center, sizes=FULL, **changes):
    """Assign one object of one image."""
    boxes, centers = torch.tensor([box], dtype=torch.float32), torch.tensor([center])
    return assign(sizes, [boxes], [centers], options(**changes))


def level_of(positives, sizes=FULL):
    ends = torch.tensor([height * width for height, width in sizes]).cumsum(0)
    return torch.bucketize(positives.index % ends[-1], ends, right=True).tolist()


def oracle(sizes, boxes, centers, rules):
    """(index, instance) of one image: every object is compared with every location."""
    points = locations(sizes, rules.strides)
    bounds = (-1.0, *rules.size_ranges, 1e8)
    per_level = torch.tensor([height * width for height, width in sizes])
    reach = (torch.tensor(rules.strides) * rules.radius).repeat_interleave(per_level)[:, None]
    shortest = torch.tensor(bounds[:-1]).repeat_interleave(per_level)
    longest = torch.tensor(bounds[1:]).repeat_interleave(per_level)
    best = torch.full((len(points),), 1e8)
    owner = torch.full((len(points),), -1)
    for g, box in enumerate(boxes):
        low, high = box[:2], box[2:]
        farthest = torch.cat([points - low, high - points], dim=1).amax(dim=1)
        if rules.center != "none":
            center = centers[g].float() if rules.center == "mass" else (low + high) / 2
            low, high = torch.maximum(center - reach, low), torch.minimum(center + reach, high)
        wants = (torch.cat([points - low, high - points], dim=1) > 0).all(dim=1)
        wants &= (farthest >= shortest) & (farthest <= longest)
        area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
        wins = wants & (area < best)  # an equal one comes too late
        best[wins], owner[wins] = area, g
    return [(p, g) for p, g in enumerate(owner.tolist()) if g >= 0]


def random_objects(generator, num, height=128, width=256):
    """Boxes of all sizes with fractions, some with corners on locations, and centres in them."""
    size = torch.tensor([width - 1, height - 1])
    low = torch.rand(num, 2, generator=generator) * size * 0.8
    high = torch.minimum(low + 8 + torch.rand(num, 2, generator=generator) ** 2 * size, size)
    low[::2], high[::2] = (low[::2] / 4).round() * 4, (high[::2] / 4).round() * 4
    share = torch.rand(num, 2, generator=generator)
    return torch.cat([low, high], dim=1), (low + share * (high - low)).long()


def test_locations():
    points = locations(((2, 3), (1, 2)), (8, 16))
    assert points.tolist() == [
        *([4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]),
        *([8, 8], [24, 8]),
    ]
    assert len(locations(FULL, STRIDES)) == 20460


def test_worked_case():
    positives = single([200, 100, 499, 299], [349, 199])
    rows = [19409, 19449, 19489]
    assert positives.index.tolist() == [first + k for first in rows for k in range(3)]
    assert level_of(positives) == [2] * 9
    assert torch.equal(positives.points, locations(FULL, STRIDES)[positives.index])
    assert positives.points[0].tolist() == [304, 176]
    assert positives.boxes[0].tolist() == [104, 76, 195, 123]
    assert positives.instance.tolist() == [0] * 9


@pytest.mark.parametrize(
    ("center", "radius"),
    [("mass", 1.5), ("mass", 1.0), ("mass", 2.3), ("box", 1.5), ("box", 2.3), ("none", 1.5)],
)
def test_equals_the_comparison_of_all_pairs(center, radius):
    generator = torch.Generator().manual_seed(1)
    rules = options(center=center, radius=radius, size_ranges=(40, 64, 96, 160))
    images = [random_objects(generator, num) for num in (9, 0, 1, 14, 6, 30)]
    images[0][0][3] = images[0][0][1]  # equal boxes
    boxes, centers = zip(*images, strict=True)
    positives = assign(SMALL, boxes, centers, rules)

    expected, first = [], 0
    total = len(locations(SMALL, STRIDES))
    for n, (gt_boxes, gt_centers) in enumerate(images):
        pairs = oracle(SMALL, gt_boxes, gt_centers, rules)
        expected += [(n * total + p, first + g) for p, g in pairs]
        first += len(gt_boxes)
    assert len(expected) > 70
    found = zip(positives.index.tolist(), positives.instance.tolist(), strict=True)
    assert list(found) == expected

    all_boxes = torch.cat(boxes)[positives.instance]
    points = locations(SMALL, STRIDES)[positives.index % total]
    assert torch.equal(positives.points, points)
    distances = torch.cat([points - all_boxes[:, :2], all_boxes[:, 2:] - points], dim=1)
    assert torch.equal(positives.boxes, distances)


@pytest.mark.parametrize(("center", "columns"), [(64, [60, 68]), (65, [60, 68, 76])])
def test_columns_around_the_centre(center, columns):
    positives = single([20, 20, 110, 110], [center, 65], sizes=SMALL)
    of_level = torch.tensor(level_of(positives, SMALL)) == 0
    assert positives.points[of_level, 0].unique().tolist() == columns


def test_side_of_the_box_excludes_its_locations():
    def columns_of_p3(x1, x2):
        positives = single([x1, 20, x2, 80], [65, 65], SMALL)
        return positives.points[positives.index < 16 * 32, 0].unique().tolist()

    assert columns_of_p3(60, 80) == [68, 76]
    assert columns_of_p3(59.5, 80) == [60, 68, 76]
    assert columns_of_p3(50, 76) == [60, 68]


def test_limit_of_a_range_belongs_to_both_levels():
    """The largest distance is exactly 64 at (68, 68) of p3 and at (72, 72) of p4."""
    first = single([4, 50, 130, 80], [68, 68])
    assert (68, 68) in {tuple(point.tolist()) for point in first.points}
    assert first.boxes[first.points.eq(68).all(dim=1)].amax() == 64
    second = single([8, 50, 130, 80], [72, 68])
    chosen = second.points.eq(72).all(dim=1)
    assert second.boxes[chosen].amax() == 64
    assert level_of(second)[chosen.nonzero().item()] == 1


def test_smaller_box_takes_the_location():
    large, small = [20.0, 20.0, 110.0, 110.0], [30.0, 30.0, 100.0, 100.0]
    center = torch.tensor([[65, 65], [65, 65]])
    for boxes, winner in (([large, small], 1), ([small, large], 0), ([small, small], 0)):
        positives = assign(SMALL, [torch.tensor(boxes)], [center], options())
        shared = torch.isin(positives.index, single(small, [65, 65], SMALL).index)
        assert shared.any()
        assert (positives.instance[shared] == winner).all()


def test_first_object_with_its_centre_in_column_0():
    """The authors' sampling gives up the whole image here; we do not."""
    boxes = torch.tensor([[0.0, 40.0, 30.0, 70.0], [90.0, 30.0, 130.0, 70.0]])
    centers = torch.tensor([[0, 55], [110, 50]])
    positives = assign(SMALL, [boxes], [centers], options())
    assert set(positives.instance.tolist()) == {0, 1}


def test_objects_beyond_the_grid_have_no_locations():
    """A padded image may be smaller than its last object, and a level may have one cell only."""
    positives = single(
        [250, 120, 255, 127], [253, 124], sizes=((2, 2), (1, 1)), strides=(8, 16), size_ranges=(64,)
    )
    assert len(positives.index) == 0


@pytest.mark.parametrize("center", ["mass", "box", "none"])
@pytest.mark.parametrize("images", [1, 3])
def test_without_objects(center, images):
    nothing = [torch.zeros(0, 4)] * images, [torch.zeros(0, 2, dtype=torch.int64)] * images
    positives = assign(SMALL, *nothing, options(center=center))
    assert positives.index.shape == positives.instance.shape == (0,)
    assert positives.index.dtype == positives.instance.dtype == torch.int64
    assert positives.points.shape == (0, 2)
    assert positives.boxes.shape == (0, 4)
    assert positives.boxes.dtype == torch.float32


def test_centres_are_not_needed_without_masks():
    boxes = torch.tensor([[20.0, 20.0, 110.0, 110.0]])
    positives = assign(SMALL, [boxes], None, options(center="none"))
    assert level_of(positives, SMALL).count(1) > 9


def test_same_on_every_device(device):
    generator = torch.Generator().manual_seed(2)
    boxes, centers = random_objects(generator, 40)
    expected = assign(SMALL, [boxes], [centers], options())
    found = assign(SMALL, [boxes.to(device)], [centers.to(device)], options())
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other.cpu())


def test_refuses_wrong_options():
    with pytest.raises(ValueError, match=r"MODEL\.POLARMASK\.CENTER must be one of"):
        options(center="middle")
    with pytest.raises(ValueError, match=r"MODEL\.POLARMASK\.SIZE_RANGES needs 4 bounds"):
        options(size_ranges=(64, 128))
