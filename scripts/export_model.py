"""python scripts/export_model.py WORK: put the pretrained pipeline into the package, in half precision.

Takes the averaged weights of WORK/pretrain.pt, finished or not, and writes src/atomtune/scenes/assets/model with a
list of unrelated prompts beside it.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderDC

from atomtune.scenes.model import build_pipeline
from atomtune.scenes.world import caption, random_scene

TARGET = Path("src/atomtune/scenes/assets/model")


def main() -> None:
    work = Path(sys.argv[1])
    pipe = build_pipeline(AutoencoderDC.from_pretrained(work / "vae"))
    saved = torch.load(work / "pretrain.pt", weights_only=True)
    torch.nn.ModuleList([pipe.transformer, pipe.text_encoder]).load_state_dict(saved["average"])
    fresh = TARGET.with_name("model.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(fresh)
    for path in fresh.glob("*/config.json"):
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}
        if "dtype" in config:  # diffusers loads in float32 by default, transformers in this: else a plain load is mixed
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    rng = random.Random(77)
    prompts = sorted({caption(random_scene(rng), rng) for _ in range(600)})
    (fresh / "unrelated.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    shutil.rmtree(TARGET, ignore_errors=True)
    fresh.rename(TARGET)
    print(f"{TARGET}: step {saved['step']}, {sum(p.stat().st_size for p in TARGET.rglob('*')) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
