"""Steer atoms while a picture is painted: at some times, in a part of it, for some words.

Run from a folder with runs/my-dog, or as a notebook, cell by cell.
"""

# %% An adapter, its most important atom, and a way to look
from pathlib import Path

import numpy as np

import atomtune
from atomtune import Steer

pipe = atomtune.open_pipeline("embedded")
adapter = atomtune.load(pipe, "runs/my-dog")
best, out = adapter.atoms.top(1)[0].name, Path("runs/examples/steer")
out.mkdir(parents=True, exist_ok=True)


def paint(name: str, *steer: Steer) -> None:
    with adapter.using(steer=steer):
        atomtune.generate(pipe, ["a sks dog on a red background"])[0].save(out / f"{name}.png")


# %% One atom off, then twice as strong
paint("off", Steer(best, 0.0))
paint("twice", Steer(best, 2.0))

# %% The adapter in the first half of the steps only, where layout is decided (1 is noise, 0 the picture)
paint("early", Steer(time=(0.5, 1.0)))

# %% In the left half of the picture only; masks may be of any size
paint("left", Steer(where=np.array([[1.0, 0.0]])))

# %% Stronger on the words of the concept
paint("words", Steer(strength=1.5, words="sks dog"))

# %% All at once: they multiply
paint("all", Steer(best, 0.5), Steer(time=(0.2, 1.0)), Steer(strength=1.2, words="dog"))
