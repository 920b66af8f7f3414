"""The checkpointer of training, evaluation and prediction."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer

from instseg_ext.checkpoint.atomic import atomic_write, remove_leftovers
from instseg_ext.checkpoint.classifier import split_class_mismatch
from instseg_ext.checkpoint.plain import to_plain
from instseg_ext.checkpoint.readers import fetch_weights, read_weights

__all__ = ["Averaged", "InstSegCheckpointer"]

logger = logging.getLogger(__name__)


class Averaged(Protocol):
    """Weights that shadow the trained ones, such as an exponential moving average."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the shadow weights under the model's parameter names."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the shadow weights from a checkpoint."""

    def reset(self) -> None:
        """Start again from the model's present weights."""


class InstSegCheckpointer(DetectionCheckpointer):
    """Reads weights safely and writes checkpoints atomically.

    A checkpoint's ``"model"`` entry always holds the weights that evaluation uses, so that any
    program that reads a detectron2 checkpoint gets them: with averaging those are the averaged
    ones, and the weights under training lie beside them in ``"train_model"``, from which training
    resumes.

    Args:
        model: the module, or its DDP wrapper.
        save_dir: local folder for checkpoints.
        metadata: stored in each file under ``"instseg_ext"``: class names, config text, version.
        averaged: shadow weights, saved and restored as said above.
        reset_classifier: leave the classifier at its initial weights when the class count of a
            file is not the model's, instead of raising.
        num_classes: foreground classes of the model, to tell a classifier from another misfit;
            ``None`` accepts any single differing dimension as one that counts classes.
        unsafe: read files that may run code.
        **checkpointables: objects with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        metadata: Mapping[str, Any] | None = None,
        averaged: Averaged | None = None,
        reset_classifier: bool = False,
        num_classes: int | None = None,
        unsafe: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.logger = logger
        self.metadata = dict(metadata or {})
        self.averaged = averaged
        self.reset_classifier = reset_classifier
        self.num_classes = num_classes
        self.unsafe = unsafe
        self._resuming = False

    # --- writing ---------------------------------------------------------------------------------

    def save(self, name: str, **extra: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and make it the checkpoint to resume from.

        Args:
            name: file name without suffix.
            **extra: further entries, such as ``iteration``.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = self._weights()
        for key, checkpointable in self.checkpointables.items():
            state[key] = checkpointable.state_dict()
        self._write(name, {**state, **extra})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **extra: Any) -> None:
        """Write only the weights that evaluation uses; training does not resume from this file."""
        if self.save_dir and self.save_to_disk:
            self._write(name, {"model": self._weights()["model"], **extra})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file that ``resume_or_load`` resumes from."""
        with atomic_write(Path(self.save_dir) / "last_checkpoint") as file:
            file.write(last_filename_basename.encode())

    def _weights(self) -> dict[str, Any]:
        weights = self.model.state_dict()
        if self.averaged is None:
            return {"model": weights}
        return {"model": self.averaged.weights(), "train_model": weights}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        for leftover in remove_leftovers(self.save_dir):
            logger.info("Removed %s, left by a process that was killed while saving.", leftover)
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("Saving checkpoint to %s", path)
        content = to_plain({**content, "instseg_ext": self.metadata})
        with atomic_write(path) as file:
            torch.save(content, file)

    # --- reading ---------------------------------------------------------------------------------

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the last checkpoint of ``save_dir`` if asked to and there is one.

        Args:
            path: weights to start from otherwise; empty for none.
            resume: whether to look for a checkpoint.

        Returns:
            Entries of the file that nobody consumed, such as ``iteration``.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it cannot be read or does not fit the model.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        self._resuming = True
        try:
            return self.load(self.get_checkpoint_file())
        finally:
            self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights (and the checkpointables asked for); see detectron2.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it cannot be read or does not fit the model.
        """
        if path:
            fetch_weights(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # The base class keeps it set after an exception and then refuses to load again.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_weights(filename, self.unsafe)
        query = parse_qs(self._parsed_url_during_load.query)
        if query.pop("matching_heuristics", ["False"]) == ["True"]:
            content["matching_heuristics"] = True
        if query:
            raise ValueError(
                f"{urlparse(filename).path}: unknown query {', '.join(query)}; only "
                "matching_heuristics=True is understood."
            )
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        train_weights = checkpoint.pop("train_model", None)
        averaged_weights = None
        if self._resuming and train_weights is not None:
            averaged_weights, checkpoint["model"] = checkpoint["model"], train_weights
        checkpoint["model"] = _without_prefix(checkpoint["model"])
        for name, module in self.model.named_modules():
            # Modules whose parameters once had other names; classes are counted by the new ones.
            if hasattr(module, "rename_old_names"):
                module.rename_old_names(checkpoint["model"], f"{name}." if name else "")
        if not checkpoint.get("matching_heuristics", False):
            # With heuristics the names are not the model's yet; detectron2 compares shapes itself.
            names = (checkpoint.get("instseg_ext") or {}).get("class_names")
            self._drop_misfits(checkpoint["model"], len(names) if names else None)
        incompatible = super()._load_model(checkpoint)
        self._check_overlap(incompatible, checkpoint)
        self._load_averaged(averaged_weights)
        return incompatible

    def _load_averaged(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        if self.averaged is None:
            return
        if weights is not None:
            self.averaged.load_weights(weights)
            return
        if self._resuming:
            logger.warning("The checkpoint holds no averaged weights: averaging starts here.")
        self.averaged.reset()

    def _drop_misfits(self, weights: dict[str, Any], file_classes: int | None) -> None:
        """Remove classifier tensors of another class count if allowed, else raise.

        Args:
            weights: of the file; changed in place.
            file_classes: how many classes the file says to have been trained for.
        """
        expected = self.model.state_dict()
        misfits = {
            key: (tuple(value.shape), tuple(expected[key].shape))
            for key, value in weights.items()
            if key in expected and tuple(value.shape) != tuple(expected[key].shape)
        }
        if not misfits:
            return
        by_classes, others = split_class_mismatch(misfits, self.num_classes)
        if file_classes is not None and file_classes == self.num_classes:
            # Where classes are few, almost any two sizes could count them.
            others = misfits
        if others:
            raise ValueError(
                f"the weights are of another architecture: {_describe(others)}. Use the config "
                "they were trained with, or other MODEL.WEIGHTS."
            )
        if not self.reset_classifier or self._resuming:
            raise ValueError(
                f"the weights were trained for another number of classes: {_describe(by_classes)}. "
                "Pass --reset-classifier to start the classifier from its initial weights and take "
                "over everything else."
            )
        for key in by_classes:
            del weights[key]
        logger.warning("Classifier reset to its initial weights: %s.", _describe(by_classes, 1000))

    def _check_overlap(self, incompatible: Any, checkpoint: Mapping[str, Any]) -> None:
        missing = set(incompatible.missing_keys)
        if missing and missing >= set(dict(self.model.named_parameters())):
            heuristics = bool(checkpoint.get("matching_heuristics", False))
            remedy = "" if heuristics else ", or append ?matching_heuristics=True to a URL"
            raise ValueError(
                "no tensor of the weights belongs to the model (unused, for example: "
                f"{', '.join(incompatible.unexpected_keys[:3]) or 'none'}): use other "
                "MODEL.WEIGHTS, bring a file of another code base into our names with `instseg "
                f"convert`{remedy}."
            )


def _without_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    """Return ``weights`` without the prefix of parallel wrappers."""
    if weights and all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _describe(misfits: Mapping[str, tuple[tuple, tuple]], most: int = 4) -> str:
    shown = [
        f"{key} is {list(found)} in the file and {list(wanted)} in the model"
        for key, (found, wanted) in list(misfits.items())[:most]
    ]
    more = len(misfits) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
