"""Atomic writing, plain content, class-count mismatch, other people's files."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from instseg_ext.checkpoint import (
    InstSegCheckpointer,
    atomic_write,
    read_metadata,
    remove_leftovers,
    to_plain,
)
from instseg_ext.checkpoint.classifier import split_class_mismatch


class Model(nn.Module):
    """Two class-dependent layers, K classes in 4 anchors and K + 1 with background."""

    def __init__(self, num_classes=3, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.classify = nn.Conv2d(width, 4 * num_classes, 1)
        self.boxes = nn.Linear(width, num_classes + 1)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


class TestAtomic:
    def test_failure_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "x.pth"
        path.write_bytes(b"old")
        with pytest.raises(TypeError), atomic_write(path) as file:
            file.write("text into a binary file")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]

    def test_file_appears_only_when_complete(self, tmp_path):
        path = tmp_path / "x.pth"
        with atomic_write(path) as file:
            file.write(b"new")
            assert not path.exists()
        assert path.read_bytes() == b"new"

    def test_leftovers_of_a_killed_process_go_at_the_next_save(self, tmp_path):
        (tmp_path / ".model_0000009.pth.4711.part").write_bytes(b"half")
        for foreign in (".hidden", "x.part", ".y.part", ".z.txt.abc.part"):
            (tmp_path / foreign).write_bytes(b"")
        InstSegCheckpointer(Model(), str(tmp_path)).save("model_final")
        names = {p.name for p in tmp_path.iterdir()}
        assert ".model_0000009.pth.4711.part" not in names
        assert {".hidden", "x.part", ".y.part", ".z.txt.abc.part"} <= names
        assert remove_leftovers(tmp_path) == []

    def test_save_that_dies_keeps_the_last_checkpoint(self, tmp_path, monkeypatch):
        checkpointer = InstSegCheckpointer(Model(), str(tmp_path))
        checkpointer.save("first")

        def die(content, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save("second")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["first.pth", "last_checkpoint"]
        assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")


class TestPlain:
    def test_numpy_scalars_become_numbers(self):
        plain = to_plain({"a": np.float64(1.5), "b": [np.int32(2), (np.bool_(True),)], "c": None})
        assert plain == {"a": 1.5, "b": [2, (True,)], "c": None}
        assert type(plain["a"]) is float
        assert type(plain["b"][0]) is int

    def test_other_objects_are_named(self):
        with pytest.raises(TypeError, match=r"checkpoint.a\[1\] is a Model"):
            to_plain({"a": [1, Model()]})

    def test_checkpoint_is_readable_without_running_code(self, tmp_path):
        class Part:
            def state_dict(self):
                return {"best": np.float64(3.0), "array": np.ones(2)}

        metadata = {"class_names": ["a"], "config": "X: 1\n"}
        checkpointer = InstSegCheckpointer(Model(), str(tmp_path), metadata=metadata, part=Part())
        checkpointer.save("x", iteration=np.int64(5))
        content = torch.load(tmp_path / "x.pth", weights_only=True)
        assert content["part"]["best"] == 3.0
        assert content["iteration"] == 5
        assert content["model"]._metadata[""] == {"version": 1}
        assert read_metadata(str(tmp_path / "x.pth")) == metadata


class TestLoad:
    def round_trip(self, tmp_path, content, suffix=".pth", model=None, **kwargs):
        path = tmp_path / f"weights{suffix}"
        if suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        model = model or Model()
        rest = InstSegCheckpointer(model, **kwargs).load(str(path))
        return model.state_dict(), rest

    @pytest.mark.parametrize("form", ["raw", "model", "state_dict", "author", "module", "numpy"])
    def test_forms_of_state_dicts(self, tmp_path, form):
        want = Model().state_dict()
        arrays = {k: v.numpy() for k, v in want.items()}
        content = {
            "raw": want,
            "model": {"model": want, "iteration": 3},
            "state_dict": {"state_dict": want, "meta": {"epoch": 1}},
            "author": {"model": want, "__author__": "x", "instseg_ext": {"family": "y"}},
            "module": {"model": {f"module.{k}": v for k, v in want.items()}},
            "numpy": {"model": arrays},
        }[form]
        got, _ = self.round_trip(tmp_path, content)
        assert same(got, want)

    def test_plain_detectron2_checkpoint(self, tmp_path):
        want = Model()
        DetectionCheckpointer(want, str(tmp_path)).save("x", iteration=3)
        got = Model()
        InstSegCheckpointer(got).load(str(tmp_path / "x.pth"))
        assert same(got.state_dict(), want.state_dict())

    def test_ours_is_readable_by_detectron2(self, tmp_path):
        want = Model()
        InstSegCheckpointer(want, str(tmp_path), metadata={"class_names": ["a"]}).save("x")
        got = Model()
        DetectionCheckpointer(got).load(str(tmp_path / "x.pth"))
        assert same(got.state_dict(), want.state_dict())

    def test_pickle_with_matching_heuristics(self, tmp_path):
        want = Model().state_dict()
        renamed = {k.replace("stem", "backbone.stem"): v.numpy() for k, v in want.items()}
        renamed = {f"outer.{k}" if "stem" not in k else k: v for k, v in renamed.items()}
        shorter = {
            k.removeprefix("outer.").removeprefix("backbone."): v for k, v in renamed.items()
        }
        content = {"model": shorter, "__author__": "zoo", "matching_heuristics": True}
        model = nn.ModuleDict({"backbone": Model()})
        got, _ = self.round_trip(tmp_path, content, ".pkl", model)
        assert same(got, want)

    def test_reports_missing_and_unexpected_keys(self, tmp_path, caplog):
        weights = dict(Model().state_dict())
        del weights["stem.bias"]
        weights["surplus.weight"] = torch.ones(1)
        with caplog.at_level(logging.WARNING):
            self.round_trip(tmp_path, weights)
        assert "stem" in caplog.text
        assert "surplus" in caplog.text

    def test_weights_without_any_match(self, tmp_path):
        with pytest.raises(ValueError, match=r"belongs .*other\.weight.* `instseg convert`"):
            self.round_trip(tmp_path, {"other.weight": torch.ones(1)})

    def test_can_load_again_after_an_error(self, tmp_path):
        torch.save({"other.weight": torch.ones(1)}, tmp_path / "bad.pth")
        torch.save(Model().state_dict(), tmp_path / "good.pth")
        checkpointer = InstSegCheckpointer(Model())
        with pytest.raises(ValueError, match="no tensor"):
            checkpointer.load(str(tmp_path / "bad.pth"))
        checkpointer.load(str(tmp_path / "good.pth"))

    def test_unknown_query_is_refused(self, tmp_path):
        torch.save(Model().state_dict(), tmp_path / "x.pth")
        with pytest.raises(ValueError, match="unknown query colour"):
            InstSegCheckpointer(Model()).load(f"{tmp_path}/x.pth?colour=red")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"x.pth do not exist"):
            InstSegCheckpointer(Model()).load(str(tmp_path / "x.pth"))

    def test_without_weights_nothing_changes(self):
        model = Model()
        want = {k: v.clone() for k, v in model.state_dict().items()}
        assert InstSegCheckpointer(model).load("") == {}
        assert same(model.state_dict(), want)


class TestClassCount:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "x.pth"
        torch.save({"model": Model(num_classes=80).state_dict()}, path)
        return str(path)

    def test_one_error_names_keys_shapes_and_remedy(self, path):
        with pytest.raises(ValueError, match="another number of classes") as error:
            InstSegCheckpointer(Model(), num_classes=3).load(path)
        text = str(error.value)
        assert (
            "classify.weight is [320, 8, 1, 1] in the file and [12, 8, 1, 1] in the model" in text
        )
        assert "--reset-classifier" in text
        assert "stem" not in text

    @pytest.mark.parametrize("num_classes", [3, None])
    def test_reset_takes_over_everything_else(self, path, caplog, num_classes):
        model = Model()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        saved = torch.load(path, weights_only=True)["model"]
        with caplog.at_level(logging.WARNING):
            InstSegCheckpointer(model, reset_classifier=True, num_classes=num_classes).load(path)
        after = model.state_dict()
        assert torch.equal(after["stem.weight"], saved["stem.weight"])
        for key in ("classify.weight", "classify.bias", "boxes.weight", "boxes.bias"):
            assert torch.equal(after[key], before[key])
            assert key in caplog.text

    def test_reset_does_not_excuse_another_architecture(self, path):
        with pytest.raises(ValueError, match=r"another architecture: .*stem\.weight"):
            InstSegCheckpointer(Model(width=16), reset_classifier=True, num_classes=3).load(path)

    def test_a_file_of_as_many_classes_does_not_differ_in_them(self, tmp_path):
        """Of 1 class, 8 and 12 channels might be 4 anchors times 2 or 3 classes."""
        InstSegCheckpointer(Model(2), str(tmp_path), metadata={"class_names": ["a"]}).save("x")
        path = str(tmp_path / "x.pth")
        with pytest.raises(ValueError, match="another architecture"):
            InstSegCheckpointer(Model(3), reset_classifier=True, num_classes=1).load(path)
        InstSegCheckpointer(Model(3), reset_classifier=True, num_classes=3).load(path)

    def test_another_width_is_no_class_count(self):
        """Of 1 class, 256 and 64 channels are multiples of 8 and 2 classes, wherever they stand."""
        misfits = {
            "conv.weight": ((256, 256, 3, 3), (64, 64, 3, 3)),
            "conv.bias": ((256,), (64,)),
            "last.weight": ((1, 256, 1, 1), (1, 64, 1, 1)),
        }
        _, others = split_class_mismatch(misfits, 1)
        assert "conv.weight" in others
        # Rows count classes outright, columns hold the logits beside 256 features.
        point = {"point_head.predictor.weight": ((80, 336, 1), (3, 259, 1))}
        assert split_class_mismatch({**point, "bias": ((81,), (4,))}, 3)[1] == {}

    def test_equal_class_count_is_untouched(self, tmp_path):
        want = Model()
        torch.save(want.state_dict(), tmp_path / "x.pth")
        got = Model()
        InstSegCheckpointer(got, reset_classifier=True).load(str(tmp_path / "x.pth"))
        assert same(got.state_dict(), want.state_dict())

    def test_resume_never_resets(self, tmp_path):
        InstSegCheckpointer(Model(80), str(tmp_path)).save("x")
        checkpointer = InstSegCheckpointer(Model(3), str(tmp_path), reset_classifier=True)
        with pytest.raises(ValueError, match="another number of classes"):
            checkpointer.resume_or_load("", resume=True)

    @pytest.mark.parametrize(
        ("pairs", "expected"),
        [
            ({"a": ((80, 8), (3, 8))}, {"a"}),
            ({"a": ((81, 8), (4, 8))}, {"a"}),
            ({"a": ((320,), (12,)), "b": ((81,), (4,))}, {"a", "b"}),
            ({"a": ((3969,), (196,))}, {"a"}),  # 7 x 7 cells x (K + 1)
            ({"a": ((80, 16), (3, 8))}, set()),
            ({"a": ((80, 8, 1, 1), (3, 8))}, set()),
            ({"a": ((80,), (5,))}, set()),
        ],
    )
    def test_split(self, pairs, expected):
        by_classes, others = split_class_mismatch(pairs, 3)
        assert set(by_classes) == expected
        assert set(others) == set(pairs) - expected
