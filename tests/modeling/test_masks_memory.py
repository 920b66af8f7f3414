"""Peak memory of 100 masks on a 5000 x 4000 image, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from instseg_ext.modeling.masks import Crop, Resize, masks_to_instances

two_stage, windowed = sys.argv[1] == "two", sys.argv[2] == "windowed"
if not windowed:
    torch.set_float32_matmul_precision("medium")
num, low = int(sys.argv[3]), (200, 252)
height, width = int(sys.argv[4]) * 4, int(sys.argv[4]) * 5
steps = [Resize((height, width))]
if two_stage:
    steps = [Resize((800, 1008)), Crop((800, 1000)), *steps]

y, x = torch.arange(low[0])[:, None] - 100.0, torch.arange(low[1])[None] - 126.0

def probs(part):
    # ellipses of growing size, the last ones filling the image
    radius = (torch.arange(num)[part] * 100 / num + 4)[:, None, None]
    return torch.sigmoid(3 - 3 * (y**2 + x**2)[None] / radius**2)

tiny = [Resize((8, 8))]
make = lambda p, s, n, size: masks_to_instances(
    p, s, torch.ones(n), torch.zeros(n), image_size=size, output="rle",
    budget_mb=int(sys.argv[5]),
)
make(lambda part: probs(part)[:, :4, :4], tiny, 2, (8, 8))
table = probs(slice(0, num))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = make(table, steps, num, (height, width))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(result.pred_masks_rle) == num
assert result.pred_boxes.tensor[:, 2:].gt(result.pred_boxes.tensor[:, :2]).all()
sys.stdout.write(f"rise_mb={(after - before) / 1024:.1f}")
"""


def rise_mb(stages, way, num, scale, budget_mb):
    args = [stages, way, str(num), str(scale), str(budget_mb)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("rise_mb=")[1])


def test_small_budget():
    # one mask of 2400 x 3000 is 29 MB of floats and 7 MB of bool: all at once would take 860 MB
    assert rise_mb("two", "windowed", 24, 600, 64) < 130


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["one", "two"])
@pytest.mark.parametrize("way", ["windowed", "plain"])
def test_hundred_detections_at_5000x4000(stages, way):
    assert rise_mb(stages, way, 100, 1000, 256) < 400
