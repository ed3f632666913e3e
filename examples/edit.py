"""Edit one picture: tune on it, sweep which atoms take part, choose.

Run from a folder with my-dog/0.png, or as a notebook, cell by cell.
"""

# %% The picture, what it shows, and what it should show
from pathlib import Path

import atomtune
from atomtune.editing.sweep import best, table
from atomtune.explore.strips import save_edits

pipe = atomtune.open_pipeline("embedded")
out = Path("runs/examples/edit")
source = "a sks dog on a red background"
prompts = ["a sks dog on a blue background", "a flat sks dog on a red background"]

# %% Tune on it and paint the edits at every point; a quick tuning takes 50 steps
options = atomtune.EditOptions(purity=(0.0,), beside=(0.0, 0.5), strength=(1.0, 0.8), quick=True)
edits = atomtune.edit(pipe, "my-dog/0.png", source, prompts, out, options)

# %% Likeness against alignment, both by the base alone; the strips show the same
for row in table(edits.found):
    print(row)
print(best(edits.found), *save_edits(edits, out), sep="\n")

# %% The tuned adapter is one like any other, and stays at the best point if you say so
point = best(edits.found)
with edits.adapter.using(**point.dials):
    atomtune.generate(pipe, ["a sks dog on a green background"])[0].save(out / "another.png")
