"""Every version or feature check of torch, torchvision, detectron2, numpy, Pillow and OpenCV.

Importing this module imports none of them. Features are tested, never version strings: the 0.6
release of detectron2 and its main branch of years later give the same version.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import torch

__all__ = [
    "DETECTRON2_INSTALL",
    "autocast",
    "call_supported",
    "detectron2_ops",
    "detectron2_origin",
    "find_contours",
    "grad_scaler",
    "has_detectron2_ops",
    "has_gui",
    "opencv",
    "require_detectron2",
    "require_torchvision_ops",
    "under_torchrun",
]

MINIMUM_TORCH = (2, 6)  # torch.load with weights_only by default

DETECTRON2_INSTALL = (
    "run `make env` in the checkout, or install the official source into this environment with "
    "`pip install --no-build-isolation --no-deps git+https://github.com/facebookresearch/detectron2`"
)


# --- detectron2 ---------------------------------------------------------------------------------


def _detectron2_folder() -> Path | None:
    """Return the folder of the detectron2 package, or None when there is no such package."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except ValueError:  # sys.modules["detectron2"] has no __spec__, or is None
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _is_release06(folder: Path) -> bool:
    """Tell by its source whether a detectron2 is the 0.6 release or older.

    The constant that Pillow 10 removed is a default argument of one of its transforms; the main
    branch lost it in July 2023.
    """
    transform = folder / "data" / "transforms" / "transform.py"
    try:
        return "Image.LINEAR" in transform.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _release06_obstacle() -> str | None:
    """Name the installed library with which the 0.6 release cannot work, if there is one."""
    import numpy as np
    from PIL import Image
    from PIL import __version__ as pillow_version

    if not hasattr(Image, "LINEAR"):
        return f"Pillow {pillow_version}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not hasattr(np, "bool"):
            return f"numpy {np.__version__}"
    return None


@lru_cache(maxsize=1)
def require_detectron2() -> None:
    """Check that a usable detectron2 can be imported, and import it.

    Checked from cheap to dear: no detectron2, the 0.6 release with libraries newer than it,
    torchvision without operators, a build that does not load.

    Raises:
        ImportError: with one sentence that names the culprit and the remedy.
    """
    folder = _detectron2_folder()
    if folder is None:
        raise ImportError(f"detectron2 is not installed: {DETECTRON2_INSTALL}.")
    if _is_release06(folder):
        obstacle = _release06_obstacle()
        if obstacle is not None:
            raise ImportError(
                f"the detectron2 at {folder} is the 0.6 release (or older), which does not work "
                f"with {obstacle}: uninstall it, then {DETECTRON2_INSTALL}."
            )
    require_torchvision_ops()
    try:
        with warnings.catch_warnings():
            # Scripted classes of detectron2 are deprecated in current torch; nothing to act on.
            warnings.simplefilter("ignore", FutureWarning)
            for name in ("detectron2.layers", "detectron2.data", "detectron2.modeling"):
                importlib.import_module(name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise ImportError(
            f"the detectron2 at {folder} cannot be imported ({_one_line(error)}): if the missing "
            f"name is another package, install that one; else {DETECTRON2_INSTALL}."
        ) from error


def has_detectron2_ops() -> bool:
    """Tell whether detectron2's compiled operators are present *and* load.

    Nothing of ours needs them; detectron2's own deformable and rotated layers do.
    """
    return detectron2_ops() == "loaded"


def detectron2_ops() -> str:
    """Describe detectron2's compiled operators without importing them by name.

    Returns:
        ``"loaded"``; ``"broken"`` when there are some that do not load with this torch;
        ``"absent"``, also without a usable detectron2.
    """
    try:
        require_detectron2()
    except ImportError:
        return "absent"
    import torch

    # detectron2.layers has tried to load them, and swallows the failure.
    if hasattr(torch.ops.detectron2, "nms_rotated"):
        return "loaded"
    folder = _detectron2_folder()
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = folder is not None and any((folder / f"_C{suffix}").exists() for suffix in suffixes)
    return "broken" if built else "absent"


def detectron2_origin() -> str:
    """Describe which detectron2 is installed: distribution, version, folder, kind of source.

    Returns:
        For example ``"sal-detectron2 0.7.2 in /env/site-packages/detectron2 (main branch)"``, or
        ``"not installed"``.
    """
    folder = _detectron2_folder()
    if folder is None:
        return "not installed"
    kind = "0.6 release or older" if _is_release06(folder) else "main branch"
    # A checkout on the path has no distribution at all.
    label = "detectron2"
    for name in importlib.metadata.packages_distributions().get("detectron2", []):
        label = f"{name} {importlib.metadata.version(name)}"
    return f"{label} in {folder} ({kind})"


# --- torch and torchvision ----------------------------------------------------------------------


@lru_cache(maxsize=1)
def require_torchvision_ops() -> None:
    """Check that torch is new enough and torchvision fits it, by running a tiny NMS.

    Raises:
        ImportError: with one sentence that names the culprit and the remedy.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise ImportError(
            f"torch cannot be imported ({_one_line(error)}): install torch >= 2.6 and the "
            "torchvision of the same release."
        ) from error
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < MINIMUM_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old: install torch >= 2.6.")
    remedy = f"install the torchvision release that belongs to torch {torch.__version__}"
    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
        keep = torchvision.ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {remedy}.") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise ImportError(
            f"torchvision's compiled operators do not load ({_one_line(error)}): {remedy}."
        ) from error
    if keep.tolist() != [0]:
        raise ImportError(f"torchvision's NMS gives wrong results: {remedy}.")


def autocast(
    device_type: str, dtype: torch.dtype, enabled: bool = True
) -> contextlib.AbstractContextManager:
    """Build an autocast context that also works, as a no-op, where torch has none.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ``"meta"``, ...
        dtype: the low precision type.
        enabled: False gives a context that switches an outer autocast off.
    """
    import torch

    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, dtype=dtype, enabled=enabled)


def grad_scaler(device_type: str, enabled: bool) -> torch.amp.GradScaler:
    """Build the loss scaler for a device; a disabled one passes values through unchanged."""
    import torch

    return torch.amp.GradScaler(device_type, enabled=enabled)


def under_torchrun() -> bool:
    """Tell whether this process was started by ``torchrun`` (or an equivalent launcher)."""
    return "TORCHELASTIC_RUN_ID" in os.environ or (
        "RANK" in os.environ and "WORLD_SIZE" in os.environ
    )


# --- OpenCV -------------------------------------------------------------------------------------


def opencv() -> ModuleType:
    """Import OpenCV, whichever package provides it.

    Raises:
        ImportError: with one sentence that names the missing part and the remedy.
    """
    try:
        return importlib.import_module("cv2")
    except ModuleNotFoundError as error:
        raise ImportError(
            "OpenCV is not installed: `pip install opencv-python` (or opencv-python-headless on a "
            "machine without a display)."
        ) from error
    except (ImportError, OSError) as error:
        raise ImportError(
            f"OpenCV does not load ({_one_line(error)}): a system library is missing, so replace "
            "the package by the one that needs none: `pip uninstall -y opencv-python && "
            "pip install opencv-python-headless`."
        ) from error


def has_gui() -> bool:
    """Tell whether OpenCV can open a window here: built with a toolkit, and a display to use."""
    try:
        information = opencv().getBuildInformation()
    except ImportError:
        return False
    built = any(
        line.partition(":")[2].strip().upper() not in ("", "NONE")
        for line in information.splitlines()
        if line.strip().startswith("GUI:")
    )
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    return built and (
        not sys.platform.startswith("linux") or any(os.environ.get(name) for name in displays)
    )


def find_contours(
    mask: np.ndarray, *, external: bool = True, simplify: bool = False
) -> list[np.ndarray]:
    """Trace the borders of the parts of a mask, with one result form for OpenCV 3, 4 and 5.

    Args:
        mask: (H, W) uint8 or bool, non-zero inside. Not modified.
        external: outer borders only; False adds the borders of holes.
        simplify: keep only the end points of straight runs.

    Returns:
        One (P, 2) int32 array of (x, y) pixel indices per border, P >= 1; an empty list for an
        empty mask.
    """
    import numpy as np

    cv2 = opencv()
    contours = cv2.findContours(
        np.ascontiguousarray(mask, dtype=np.uint8),
        cv2.RETR_EXTERNAL if external else cv2.RETR_CCOMP,
        cv2.CHAIN_APPROX_SIMPLE if simplify else cv2.CHAIN_APPROX_NONE,
    )[-2]
    return [np.asarray(contour, dtype=np.int32).reshape(-1, 2) for contour in contours]


# --- calls --------------------------------------------------------------------------------------


def call_supported(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with those keyword arguments that it has, dropping the others.

    For optional arguments that came or went between releases of a library. Positional arguments
    are passed on as they are.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return function(*args, **kwargs)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = {
            p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        }
        kwargs = {name: value for name, value in kwargs.items() if name in accepted}
    return function(*args, **kwargs)


def _one_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a final stop."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")
