"""See atoms: where they fire, what they paint, which are alike, and which made a part of a picture.

Run from a folder with my-dog/ and runs/my-dog, or as a notebook, cell by cell.
"""

# %% An adapter, and a picture of its concept
from pathlib import Path

import numpy as np
from PIL import Image

import atomtune
from atomtune.backbones import backbone_of
from atomtune.data.picture import open_picture, to_tensor
from atomtune.explore.sheets import look
from atomtune.measure.maps import fired, twins
from atomtune.measure.regions import attribution

pipe = atomtune.open_pipeline("embedded")
adapter = atomtune.load(pipe, "runs/my-dog")
picture, words = open_picture("my-dog/0.png"), "a sks dog on a red background"

# %% The ranking, and a sheet for the first atoms: map, base, and strengths 0, 1, 2, 4
top = adapter.atoms.top(3)
for atom in top:
    print(
        atom.title, atom.path, f"importance {atom.importance:.4f}, density {atom.density:.2f}, purity {atom.purity:.2f}"
    )
look(adapter.atoms, top, words, Path("runs/examples/see"))

# %% Codes on the picture, by time; atoms that point the same way or fire together
backbone = backbone_of(pipe)
latents = backbone.encode_pictures(pipe, to_tensor(picture)[None])
codes = fired(pipe, backbone, latents, backbone.encode_prompts(pipe, [words]), adapter.atoms.ranked)
for name, near in twins(pipe, adapter.atoms.ranked, top, codes, number=2).items():
    print(name, near)

# %% Which atoms made the left half of the picture
half = np.zeros((picture.height, picture.width), np.uint8)
half[:, : picture.width // 2] = 255
for row in attribution(pipe, adapter.atoms.ranked, picture, words, Image.fromarray(half), top=4):
    print(row)
