"""Curves for TensorBoard, W&B and the others that accelerate knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from atomtune.errors import UserError


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """The trackers to use; None: TensorBoard, where it is installed. Raises UserError on one that is not installed."""
    here = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    if names is None:
        return ("tensorboard",) if "tensorboard" in here else ()
    for name in names:
        if name not in here:
            raise UserError(f"`trackers`: {name} is not installed. Install it, or leave it out.")
    return tuple(names)


class Trackers:
    """Several trackers as one. What one of them raises is told, and it is left out from then on."""

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.parts: dict[str, Any] = {}
        for name in names:
            self._try(name, partial(self._start, name, run, config))

    def _start(self, name: str, run: Path, config: Mapping[str, Any]) -> None:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": run / "trackers"} if kind.requires_logging_directory else {}
        tracker = kind(run.name if place else "atomtune", **place)
        tracker.start()
        if not place:  # TensorBoard would make a second run of it
            tracker.store_init_configuration(dict(config))
        self.parts[name] = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The values after a step."""
        for name, tracker in list(self.parts.items()):
            self._try(name, partial(tracker.log, dict(values), step=step))

    def finish(self) -> None:
        """Close them."""
        for name, tracker in list(self.parts.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # a tracker's trouble is not the run's
            self.parts.pop(name, None)
            self.tell(f"warning: tracker {name} is left out: {type(error).__name__}: {error}")
