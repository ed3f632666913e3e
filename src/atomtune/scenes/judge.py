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
def look_each(picture: UInt8[np.ndarray, "64 64 3"], asked: Scene) -> list[dict[str, float]]:
    """For each thing that was asked for: `named` and `styled` (1 or 0, judged as asked) and `similarity`.

    `similarity` is the cosine between the judge's features of the thing and of its true rendering.
    """
    judge = load()
    seen, names, styles = judge(torch.from_numpy(crops(picture, asked)))
    true = judge(torch.from_numpy(crops(render(asked), asked)))[0]
    similar = nn.functional.cosine_similarity(seen, true)
    return [
        {
            "named": float(NAMES[int(names[i].argmax())] == thing.name),
            "styled": float(LOOKS[int(styles[i].argmax())] == thing.style),
            "similarity": similar[i].item(),
        }
        for i, thing in enumerate(asked.things)
    ]


def look(pictures: list[UInt8[np.ndarray, "64 64 3"]], asked: list[Scene]) -> list[dict[str, float]]:
    """For each picture: the means over its things of what `look_each` tells."""
    rows = [look_each(picture, scene) for picture, scene in zip(pictures, asked, strict=True)]
    return [{name: float(np.mean([thing[name] for thing in row])) for name in row[0]} for row in rows]
