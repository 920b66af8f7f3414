"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import warnings

# One thread each: many small models on few cores are faster so than when they wait for each other,
# and a comparison of one process with two must not also be one of thread counts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True, scope="session")
def nothing_is_drawn_without_memory():
    """Spare models on the meta device the drawing of weights, more than half of their building.

    There are no numbers to draw, but PyTorch goes through the shapes in Python.
    """
    library = torch.library.Library("aten", "IMPL", "Meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has kernels there already
        for name in ("normal_", "uniform_"):
            library.impl(name, lambda tensor, *args, **kwargs: tensor)
    return library  # which takes them out again when it goes


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


@pytest.fixture
def all_cores():
    """Let a test that trains for minutes use every core, unless other tests run beside it."""
    before = torch.get_num_threads()
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
    torch.set_num_threads(1 if beside else os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
