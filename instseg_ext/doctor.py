"""``instseg doctor``: what is installed, what will not work here, and how to mend it.

Each check returns a :class:`Finding` and never raises for a broken environment: describing those
is its purpose. The operators are run, not just looked up.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from instseg_ext import compat, resources

__all__ = ["Finding", "add_parser", "diagnose", "main", "run"]

# What a broken or mismatched package raises when it is imported or first used.
_BROKEN = (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError)

# Optional packages: name to import, name to install, and what it is for.
_OPTIONAL = (
    ("tensorboard", "tensorboard", "TensorBoard logs"),
    ("safetensors", "safetensors", "reading .safetensors files"),
    ("h5py", "h5py", "reading HDF5 files of Caffe"),
    ("google.protobuf", "protobuf", "reading .caffemodel files of Caffe"),
    ("scipy", "scipy", "reading .mat files of SBD, regions for SDS"),
    ("wandb", "wandb", "WandB logs"),
    ("lvis", "lvis", "LVIS evaluation"),
    ("cityscapesscripts", "cityscapesscripts", "Cityscapes evaluation"),
    ("onnx", "onnx", "export to ONNX"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: the part, for example ``"torch"``.
        text: what was found.
        problem: what does not work because of it and how to mend it; empty when all is well.
        fatal: whether training, evaluating and predicting are impossible with it.
    """

    name: str
    text: str
    problem: str = ""
    fatal: bool = False


# --- checks -------------------------------------------------------------------------------------


def _check_python() -> Finding:
    return Finding("Python", f"{platform.python_version()} in {sys.prefix}")


def _check_torch() -> Finding:
    try:
        import torch
    except _BROKEN as error:
        return _missing("torch", error, "install torch >= 2.6 and the torchvision that fits it")
    text = f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < compat.MINIMUM_TORCH:
        return Finding("torch", text, "it is too old: install torch >= 2.6.", fatal=True)
    return Finding("torch", text)


def _check_cuda() -> Finding:
    try:
        import torch
    except _BROKEN:
        return Finding("CUDA", "unknown without torch")
    if torch.version.cuda is None:
        return Finding("CUDA", "torch is a CPU build: everything runs on the CPU")
    if not torch.cuda.is_available():
        return Finding(
            "CUDA", f"build for {torch.version.cuda}, no usable GPU: everything runs on the CPU"
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    text = f"{torch.version.cuda}: {', '.join(names)}"
    try:
        total = torch.ones(4, device="cuda").sum().item()
    except RuntimeError as error:
        problem = (
            f"the GPU does not compute ({_one_line(error)}): use MODEL.DEVICE cpu, or install a "
            "torch built for this GPU and driver."
        )
        return Finding("CUDA", text, problem)
    return Finding("CUDA", text, "" if total == 4.0 else "the GPU computes wrong sums.")


def _check_torchvision() -> Finding:
    try:
        compat.require_torchvision_ops()
        import torchvision

        _run_torchvision_ops()
    except _BROKEN as error:
        return _missing("torchvision", error, "install the torchvision that belongs to this torch")
    return Finding("torchvision", f"{torchvision.__version__}: nms, roi_align, deform_conv2d work")


def _run_torchvision_ops() -> None:
    """Run the operators that every method rests on, on a few numbers with a known answer."""
    import torch
    from torchvision import ops

    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled = ops.roi_align(image, torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]]), 1, aligned=True)
    kernel = torch.ones(1, 1, 1, 1)
    moved = ops.deform_conv2d(image, torch.zeros(1, 2, 4, 4), kernel)
    if abs(pooled.item() - 7.5) > 1e-4 or not torch.allclose(moved, image):
        raise RuntimeError("its operators give wrong results")


def _check_detectron2() -> Finding:
    origin = compat.detectron2_origin()
    try:
        compat.require_detectron2()
    except ImportError as error:
        return Finding("detectron2", origin, str(error), fatal=True)
    state = compat.detectron2_ops()
    text = f"{origin}; compiled operators: {state}"
    if state == "broken":
        problem = (
            "its compiled operators do not load with this torch: nothing of ours needs them, but "
            "detectron2's own rotated and deformable layers do; rebuild it to have those."
        )
        return Finding("detectron2", text, problem)
    return Finding("detectron2", text if state == "loaded" else f"{text} (not needed)")


def _check_opencv() -> Finding:
    try:
        cv2 = compat.opencv()
    except ImportError as error:
        return Finding("OpenCV", "not usable", str(error), fatal=True)
    if compat.has_gui():
        return Finding("OpenCV", f"{cv2.__version__}, windows work")
    return Finding("OpenCV", f"{cv2.__version__}, no windows here: pictures go to files")


def _check_numpy() -> Finding:
    try:
        import numpy as np
    except _BROKEN as error:
        return _missing("numpy", error, "pip install numpy")
    return Finding("numpy", np.__version__)


def _check_pillow() -> Finding:
    try:
        import PIL
        from PIL import Image

        Image.new("RGB", (2, 2)).resize((4, 4), Image.BILINEAR)
    except _BROKEN as error:
        return _missing("Pillow", error, "pip install pillow")
    return Finding("Pillow", PIL.__version__)


def _check_pycocotools() -> Finding:
    try:
        import numpy as np
        from pycocotools import mask

        area = int(mask.area(mask.encode(np.ones((2, 3), dtype=np.uint8, order="F"))))
    except _BROKEN as error:
        return _missing("pycocotools", error, "pip install --force-reinstall pycocotools")
    problem = "" if area == 6 else "it counts pixels wrongly: reinstall it."
    return Finding("pycocotools", _version("pycocotools"), problem, fatal=bool(problem))


def _check_faster_coco_eval() -> Finding:
    try:
        importlib.import_module("faster_coco_eval")
    except _BROKEN as error:
        return _missing("faster-coco-eval", error, "pip install faster-coco-eval")
    return Finding("faster-coco-eval", _version("faster-coco-eval"))


def _check_files() -> Finding:
    root = resources.root()
    missing = [name for name in ("configs", "projects", "datasets") if not (root / name).is_dir()]
    if missing:
        problem = f"{', '.join(missing)} missing there: install instseg_ext again."
        return Finding("files", str(root), problem, fatal=True)
    return Finding("files", f"configs and bundled data in {root}")


def _check_optional() -> Finding:
    found, absent = [], []
    for module, name, purpose in _OPTIONAL:
        if _is_there(module):
            found.append(name)
        else:
            absent.append((name, purpose))
    problem = ""
    if absent:
        problem = (
            f"no {', '.join(purpose for _, purpose in absent)}; for these "
            f"`pip install {' '.join(name for name, _ in absent)}` (what you need of it)."
        )
    return Finding("optional", ", ".join(found) or "none", problem)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is a part of
        return False


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _check_python,
    _check_torch,
    _check_cuda,
    _check_torchvision,
    _check_detectron2,
    _check_numpy,
    _check_pillow,
    _check_opencv,
    _check_pycocotools,
    _check_faster_coco_eval,
    _check_files,
    _check_optional,
)


def _missing(name: str, error: BaseException, remedy: str) -> Finding:
    """Describe a package without which nothing works."""
    reason = _one_line(error)
    problem = (
        reason if remedy.split()[0] in reason and "install" in reason else f"{reason}: {remedy}"
    )
    return Finding(name, "not usable", problem.rstrip(".") + ".", fatal=True)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


# --- report -------------------------------------------------------------------------------------


def diagnose() -> list[Finding]:
    """Run all checks, in the order in which one part needs the other."""
    return [check() for check in _CHECKS]


def report(findings: Sequence[Finding]) -> str:
    """Lay the findings out on one screen: the parts first, then what to do about them."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok" if not finding.problem else "FAIL" if finding.fatal else "note"
        lines += _wrap(f"{mark:>4}  {finding.name:<{width}}  ", finding.text)
    problems = [finding for finding in findings if finding.problem]
    if problems:
        lines.append("")
    told = set()
    for finding in problems:  # what follows from an earlier finding is not told again
        if finding.problem not in told:
            lines += _wrap("- ", f"{finding.name}: {finding.problem}")
        told.add(finding.problem)
    fatal = any(finding.fatal for finding in problems)
    verdict = "cannot" if fatal else "can"
    return "\n".join([*lines, "", f"Training, evaluating and predicting {verdict} run here.", ""])


def _wrap(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        100,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
        break_long_words=False,
    )


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor", help="say what is installed, what will not work and how to mend it"
    )
    parser.set_defaults(run=run, needs_detectron2=False)


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0 when the main job can run here, else 1.
    """
    findings = diagnose()
    sys.stdout.write(report(findings))
    return int(any(finding.fatal for finding in findings))


def main() -> int:
    """Run ``python -m instseg_ext.doctor``."""
    return run(argparse.Namespace())


if __name__ == "__main__":
    sys.exit(main())
