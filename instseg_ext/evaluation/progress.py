"""Say how far a loop over images is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from tqdm import tqdm

__all__ = ["show_progress"]

_SECONDS = 10  # between two lines


@contextlib.contextmanager
def show_progress(total: int, deed: str, name: str) -> Iterator[Callable[[], None]]:
    """Show how many batches are done: a bar on a terminal, otherwise a line of the log at times.

    Args:
        total: number of batches of this process.
        deed: what is done with them, as the lines begin: "Evaluated".
        name: of the data set.

    Yields:
        to be called after each batch.
    """
    done = 0
    disable = None if comm.is_main_process() else True
    with tqdm(total=total, desc=name, disable=disable, leave=False) as bar:

        def advance() -> None:
            nonlocal done
            done += 1
            bar.update()
            if bar.disable:
                log_every_n_seconds(
                    logging.INFO,
                    f"{deed} {done} of {total} batches of {name}.",
                    n=_SECONDS,
                    name=__name__,
                )

        yield advance
