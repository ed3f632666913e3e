"""python scripts/train_autoencoder.py WORK --minutes 15: the small autoencoder of the embedded world.

64x64 pixels to 8x8x32 latents. It sees sprites of the world's objects and of `other` emoji at random places,
never a reserved object, nor the picture of a tuning object. WORK keeps a checkpoint (run again to resume) and, at
the end, `vae/`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC

from atomtune.scenes.render import ground, names, paste, render, sprite
from atomtune.scenes.world import COLORS, OBJECTS, PATTERNS, STYLES, random_scene


def build() -> AutoencoderDC:
    """Space-to-channel shortcuts make it learn several times faster on a CPU than AutoencoderKL of equal cost."""
    vae = AutoencoderDC(
        latent_channels=32,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 32, 64, 128),
        decoder_block_out_channels=(16, 64, 64, 128),
        encoder_layers_per_block=(0, 1, 1, 2),
        decoder_layers_per_block=(0, 1, 2, 2),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        scaling_factor=1.0,
    )
    vae.register_to_config(shift_factor=0.0)
    return vae


def canvas(rng: random.Random) -> np.ndarray:
    """A canvas of 32 pixels with one sprite at a random place, its colours shuffled now and then."""
    x, y = rng.choice((0, 32)), rng.choice((0, 32))
    canvas = ground(rng.choice(tuple(COLORS)), rng.choice(PATTERNS))[y : y + 32, x : x + 32].copy()
    sheet, name = "named", rng.choice(tuple(OBJECTS))
    if rng.random() < 0.75:
        sheet, name = "other", rng.choice(names("other"))
    side = rng.choice((22, 32, 32))
    s = sprite(name, rng.choice(STYLES), side, sheet)
    if rng.random() < 0.3:
        order = rng.sample((0, 1, 2), 3)
        s = np.concatenate([s[..., order], s[..., 3:]], -1)
    if rng.random() < 0.5:
        s = s[:, ::-1]
    room = 16 - side // 2
    paste(canvas, s, 16 + rng.randint(-room, room), 16 + rng.randint(-room, room))
    if room == 0 and rng.random() < 0.5:
        canvas = np.roll(canvas, (rng.choice((-8, 0, 8)), rng.choice((-8, 0, 8))), (0, 1))
    return canvas


def batch(rng: random.Random) -> torch.Tensor:
    """Eight canvases, or two true scenes: `(size, 3, side, side)` in [-1, 1].

    Small pictures in small batches: on a CPU many cheap steps beat few dear ones.
    """
    if rng.random() >= 0.7:
        return scenes(rng, 2)
    return tensor([canvas(rng) for _ in range(8)])


def scenes(rng: random.Random, size: int) -> torch.Tensor:
    """True scenes of the world."""
    return tensor([render(random_scene(rng)) / 255.0 for _ in range(size)])


def tensor(rows: list[np.ndarray]) -> torch.Tensor:
    x = torch.from_numpy(np.stack(rows).astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1
    return x.contiguous(memory_format=torch.channels_last)


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


@torch.no_grad()
def probe(vae: AutoencoderDC) -> float:
    """Mean squared error, of 1, on canvases and scenes that are the same each time."""
    rng = random.Random(7)
    batches = [tensor([canvas(rng) for _ in range(32)]), scenes(rng, 16)]
    return float(np.mean([F.mse_loss(vae.decode(vae.encode(x).latent).sample, x).item() / 4 for x in batches]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent = 0, 0.0
    checkpoint = options.work / "autoencoder.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    rng = random.Random(step)
    begin = time.monotonic() - spent
    last = spent
    while spent < 60 * options.minutes:
        share = spent / (60 * options.minutes)
        rate = options.lr * min(1, (step + 1) / 100) * (1 if share < 0.4 else max(0.01, (1 - share) / 0.6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = batch(rng)
        z = vae.encode(x).latent
        heard = z
        if rng.random() < 0.5:  # the decoder must bear small errors of the diffusion model
            heard = z + 0.1 * z.std().detach() * torch.randn_like(z)
        y = vae.decode(heard).sample
        edge = sum((a - b).abs().mean() for a, b in zip(gradients(x), gradients(y), strict=True))
        # Latents of unit variance in every channel: well-conditioned for the diffusion model, safe in half precision.
        scale = z.std((0, 2, 3)).log().square().mean()
        loss = 0.01 * scale + 2 * F.mse_loss(x, y) + 0.5 * (x - y).abs().mean() + 0.25 * edge
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent = time.monotonic() - begin
        if step % 250 == 0:
            mse = probe(vae)
            line = {"step": step, "seconds": round(spent), "psnr": round(-10 * np.log10(mse), 2)}
            print(json.dumps(line), flush=True)
        if spent - last > 60 or spent >= 60 * options.minutes:
            last = spent
            state = {
                "vae": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent": spent,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(scenes(rng, 64)).latent for _ in range(8)])
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(options.work / "vae")
    print(json.dumps({"scaling_factor": 1 / z.std().item(), "channel_std": z.std((0, 2, 3)).tolist()}))


if __name__ == "__main__":
    main()
