"""Many concepts: trained together over one base in one process, then served together, few in memory at a time.

Run from a folder with pictures in my-dog, captioned "a sks dog ...", or as a notebook, cell by cell.
"""

# %% Two adapters, here of one concept and two seeds; options beside captions and seed must be the same
from pathlib import Path

import atomtune
from atomtune.serving import Server
from atomtune.training.many import Job, train_many
from atomtune.training.options import TrainOptions

pipe = atomtune.open_pipeline("embedded")
out = Path("runs/examples/many")
shared = {"steps": 2, "unrelated_pictures": 4}
jobs = [Job(Path("my-dog"), out / f"dog-{seed}", TrainOptions("sks dog", seed=seed, **shared)) for seed in (0, 1)]
train_many(pipe, jobs)

# %% Requests for different adapters, or for the base, are painted in one batch
server = Server(pipe, {"first": out / "dog-0", "second": out / "dog-1"}, held=2)
requests = [("first", "a sks dog"), (None, "a sks dog"), ("second", "a sks dog on a red background")]
pictures = server.generate(requests, seeds=[0, 0, 1])

# %% Look at them
for (name, _), picture in zip(requests, pictures, strict=True):
    picture.save(out / f"{name or 'base'}.png")
server.close()
