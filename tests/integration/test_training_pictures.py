"""``VIS_PERIOD``: TensorBoard shows annotation beside prediction while a model trains."""

from __future__ import annotations

import pytest
from contract.cases import first_of_each_method
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instseg_ext import zoo
from instseg_ext.engine import Trainer


@pytest.mark.parametrize("case", first_of_each_method(), ids=lambda case: case.name)
def test_pictures_reach_tensorboard(case, tmp_path):
    cfg = case.cfg(
        "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 3, "VIS_PERIOD", 2, "DATASETS.TEST", (),
        "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2,
    )  # fmt: skip
    trainer = Trainer(cfg, zoo.method_of(cfg))
    trainer.train()
    assert trainer.model.training
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (picture,) = events.Images("truth_and_prediction")
    assert picture.step in (1, 2)
    assert (picture.width, picture.height) == (512, 256)
