"""The judge: a small network that names the object and the style in a picture of the world."""

from __future__ import annotations

from functools import cache
from importlib import resources
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from atomtune.scenes.read import crops
from atomtune.scenes.render import NEW_STYLES, render
from atomtune.scenes.world import CLASS_OF, STYLES, Scene

NAMES = tuple(CLASS_OF)
LOOKS = (*STYLES, *NEW_STYLES)
SIDE = 36
"""Side of the window that the judge sees, in pixels."""


class Judge(nn.Module):
    """Convolutions, a mean over the window, and two heads."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.trunk = nn.Sequential(
            *[
                layer
                for i, o in pairwise(widths)
                for layer in (nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.SiLU())
            ],
            nn.Flatten(),
            nn.Linear(4 * width * 9, 128),
        )
        self.name = nn.Linear(128, len(NAMES))
        self.style = nn.Linear(128, len(LOOKS))

    def forward(
        self, windows: UInt8[torch.Tensor, "n 36 36 3"]
    ) -> tuple[Float[torch.Tensor, "n 128"], Float[torch.Tensor, "n names"], Float[torch.Tensor, "n looks"]]:
        """Features, logits of the object and logits of the style."""
        x = windows.permute(0, 3, 1, 2).float() / 127.5 - 1
        features = self.trunk(x)
        hidden = nn.functional.silu(features)
        return features, self.name(hidden), self.style(hidden)


@cache
def load() -> Judge:
    """The trained judge, in eval mode."""
    from safetensors.torch import load as parse

    judge = Judge()
    data = resources.files("atomtune.scenes").joinpath("assets/judge.safetensors").read_bytes()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in parse(data).items()})
    return judge.eval()


@torch.no_grad()
def look(pictures: list[UInt8[np.ndarray, "64 64 3"]], asked: list[Scene]) -> list[dict[str, float]]:
    """For each picture: `named` and `styled` (share of its things judged as asked), and `similarity`.

    `similarity` is the mean cosine between the judge's features of each thing and those of its true rendering.
    """
    judge = load()
    rows = []
    for picture, scene in zip(pictures, asked, strict=True):
        seen, names, styles = judge(torch.from_numpy(crops(picture, scene)))
        true = judge(torch.from_numpy(crops(render(scene), scene)))[0]
        want = torch.tensor([NAMES.index(t.name) for t in scene.things])
        look = torch.tensor([LOOKS.index(t.style) for t in scene.things])
        rows.append(
            {
                "named": (names.argmax(1) == want).float().mean().item(),
                "styled": (styles.argmax(1) == look).float().mean().item(),
                "similarity": nn.functional.cosine_similarity(seen, true).mean().item(),
            }
        )
    return rows
