"""Memory of inference on a 4000 x 3000 image, measured in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in KiB"),
]

# 500 x 375 cells: a matrix of all cells by all cells would take 140 GB.
SCRIPT = """
import resource, sys, torch
from instseg_ext.methods.metric_learning.inference import InferenceOptions, detect, to_instances
from instseg_ext.methods.metric_learning.masks import MaskOptions
from instseg_ext.methods.metric_learning.similarity import radii

def run(height, width):
    cells = (-(-height // 8), -(-width // 8))
    y, x = torch.meshgrid(*(torch.arange(n) // 37 for n in cells), indexing="ij")
    torch.manual_seed(0)
    centres = torch.randn(int(y.max()) + 1, int(x.max()) + 1, 64)
    points = (centres[y, x] + torch.randn(*cells, 64) * 0.02).permute(2, 0, 1).contiguous()
    logits = torch.randn(4, 21, *cells)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = InferenceOptions(masks=MaskOptions(mask_nms=0.9), seed_min=0.0)
    found = detect(points, logits, radii=radii([0.25, 0.5, 0.75, 0.9]), options=options)
    result = to_instances(
        found, stride=8, size_hw=cells, input_hw=(height, width), output_hw=(height, width),
        nearest=False, budget_mb=256, output="rle",
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return len(result), (after - before) / 1024

run(128, 128)
count, rise = run(3000, 4000)
sys.stdout.write(f"count={count} rise_mb={rise:.0f}")
"""


def test_memory_grows_with_cells_times_seeds_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    count, rise = (float(part.split("=")[1]) for part in done.stdout.split())
    assert count > 50
    assert rise < 400
