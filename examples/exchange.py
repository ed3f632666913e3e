"""LoRA out and in: an adapter as the nearest LoRA, and a LoRA as atoms.

Run from a folder with runs/my-dog, or as a notebook, cell by cell.
"""

# %% The nearest LoRA of rank 2, and what it costs; prompts of the concept say where it must be near
from pathlib import Path

import atomtune
from atomtune.lora import export_lora, import_lora

pipe = atomtune.open_pipeline("embedded")
out = Path("runs/examples/lora")
prompts = ["a sks dog on a red background", "a sks dog on a blue background"]
adapter = atomtune.load(pipe, "runs/my-dog")
done = export_lora(adapter, out, prompts, rank=2, steps=4)
print(f"{done.lost_in_all:.1%} of the energy is lost; drift {done.drift_before:.4f} -> {done.drift_after:.4f}")
adapter.remove()

# %% Diffusers loads it as any other LoRA
pipe.load_lora_weights(str(out))
atomtune.generate(pipe, prompts[:1])[0].save(out / "lora.png")
pipe.unload_lora_weights()

# %% And it comes back as atoms: its components exactly, or (without `exact`) a sparse dictionary of what it adds
atoms, lost = import_lora(pipe, out, prompts, exact=True, steps=4)
print(f"{len(atoms.atoms)} atoms, {lost:.1%} lost")
atoms.save(out / "atoms")
