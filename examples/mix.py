"""Mix adapters: side by side with weights, each in its own region or words, which atoms conflict, and all in one file.

Run from a folder with runs/my-dog and runs/my-style, or as a notebook, cell by cell.
"""

# %% Two adapters as one; atoms are named dog/L17[137] then
from pathlib import Path

import numpy as np

import atomtune
from atomtune import Steer
from atomtune.mix import conflicts, merge, mix, orthogonality, weaker

pipe = atomtune.open_pipeline("embedded")
mixture = mix(pipe, {"dog": "runs/my-dog", "style": "runs/my-style"}, {"style": 0.7})
prompts, out = ["a sks dog in my style"], Path("runs/examples/mix")
out.mkdir(parents=True, exist_ok=True)
atomtune.generate(pipe, prompts)[0].save(out / "both.png")

# %% Each in its own half of the picture
left = np.array([[1.0, 0.0]])
with mixture.using(steer={"dog": [Steer(where=left)], "style": [Steer(where=1 - left)]}):
    atomtune.generate(pipe, prompts)[0].save(out / "halves.png")

# %% The dog falls silent beside words that its captions never had: let it read its own
with mixture.using(own_words={"dog": {"in my style": ""}}):
    atomtune.generate(pipe, prompts)[0].save(out / "own-words.png")

# %% Which atoms fire together and write along each other; the weaker ones out for now
found = conflicts(mixture, prompts)
print(len(found), "conflicts; orthogonality", orthogonality(mixture, "dog", "style"))
with mixture.using(atoms=dict.fromkeys(weaker(found), 0.0)):
    atomtune.generate(pipe, prompts)[0].save(out / "fewer.png")

# %% Saved as parts, and as one adapter, in which each atom keeps the gate of its part
mixture.save(out / "parts")
merge(mixture).save(out / "one")
