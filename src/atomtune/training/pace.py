"""How long steps take, and how much memory."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

WINDOW = 50
SLOW = 3.0


class Pace:
    """Tells of a step that takes `SLOW` times the median of those before it, once in `WINDOW` steps.

    Such steps are what memory that spills from the accelerator into the system's looks like.
    """

    def __init__(self, tell: Callable[[str], None], device: torch.device) -> None:
        self.tell, self.device = tell, device
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.told = -WINDOW

    def took(self, step: int, seconds: float) -> None:
        """Note a step, from 1, and what it took."""
        usual = statistics.median(self.recent) if len(self.recent) >= 10 else float("inf")
        if seconds > SLOW * usual and step - self.told >= WINDOW:
            self.told = step
            self.tell(
                f"warning: step {step} took {seconds:.3g} s, {seconds / usual:.1f} times the median. If this goes on, "
                "memory may be full: lower --batch-size or --resolution, or give --gradient-checkpointing."
            )
        self.recent.append(seconds)

    def facts(self) -> dict[str, Any]:
        """Median seconds a step, and on a GPU the peak of its memory in GiB."""
        if not self.recent:
            return {}
        facts = {"seconds_per_step": round(statistics.median(self.recent), 4)}
        if self.device.type == "cuda":
            facts["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return facts
