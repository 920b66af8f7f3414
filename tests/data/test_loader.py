import itertools
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from instseg_ext.cli import visualize
from instseg_ext.config import add_shared_config
from instseg_ext.data import (
    InstSegDatasetMapper,
    TrainLoader,
    add_data_config,
    build_mapper,
    build_test_loader,
    build_train_loader,
    load_training_dicts,
    make_shapes,
    register,
)
from instseg_ext.data.augmentation import build_augmentations
from instseg_ext.data.coco import load_coco
from instseg_ext.data.stream import BatchStream, EpochOrder, seeded, slice_batch

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_images=10, size=48, seed=3)


@pytest.fixture(scope="module")
def dicts(shapes):
    return load_coco(*shapes)[0]


@pytest.fixture(scope="module")
def mapper():
    """Augment with flip, photometric changes, rotation and several scales."""
    return InstSegDatasetMapper(
        is_train=True,
        augmentations=build_augmentations(
            min_size=(32, 40, 48),
            max_size=64,
            flip="horizontal",
            vertical_flip=True,
            rotate90=True,
            brightness=(0.6, 1.4),
            contrast=(0.6, 1.4),
            saturation=(0.6, 1.4),
        ),
        image_format="BGR",
    )


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def fingerprint(sample):
    """Reduce a sample to what can be compared bit by bit."""
    instances = sample["instances"]
    return (
        sample["image_id"],
        sample["image"].numpy().tobytes(),
        instances.gt_masks.tensor.numpy().tobytes(),
        instances.gt_boxes.tensor.numpy().tobytes(),
        tuple(instances.gt_classes.tolist()),
    )


def prints(batches):
    return [[fingerprint(s) for s in batch] for batch in batches]


@pytest.fixture(scope="module")
def reference(dicts, mapper):
    """Eight batches of 4 loaded by one process without workers."""
    return prints(take(TrainLoader(dicts, mapper, batch_size=4, seed=7), 8))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(dicts, mapper, reference, workers):
    loader = TrainLoader(dicts, mapper, batch_size=4, seed=7, num_workers=workers)
    assert prints(take(loader, 8)) == reference


def test_samples_differ_between_epochs_and_seeds(dicts, mapper, reference):
    seen = {}
    for sample in itertools.chain.from_iterable(reference):
        seen.setdefault(sample[0], set()).add(sample)
    assert len(seen) == 10
    assert max(len(versions) for versions in seen.values()) >= 3  # each epoch augments anew
    assert prints(take(TrainLoader(dicts, mapper, batch_size=4, seed=8), 8)) != reference


@pytest.mark.parametrize("workers", [0, 2])
def test_start_iteration_drops_exactly_so_many_batches(dicts, mapper, reference, workers):
    loader = TrainLoader(
        dicts, mapper, batch_size=4, seed=7, start_iteration=5, num_workers=workers
    )
    assert prints(take(loader, 3)) == reference[5:]
    assert prints(take(loader, 3)) == reference[5:]  # a new iterator begins there again


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_processes_and_micro_batches_share_the_same_samples(
    dicts, mapper, reference, world_size, accumulate
):
    iterations = 3
    parts = []
    for rank in range(world_size):
        loader = TrainLoader(
            dicts,
            mapper,
            batch_size=4,
            seed=7,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            start_iteration=1,
        )
        assert loader.batch_size == 4 // (world_size * accumulate)
        parts.append(prints(take(loader, iterations * accumulate)))
    for i in range(iterations):
        micro = range(i * accumulate, (i + 1) * accumulate)
        union = [s for k in micro for rank in range(world_size) for s in parts[rank][k]]
        assert union == reference[1 + i]


@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_of_this_process_are_left_alone(dicts, mapper, workers):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    take(TrainLoader(dicts, mapper, batch_size=2, seed=7, num_workers=workers), 3)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_random_numbers_outside_do_not_matter(dicts, mapper, reference):
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    assert prints(take(TrainLoader(dicts, mapper, batch_size=4, seed=7), 2)) == reference[:2]


def test_seeded_covers_all_three_generators_and_errors():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    with seeded(1, 2):
        first = draw()
    with seeded(1, 2):
        assert draw() == first
    for other in ((1, 3), (2, 2), (1, 2, 1)):
        with seeded(*other):
            assert not set(draw()) & set(first)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1, 2):
        torch.rand(1) / (1 // 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_epoch_has_every_image_once():
    stream = BatchStream(EpochOrder(10, seed=0), batch_size=4)
    batches = list(itertools.islice(stream.batches(), 5))
    pairs = [pair for batch in batches for pair in batch]
    assert [position for position, _ in pairs] == list(range(20))
    indices = [index for _, index in pairs]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]
    assert list(itertools.islice(stream.batches(3), 2)) == batches[3:]


def test_grouping_keeps_shapes_together_and_loses_nothing():
    groups = np.array([0, 1, 0, 0, 1, 0, 0])
    stream = BatchStream(EpochOrder(7, seed=0), batch_size=3, groups=groups)
    batches = list(itertools.islice(stream.batches(), 70))
    for batch in batches:
        assert len({groups[index] for _, index in batch}) == 1
    positions = [position for batch in batches for position, _ in batch]
    assert positions == list(range(210))
    counts = np.bincount([index for batch in batches for _, index in batch], minlength=7)
    assert counts.min() >= 29
    assert counts.max() <= 31
    assert list(itertools.islice(stream.batches(33), 5)) == batches[33:38]


def test_repeat_factors_hold_on_average():
    order = EpochOrder(4, seed=0, repeat_factors=[1.0, 2.0, 1.5, 1.0])
    counts = sum(np.bincount(order.indices(e), minlength=4) for e in range(400))
    assert counts[[0, 1, 3]].tolist() == [400, 800, 400]
    assert 560 < counts[2] < 640
    np.testing.assert_array_equal(order.indices(5), order.indices(5))
    assert EpochOrder(4, seed=0, shuffle=False).indices(3).tolist() == [0, 1, 2, 3]
    for bad in ({"size": 0}, {"size": 2, "repeat_factors": [1.0]}):
        with pytest.raises(ValueError, match=r"no image|repeat factors"):
            EpochOrder(seed=0, **bad)


def test_slices_partition_a_batch():
    batch = list(range(12))
    parts = [
        slice_batch(batch, micro_batch=k, accumulate=3, rank=r, world_size=2)
        for k in range(3)
        for r in range(2)
    ]
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def _reject_even(sample):
    """Reject half of the images (a module-level function, so that workers can have it)."""
    return None if sample["image_id"] % 2 == 0 else {"image_id": sample["image_id"]}


def _reject_all(sample):
    return None


@pytest.mark.parametrize("workers", [0, 2])
def test_rejected_images_are_replaced_the_same_way(dicts, workers):
    def ids(number):
        loader = TrainLoader(dicts, _reject_even, batch_size=5, seed=1, num_workers=number)
        return [[s["image_id"] for s in batch] for batch in take(loader, 4)]

    result = ids(workers)
    assert result == ids(0)
    assert all(i % 2 for batch in result for i in batch)


def test_a_mapper_that_rejects_everything_is_an_error(dicts):
    with pytest.raises(ValueError, match=r"rejected 100 images.*\.png"):
        take(TrainLoader(dicts, _reject_all, batch_size=1, seed=1), 1)


def _draw(position, generator):
    """Give a number for each position, after one rejection for every third."""
    number = float(generator.random())
    return None if position % 3 == 0 and number < 0.5 else {"position": position, "x": number}


def _draw_nothing(position, generator):
    return None


@pytest.mark.parametrize(("workers", "world_size", "accumulate"), [(2, 1, 1), (0, 2, 1), (0, 1, 2)])
def test_samples_that_a_source_draws_depend_on_the_position_only(
    dicts, workers, world_size, accumulate
):
    whole = take(TrainLoader(dicts, None, batch_size=4, seed=1, source=_draw), 5)
    assert [[s["position"] for s in batch] for batch in whole[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    parts = [
        take(
            TrainLoader(
                dicts,
                None,
                batch_size=4,
                seed=1,
                start_iteration=2,
                num_workers=workers,
                rank=rank,
                world_size=world_size,
                accumulate=accumulate,
                source=_draw,
            ),
            3 * accumulate,
        )
        for rank in range(world_size)
    ]
    got = [s for k in range(3 * accumulate) for rank in range(world_size) for s in parts[rank][k]]
    assert got == [s for batch in whole[2:] for s in batch]
    others = take(TrainLoader(dicts, None, batch_size=4, seed=2, source=_draw), 5)
    assert others != whole


def test_a_source_that_finds_nothing_is_an_error(dicts):
    with pytest.raises(ValueError, match="No training sample was found in 100 tries"):
        take(TrainLoader(dicts, None, batch_size=1, seed=1, source=_draw_nothing), 1)


def test_batch_that_cannot_be_cut(dicts, mapper):
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 6.*ACCUMULATE 2.*multiple of 4"):
        TrainLoader(dicts, mapper, batch_size=6, seed=0, accumulate=2, world_size=2)
    with pytest.raises(ValueError, match="seed"):
        TrainLoader(dicts, mapper, batch_size=2, seed=-1)


@pytest.fixture
def cfg(shapes):
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    register("small_shapes", *shapes)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_shapes",), ("small_shapes",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (48,), 48
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 4, 0
    return cfg


def test_loader_of_a_config(cfg):
    cfg.INSTSEG.ACCUMULATE = 2
    loader = build_train_loader(cfg, build_mapper(cfg, True), seed=3, start_iteration=1)
    first, second = take(loader, 2)
    assert [len(first), len(second)] == [2, 2]
    assert first[0]["image"].shape == (3, 48, 48)
    cfg.INSTSEG.ACCUMULATE = 1
    (whole,) = take(build_train_loader(cfg, build_mapper(cfg, True), seed=3, start_iteration=1), 1)
    assert prints([first + second]) == prints([whole])


def test_samplers_of_a_config(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    assert len(take(build_train_loader(cfg, build_mapper(cfg, True), seed=3), 1)[0]) == 4
    cfg.DATALOADER.SAMPLER_TRAIN = "Nonsense"
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN.*Nonsense"):
        build_train_loader(cfg, build_mapper(cfg, True), seed=3)


def test_a_source_is_built_from_config_set_and_seed(cfg):
    def build_source(given, dicts, seed):
        assert given is cfg
        return lambda position, generator: {"size": len(dicts), "seed": seed}

    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    arguments = {"seed": 3, "limit": 2, "build_source": build_source}
    (batch,) = take(build_train_loader(cfg, build_mapper(cfg, True), **arguments), 1)
    assert batch == [{"size": 2, "seed": 3}] * 4
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN must be TrainingSampler"):
        build_train_loader(cfg, build_mapper(cfg, True), **arguments)


def test_what_is_trained_on(cfg, shapes, tmp_path):
    everything = load_training_dicts(["small_shapes"], filter_empty=False)
    usable = load_training_dicts(["small_shapes"])
    assert len(everything) == 10 >= len(usable)
    register("again", *shapes)
    assert len(load_training_dicts(["small_shapes", "again"])) == 2 * len(usable)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        load_training_dicts([])
    try:
        DatasetCatalog.register("other_classes", lambda: [])
        MetadataCatalog.get("other_classes").thing_classes = ["x"]
        with pytest.raises(ValueError, match="same classes"):
            load_training_dicts(["small_shapes", "other_classes"])
        with pytest.raises(ValueError, match="none of 0 images"):
            load_training_dicts(["other_classes"])
    finally:
        DatasetCatalog.remove("other_classes")


def test_a_missing_package_is_named_before_the_set_is_read(cfg, monkeypatch):
    def read():
        raise ModuleNotFoundError("No module named 'lvis'")

    monkeypatch.setitem(sys.modules, "lvis", None)  # as if it were not installed
    try:
        DatasetCatalog.register("foreign", read)
        MetadataCatalog.get("foreign").set(evaluator_type="lvis", thing_classes=["x"])
        message = r"'foreign' needs the package lvis: pip install"
        with pytest.raises(ImportError, match=message):
            load_training_dicts(["foreign"])
        with pytest.raises(ImportError, match=message):
            build_test_loader(cfg, "foreign", build_mapper(cfg, False))
        with pytest.raises(ImportError, match=message):
            visualize._pictures(SimpleNamespace(input=None, dataset="foreign", count=1), cfg)
    finally:
        DatasetCatalog.remove("foreign")
        MetadataCatalog.remove("foreign")


def test_test_loader_gives_each_image_once(cfg):
    batches = list(build_test_loader(cfg, "small_shapes", build_mapper(cfg, False)))
    assert [[s["image_id"] for s in b] for b in batches] == [[i] for i in range(1, 11)]
    limited = build_test_loader(cfg, "small_shapes", build_mapper(cfg, False), limit=3)
    assert [s["image_id"] for (s,) in limited] == [1, 2, 3]
    with pytest.raises(ValueError, match="no image to test on"):
        build_test_loader(cfg, "small_shapes", build_mapper(cfg, False), limit=0)


def test_pictures_of_samples(cfg, tmp_path):
    import cv2

    from instseg_ext.visualization.data import draw_training_samples

    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    method = SimpleNamespace(build_mapper=None, build_source=None)
    files = draw_training_samples(cfg, method, tmp_path / "out", count=5)
    assert [f.name for f in files] == [*(f"sample_{i:03d}.png" for i in range(5)), "samples.png"]
    sample = take(build_train_loader(cfg, build_mapper(cfg, True), seed=0), 1)[0][0]
    picture = cv2.imread(str(files[0]))
    factor = picture.shape[0] // 64
    assert picture.shape == (64 * factor, 64 * factor, 3)
    # Background pixels are those of the sample, object pixels are tinted.
    image = sample["image"].permute(1, 2, 0).numpy().astype(int)
    small = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
    change = np.abs(small - image).max(axis=2)
    inside = sample["instances"].gt_masks.tensor.any(dim=0).numpy()
    assert change[inside].mean() > 2 * change[~inside].mean()
    with pytest.raises(ValueError, match="at least 1"):
        draw_training_samples(cfg, method, tmp_path, count=0)
