"""python scripts/pretrain.py WORK --minutes 120: pretrain the embedded model; run again to resume.

WORK holds `vae/` (scripts/train_autoencoder.py), and receives `latents.pt` (scenes encoded once), `pretrain.pt`
(checkpoint) and `pretrain.jsonl` (log). Then: python scripts/export_model.py WORK.

The recipe: flow matching on latents, v = noise - x0, logit-normal time; the loss weighs cells that a sprite covers
more than plain background; Muon for the hidden matrices and AdamW for the rest; 10 % of captions dropped; a moving
average of the weights; learning rate constant, then linear to 2 % over the last 40 % of the time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, Lumina2Pipeline

from atomtune.scenes.model import PREFIX, build_pipeline
from atomtune.scenes.render import render, subject_mask
from atomtune.scenes.world import Scene, caption, held_out, random_scene


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in fp32; torch's own casts to bfloat16, which a CPU multiplies slowly."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, group["momentum"])))
            for shape, pairs in shapes.items():
                update = orthogonal(torch.stack([u for _, u in pairs]))
                scale = 0.2 * max(shape) ** 0.5
                for (p, _), u in zip(pairs, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"] * scale)


def orthogonal(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices by Newton-Schulz iterations, `(n, rows, columns)`."""
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


def draw(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if not held_out(scene):
            scenes.append(scene)
    return scenes


@torch.no_grad()
def encode(vae: AutoencoderDC, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized latents `(n, 32, 8, 8)` and the share of each cell under a sprite `(n, 8, 8)`, in half."""
    latents, covers = [], []
    for i in range(0, len(scenes), 128):
        chunk = scenes[i : i + 128]
        x = torch.from_numpy(np.stack([render(s) for s in chunk])).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = vae.encode(x).latent
        latents.append(((z - vae.config.shift_factor) * vae.config.scaling_factor).half())
        masks = [np.maximum.reduce([subject_mask(s, j) for j in range(len(s.things))]) for s in chunk]
        cells = np.stack(masks).reshape(len(chunk), 8, 8, 8, 8).mean((2, 4))
        covers.append(torch.from_numpy(cells).half())
    return torch.cat(latents), torch.cat(covers)


class Encoder:
    """Captions to embeddings, by the pipeline's own text encoder, with gradients."""

    def __init__(self, pipe: Lumina2Pipeline) -> None:
        self.pipe = pipe

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [PREFIX + c if c else "" for c in captions]
        inputs = self.pipe.tokenizer(texts, padding="longest", return_tensors="pt")
        states = self.pipe.text_encoder(**inputs, output_hidden_states=True).hidden_states
        return states[-2], inputs.attention_mask


def optimizers(pipe: Lumina2Pipeline, lr: float) -> list[torch.optim.Optimizer]:
    hidden, rest = [], []
    for name, p in [*pipe.transformer.named_parameters(), *pipe.text_encoder.named_parameters()]:
        inner = "layers" in name or "refiner" in name
        (hidden if p.ndim == 2 and inner and "embed" not in name else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(hidden, lr), adam]


def save(path: Path, **state: object) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=120, help="training time in all, resumes included")
    parser.add_argument("--scenes", type=int, default=48000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--init", type=Path, help="pipeline folder whose weights to go on from, its autoencoder too")
    options = parser.parse_args()
    work: Path = options.work
    torch.manual_seed(0)
    vae = AutoencoderDC.from_pretrained((options.init or work) / "vae", torch_dtype=torch.float32).eval()
    pipe = build_pipeline(vae)
    if options.init:
        weights = Lumina2Pipeline.from_pretrained(options.init, torch_dtype=torch.float32)
        pipe.transformer.load_state_dict(weights.transformer.state_dict())
        pipe.text_encoder.load_state_dict(weights.text_encoder.state_dict())
    # The rotary tables come in complex128; half of it is enough for training and much faster on a CPU.
    rope = pipe.transformer.rope_embedder
    rope.freqs_cis = [f.to(torch.complex64) for f in rope.freqs_cis]
    model = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder])
    average = {k: v.clone() for k, v in model.state_dict().items()}
    opts = optimizers(pipe, options.lr)
    base_rates = [opts[0].param_groups[0]["lr"], opts[1].param_groups[0]["lr"]]
    step, spent = 0, 0.0

    scenes = draw(options.scenes, seed=1)
    cache = work / "latents.pt"
    if not cache.exists():
        save(cache, data=encode(vae, scenes))
    latents, covers = torch.load(cache, weights_only=True)["data"]
    checkpoint = work / "pretrain.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]
    paired = torch.tensor([len(scene.things) == 2 for scene in scenes])
    kinds = (~paired).nonzero().flatten(), paired.nonzero().flatten()
    encoder = Encoder(pipe)
    rng = random.Random(1000 + step)
    generator = torch.Generator().manual_seed(1000 + step)
    begin, last, running = time.monotonic() - spent, spent, None
    log = (work / "pretrain.jsonl").open("a", encoding="utf-8")
    while spent < 60 * options.minutes:
        share = spent / (60 * options.minutes)
        factor = min(1, (step + 1) / 100) * (1 if share < 0.6 else max(0.02, (1 - share) / 0.4))
        for opt, rate in zip(opts, base_rates, strict=True):
            opt.param_groups[0]["lr"] = rate * factor
        # One kind of scene a batch, since captions of pairs are twice as long and all are padded to the longest.
        kind = kinds[int(torch.rand((), generator=generator) < len(kinds[1]) / len(scenes))]
        rows = kind[torch.randint(len(kind), (options.batch,), generator=generator)]
        x0, cover = latents[rows].float(), covers[rows].float()
        captions = ["" if rng.random() < 0.1 else caption(scenes[i], rng) for i in rows.tolist()]
        embeds, mask = encoder(captions)
        s = torch.sigmoid(torch.randn(len(rows), generator=generator)).view(-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        out = pipe.transformer((1 - s) * x0 + s * noise, 1 - s.flatten(), embeds, mask, return_dict=False)[0]
        error = (-out - (noise - x0)).square().mean(1)
        weight = 1 + 3 * cover
        loss = (error * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - decay) if v.is_floating_point() else average[k].copy_(v)
        step += 1
        spent = time.monotonic() - begin
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 25 == 0:
            if (work / "threads").exists():  # so that a long run can make room for other work
                torch.set_num_threads(int((work / "threads").read_text()))
            line = {"step": step, "seconds": round(spent), "loss": round(running, 5), "lr": factor}
            print(json.dumps(line), file=log, flush=True)
        if spent - last > 120 or spent >= 60 * options.minutes:
            last = spent
            states = [opt.state_dict() for opt in opts]
            save(
                checkpoint,
                model=model.state_dict(),
                average=average,
                optimizers=states,
                step=step,
                spent=spent,
            )
            (work / "stop").exists() and exit("stopped by the file `stop`")


if __name__ == "__main__":
    main()
