"""Many saved adapters over one base: requests for different ones share a batch, and few are in memory at a time."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from atomtune import tuner
from atomtune.backbones import denoiser
from atomtune.errors import UserError, did_you_mean
from atomtune.sampling import batches, check, named, of_rows
from atomtune.tuner import BASE, activate, assigned, remove_adapter

SLOTS = itertools.count()
"""Numbers of what adapters are called on models, of all servers: two may have one pipeline, not at the same time."""


class Server:
    """Paints requests, each with the adapter that it names; adapters are read when asked for, the latest `held` stay.

    Nobody's adapter is active outside of `generate`: the pipeline is the base.
    """

    def __init__(self, pipe: Any, folders: Mapping[str, str | Path], held: int = 16) -> None:
        if held < 1:
            raise UserError(f"`held` must be at least 1, got {held}.")
        self.pipe, self.folders, self.held = pipe, folders, held
        self.slots: OrderedDict[str, str] = OrderedDict()
        """By adapter in memory, the one asked for longest ago first, what it is called on the model."""
        self.loads = 0
        """How many were read from disk so far."""
        self.one = threading.Lock()

    def generate(
        self,
        requests: Sequence[tuple[str | None, str]],
        *,
        seeds: Sequence[int],
        batch_size: int = 8,
        steps: int | None = None,
        guidance: float | None = None,
        **call: Any,
    ) -> list[Image.Image]:
        """A picture for each request, an adapter's name (None: the base) and a prompt.

        Other arguments as `atomtune.generate` takes them. Threads wait for each other. Raises UserError on a name
        without a folder, before anything is painted.
        """
        names, prompts = [name for name, _ in requests], [prompt for _, prompt in requests]
        check(prompts, seeds, batch_size)
        call |= named(steps, guidance)
        for name in names:
            if name is not None and name not in self.folders:
                raise UserError(f"No adapter is named {name!r}.{did_you_mean(name, self.folders)}")
        pictures: list[Image.Image] = []
        size = min(batch_size, self.held)  # so that a batch's adapters fit
        for start in range(0, len(requests), size):
            rows = slice(start, start + size)
            with self.one:
                slots = [BASE if name is None else self._slot(name, names[rows]) for name in names[rows]]
                with assigned(denoiser(self.pipe), slots):
                    own = of_rows(call, rows, len(prompts))
                    painted = batches(self.pipe, prompts[rows], list(seeds[rows]), size, **own)
                    pictures += [picture for batch in painted for picture in batch]
        return pictures

    def _slot(self, name: str, needed: Sequence[str | None]) -> str:
        """Where the adapter is attached; the one asked for longest ago, and not needed now, makes room for it."""
        base = denoiser(self.pipe)
        if name not in self.slots:
            if len(self.slots) >= self.held:
                oldest = next(other for other in self.slots if other not in needed)
                remove_adapter(base, self.slots.pop(oldest))
            slot = f"served{next(SLOTS)}"
            tuner.load(self.pipe, self.folders[name], slot)
            activate(base)
            self.loads += 1
            self.slots[name] = slot
        self.slots.move_to_end(name)
        return self.slots[name]

    def close(self) -> None:
        """Take all adapters off."""
        with self.one:
            while self.slots:
                remove_adapter(denoiser(self.pipe), self.slots.popitem()[1])
