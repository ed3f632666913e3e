"""python scripts/measure_scale.py: what a training step costs as models and adapters grow.

Writes benchmarks/results/scale.json: a row for each size of a random SD3 transformer, number of tokens, and method
(the base alone, forward and backward to its input; PEFT's LoRA; atoms), with the seconds of processor time of one
thread, so that other work on the machine counts little, and the bytes beside the weights. `fitted` and `projected`
carry them on to models that were not measured; `scripts/write_docs.py` prints both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from atomtune.backbones import BACKBONES
from atomtune.compare.results import script_command, write_result
from atomtune.training.memory import peak_of
from atomtune.tuner import AtomConfig, attach

SIZES = ((2, 192), (4, 256), (6, 384), (8, 512), (12, 768))
"""Layers and width."""
SIDES = (16, 32)
"""Of the latents: 64 and 256 picture tokens."""
WORDS, ROWS, RANK = 77, 2, 16
ATOMS: tuple[dict[str, Any], ...] = (
    {"n_atoms": 16},
    {"n_atoms": 64},
    {"n_atoms": 256},
    {"n_atoms": 64, "sparsifier": "topk", "k": 8},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    rows = [row for layers, width in SIZES for row in steps_of(layers, width, given.repeats)]
    write_result(given.out, script_command(), rows, time.monotonic() - begin)


def steps_of(layers: int, width: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    methods: list[tuple[str, int, Callable[[nn.Module], None]]] = [
        ("base", 0, lambda model: None),
        (f"LoRA of rank {RANK}", RANK, _lora),
        *((_named(fields), fields["n_atoms"], partial(_atoms, fields)) for fields in ATOMS),
    ]
    for name, atoms, adapt in methods:
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=max(SIDES),
            num_layers=layers,
            num_attention_heads=width // 64,
            attention_head_dim=64,
            joint_attention_dim=width,
            caption_projection_dim=width,
            pooled_projection_dim=width,
            pos_embed_max_size=max(SIDES),
        )
        weights = sum(p.numel() for p in model.parameters())
        model.requires_grad_(requires_grad=False)
        adapt(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for side in SIDES:
            step = _step(model, trained, side, width)
            row = {"method": name, "layers": layers, "width": width, "weights": weights}
            row |= {"tokens": side * side // 4 + WORDS, "rows": ROWS, "trained": sum(p.numel() for p in trained)}
            row |= {"atoms": atoms, "seconds": processor_seconds(step, repeats)}
            rows.append(row | {"bytes": peak_of(step, torch.device("cpu"))})
            print(rows[-1], flush=True)
    return rows


def _named(fields: dict[str, Any]) -> str:
    return f"{fields['n_atoms']} atoms" + (f", {fields['k']} of them" if "k" in fields else "")


def _lora(model: nn.Module) -> None:
    sites = list(BACKBONES["StableDiffusion3Pipeline"].sites)
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sites), model)


def _atoms(fields: dict[str, Any], model: nn.Module) -> None:
    attach(model, AtomConfig(target_modules=list(BACKBONES["StableDiffusion3Pipeline"].sites), **fields))


def _step(model: Any, trained: list[nn.Parameter], side: int, width: int) -> Callable[[], None]:
    latents = torch.randn(ROWS, 16, side, side)
    words, pooled = torch.randn(ROWS, WORDS, width), torch.randn(ROWS, width)
    optimizer = torch.optim.AdamW(trained) if trained else None

    def step() -> None:
        # Without an adapter the gradient runs to the input, as with one it runs to the first site.
        x = latents.clone().requires_grad_(requires_grad=not trained)
        out = model(x, words, pooled, torch.full((ROWS,), 500.0), return_dict=False)[0]
        out.square().mean().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def processor_seconds(act: Callable[[], object], repeats: int, warm: bool = True) -> float:
    """Of processor time, the median."""
    found = []
    for number in range(repeats + warm):
        begin = time.process_time()
        act()
        if number or not warm:
            found.append(time.process_time() - begin)
    return statistics.median(found)


# ---------------------------------------------------------------------------------------------- carrying on


def _terms(row: dict[str, Any], measure: str) -> list[float]:
    """What a step's cost is a sum of: of the base, of the adapter's matrices and codes, and of the number of calls."""
    tokens, layers, width = row["tokens"] * row["rows"], row["layers"], row["width"]
    codes = layers * row["atoms"] * tokens
    if measure == "seconds":
        attention = layers * width * row["tokens"] * tokens
        return [row["weights"] * tokens, attention, row["trained"] * tokens, codes, row["trained"], layers]
    return [layers * width * tokens, layers * width * row["tokens"] * tokens, codes, row["trained"], width * tokens]


def fitted(rows: list[dict[str, Any]], measure: str) -> np.ndarray:
    """Coefficients of the terms, by least squares of relative errors."""
    values = np.array([row[measure] for row in rows])
    terms = np.array([_terms(row, measure) for row in rows])
    return np.linalg.lstsq(terms / values[:, None], np.ones(len(rows)), rcond=None)[0]


def error_on_largest(rows: list[dict[str, Any]], measure: str) -> tuple[float, float]:
    """Median and largest relative error on the widest models, by what the others fit."""
    width = max(row["width"] for row in rows)
    largest = [row for row in rows if row["width"] == width]
    weights = fitted([row for row in rows if row["width"] < width], measure)
    errors = [abs(float(np.dot(_terms(row, measure), weights)) / row[measure] - 1) for row in largest]
    return statistics.median(errors), max(errors)


MODELS = {
    "SD3.5 medium": {"layers": 24, "width": 1536, "weights": 2.24e9, "tokens": 4096 + 333},
    "FLUX.1": {"layers": 57, "width": 3072, "weights": 11.9e9, "tokens": 4096 + 512},
    "Qwen-Image": {"layers": 60, "width": 3072, "weights": 20.4e9, "tokens": 4096 + 128},
}
"""As their papers and configs have them, at 1024 pixels."""
SITES = 8
"""Layers of width x width that are adapted, of each block."""


def projected(rows: list[dict[str, Any]], model: str, atoms: int) -> dict[str, float]:
    """What a model that was not measured should need, one row a step: `slower`, as a share of the base's own step;
    `trained` parameters; `bytes` of the codes and the adapter, with its gradient and AdamW's two means, in float32.
    """
    bare = {"rows": 1, "trained": 0, "atoms": 0} | MODELS[model]
    trained = atoms * SITES * bare["layers"] * 2 * bare["width"]
    seconds = fitted(rows, "seconds")
    both = (bare, bare | {"trained": trained, "atoms": atoms})
    base, whole = (float(np.dot(_terms(row, "seconds"), seconds)) for row in both)
    codes = fitted(rows, "bytes")[2] * bare["layers"] * atoms * bare["tokens"]
    return {"slower": whole / base - 1, "trained": trained, "bytes": float(codes) + 16 * trained}


if __name__ == "__main__":
    main()
