"""Turn the density dial: how many atoms take part, everywhere or at single sites.

Run from a folder with runs/my-dog, or as a notebook, cell by cell.
"""

# %% An adapter, and a prompt of its concept
from pathlib import Path

import atomtune
from atomtune.measure.painting import curve_svg, density_curve

pipe = atomtune.open_pipeline("embedded")
adapter = atomtune.load(pipe, "runs/my-dog")
prompt, out = "a sks dog on a red background", Path("runs/examples/dial")
out.mkdir(parents=True, exist_ok=True)

# %% The same picture with fewer and fewer atoms, the least important gone first; 0 is the base
for density in (1.0, 0.5, 0.2, 0.0):
    with adapter.using(density=density):
        atomtune.generate(pipe, [prompt])[0].save(out / f"{density:.1f}.png")

# %% One site alone: a fifth of its own atoms, while all others take part
site = f"L{adapter.atoms.top(1)[0].site}"
with adapter.using(density={site: 0.2}):
    atomtune.generate(pipe, [prompt])[0].save(out / f"{site}.png")

# %% How close each density comes to the whole adapter's picture
curve = density_curve(pipe, adapter.atoms.ranked, [prompt], densities=(0.1, 0.25, 0.5), seeds=(0, 1))
(out / "curve.svg").write_text(curve_svg(curve))
for row in curve:
    print(row)

# %% What is left for good: a quarter of the atoms, in a new folder
adapter.prune(0.25)
adapter.save(out / "small")
