"""A running mean of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of parameters, in their precision.

    The decay rises as (1 + n) / (10 + n) with the number of updates, up to the one given: a short run is not held
    back by its first steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.mean = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in, after a step of the optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for mean, parameter in zip(self.mean, self.parameters, strict=True):
            mean.lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the mean."""
        before = [p.detach().clone() for p in self.parameters]
        self.apply()
        try:
            yield
        finally:
            self._copy(before)

    def apply(self) -> None:
        """The parameters become the mean."""
        self._copy(self.mean)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """What `load` reads."""
        return {"updates": torch.tensor(self.updates), **{str(i): mean for i, mean in enumerate(self.mean)}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.updates = int(state["updates"])
        for i, mean in enumerate(self.mean):
            mean.copy_(state[str(i)])
