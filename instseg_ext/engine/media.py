"""Pictures, folders, videos and cameras as sources of frames; videos as their destination."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.data.detection_utils import read_image

from instseg_ext import compat

__all__ = [
    "Background",
    "Source",
    "UnreadableError",
    "VideoSink",
    "expand_inputs",
    "output_names",
    "prefetch",
    "read_frames",
    "read_picture",
    "video_properties",
]

IMAGE_SUFFIXES = frozenset(
    [".bmp", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
VIDEO_SUFFIXES = frozenset(
    [".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"]
)
# Four-character codes that OpenCV's own wheels can write, by suffix of the file.
_CODECS = {".avi": "MJPG", ".mkv": "MJPG", ".mp4": "mp4v", ".mov": "mp4v", ".m4v": "mp4v"}
_DEFAULT_FPS = 25.0

Item = TypeVar("Item")


class UnreadableError(OSError):
    """A file that exists but does not hold a picture or a video."""


@dataclass(frozen=True)
class Source:
    """Where frames come from: an image or video file, or a camera with its number as ``path``."""

    kind: str
    path: str


def expand_inputs(inputs: Sequence[str]) -> list[Source]:
    """Turn what a user typed into sources, in the order typed, each file once.

    Args:
        inputs: files, folders (their pictures and videos, without subfolders), glob patterns, or
            the number of a camera.

    Raises:
        FileNotFoundError: if an input means nothing.
    """
    sources: dict[str, Source] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
            files = sorted(str(f) for f in path.iterdir() if f.suffix.lower() in known)
            if not files:
                raise FileNotFoundError(f"Folder {text} holds no pictures and no videos.")
        elif path.is_file():
            files = [text]
        elif text.isdecimal():
            sources[text] = Source("camera", text)
            continue
        else:
            files = sorted(f for f in glob.glob(text, recursive=True) if os.path.isfile(f))
            if not files:
                raise FileNotFoundError(
                    f"Input {text!r} is no file, no folder, no camera number, and matches nothing."
                )
        for file in files:
            kind = "video" if Path(file).suffix.lower() in VIDEO_SUFFIXES else "image"
            sources[os.path.abspath(file)] = Source(kind, file)
    return list(sources.values())


def output_names(sources: Sequence[Source]) -> list[str]:
    """Name a drawing for each source, without two of one name.

    Pictures and videos keep their name, with a suffix that can be written everywhere; sources of
    one name get a number.
    """
    names: list[str] = []
    for source in sources:
        path = Path(source.path)
        suffix = path.suffix.lower()
        if source.kind == "camera":
            stem, suffix = f"camera{source.path}", ".mp4"
        else:
            stem = path.stem
            if source.kind == "video":
                suffix = suffix if suffix in _CODECS else ".mp4"
            elif suffix not in (".jpg", ".jpeg", ".png"):
                suffix = ".png"
        name, number = f"{stem}{suffix}", 1
        while name.lower() in {other.lower() for other in names}:
            number += 1
            name = f"{stem}_{number}{suffix}"
        names.append(name)
    return names


def read_picture(path: str) -> np.ndarray:
    """Read a picture as the data loaders do, EXIF rotation included.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        UnreadableError: if the file is missing or holds no picture.
    """
    try:
        return np.ascontiguousarray(read_image(path, format="BGR"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(f"{path}: {' '.join(str(error).split())}") from error


def read_frames(source: Source, max_frames: int = 0) -> Iterator[np.ndarray]:
    """Yield the frames of a video or a camera, (H, W, 3) uint8 BGR.

    Args:
        source: of kind video or camera.
        max_frames: stop after so many; 0 reads to the end.

    Raises:
        UnreadableError: if it cannot be opened or gives no frame.
    """
    capture = _open(source)
    count = 0
    try:
        while not max_frames or count < max_frames:
            more, frame = capture.read()
            if not more:
                break
            count += 1
            yield frame
    finally:
        capture.release()
    if not count:
        raise UnreadableError(f"{source.kind} {source.path} gives no frame.")


def video_properties(source: Source) -> tuple[float, int]:
    """Give frames per second and number of frames (0 where unknown).

    Raises:
        UnreadableError: if it cannot be opened.
    """
    cv2 = compat.opencv()
    capture = _open(source)
    fps = capture.get(cv2.CAP_PROP_FPS)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT) if source.kind == "video" else 0
    capture.release()
    return (fps if 0 < fps < 1000 else _DEFAULT_FPS), max(0, int(count))


def _open(source: Source) -> Any:
    cv2 = compat.opencv()
    capture = cv2.VideoCapture(int(source.path) if source.kind == "camera" else source.path)
    if not capture.isOpened():
        raise UnreadableError(f"{source.kind} {source.path} cannot be opened.")
    return capture


class VideoSink:
    """Writes frames to a video file; the first frame decides the size."""

    def __init__(self, path: str | Path, fps: float) -> None:
        """Remember where to write; the file appears with the first frame."""
        self.path, self.fps = Path(path), fps
        self._writer: Any = None

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 BGR.

        Raises:
            ValueError: if OpenCV cannot write this kind of file.
        """
        cv2 = compat.opencv()
        if self._writer is None:
            code = cv2.VideoWriter_fourcc(*_CODECS[self.path.suffix.lower()])
            size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self.path), code, self.fps, size)
            if not self._writer.isOpened():
                raise ValueError(
                    f"{self.path} cannot be written: this OpenCV has no encoder for it."
                )
        self._writer.write(frame)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


_END = object()


def prefetch(items: Iterable[Item], depth: int = 4) -> Iterator[Item]:
    """Run an iterator in a thread of its own, ``depth`` items ahead; its exceptions come out here.

    The thread ends, and the iterator is closed, when this generator is.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = deque(pool.submit(next, iterator, _END) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(pool.submit(next, iterator, _END))
                yield item
        finally:
            for task in pending:
                task.cancel()
            pool.shutdown()
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


class Background:
    """Runs calls one after the other in a thread, with at most ``depth`` of them waiting.

    An error comes out of a later call of ``submit`` or of ``finish``.
    """

    def __init__(self, depth: int = 4) -> None:
        """Start with nothing to do."""
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future] = deque()
        self._depth = depth

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Run ``function(*args)`` soon."""
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(function, *args))

    def finish(self) -> None:
        """Wait for everything that was submitted."""
        while self._pending:
            self._pending.popleft().result()
        self._pool.shutdown()
