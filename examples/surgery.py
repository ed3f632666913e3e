"""Diff and surgery: name atoms, keep or drop them for good, and say what became of each.

Run from a folder with runs/my-dog, or as a notebook, cell by cell.
"""

# %% Give an atom a name; it is found by that from then on
from collections import Counter
from pathlib import Path

import atomtune
from atomtune import surgery
from atomtune.atoms import diff

pipe = atomtune.open_pipeline("embedded")
adapter = atomtune.load(pipe, "runs/my-dog")
first, second = (atom.name for atom in adapter.atoms.top(2))
surgery.name(adapter, {first: "ears"}, {first: "fires on the left one only"})
print(adapter.atoms["ears"])

# %% Drop another for good, and save the result beside the first
surgery.drop(adapter, [second])
changed = Path("runs/examples/surgery")
adapter.save(changed)

# %% What became of each atom
found = diff("runs/my-dog", changed)
print(found.by, Counter(match.kind for match in found.matches))
for match in found.matches:
    if match.kind != "shared":
        print(match)
