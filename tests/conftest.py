"""Fixtures that several test folders share."""

from __future__ import annotations

import os

# Tests are many small models on few cores: one thread each is faster than many that wait for each
# other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def event_storage():
    """Give model code the storage that a trainer would."""
    with EventStorage() as storage:
        yield storage


@pytest.fixture(autouse=True)
def seed():
    """Start every test from the same random numbers, without leaving them behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device there is: CUDA runs with ``-m gpu``."""
    return torch.device(request.param)
