"""Where atoms fire in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atomtune.atoms import Atom, noised_pass
from atomtune.backbones import Backbone, Conditioning
from atomtune.tuner import unwrap


@torch.no_grad()
def code_maps(
    model: Any,
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    atoms: Sequence[Atom],
    *,
    adapter: str = "default",
    times: Sequence[float] = (0.3, 0.5, 0.7),
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "pictures rows columns"]]:
    """The mean code over several times at each picture token, by the name of the atom; gate open.

    An atom whose site sees no picture tokens has no map.
    """
    base = unwrap(model)
    rows, columns = backbone.grid(base, latents)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Float[np.ndarray, "pictures rows columns"]] = {}
    for time in times:
        _, _, _, codes = noised_pass(base, backbone, latents, conditioning, time, generator, adapter)
        for atom in atoms:
            image = backbone.layout(atom.path, conditioning, rows * columns).image
            if not image.any():
                continue
            grid = codes[atom.path][..., atom.row][image].float().view(len(latents), rows, columns).cpu().numpy()
            found[atom.name] = found.get(atom.name, np.zeros_like(grid)) + grid / len(times)
    return found
