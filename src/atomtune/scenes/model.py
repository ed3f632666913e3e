"""The embedded model: a tiny member of the Lumina2 family, in diffusers' own folder format.

Why Lumina2: one stream and one text encoder as in Z-Image; guidance is on by default and the default size comes
from the config, so that plain `pipe("a big flat apple")` works; padding is masked, so short prompts cost little.
The autoencoder is a DC-AE, which a CPU trains in minutes. Lumina2's pipeline expects AutoencoderKL and says so in
two harmless lines when plain `from_pretrained` loads the folder; `pipeline()` keeps them quiet.
"""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomtune.errors import OPTIONAL, hushed
from atomtune.scenes.render import names
from atomtune.scenes.world import CLASS_OF, caption, random_scene

if TYPE_CHECKING:
    from diffusers import Lumina2Pipeline
    from transformers import GemmaTokenizer

TEXT_WIDTH = 192
PREFIX = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
    "based on textual prompts or user prompts. <Prompt Start> "
)
"""What Lumina2's pipeline puts before every prompt; the tokenizer holds it as one token."""


def folder() -> Path:
    """Where the embedded pipeline lies, as a folder that `from_pretrained` loads."""
    return Path(str(resources.files("atomtune.scenes").joinpath("assets/model")))


def pipeline(dtype: str = "float32") -> Lumina2Pipeline:
    """The embedded pipeline, its progress bar off."""
    with hushed(*OPTIONAL):
        import torch
        import transformers  # noqa: F401  sets its logger up, here and not under the next line
        from diffusers import DiffusionPipeline
    with hushed(*OPTIONAL, "diffusers", "transformers"):  # nor is it that the autoencoder is a DC-AE
        pipe = DiffusionPipeline.from_pretrained(folder(), dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tokenizer(vocab_size: int = 2048) -> GemmaTokenizer:
    """A byte-fallback BPE over the world's captions and the names of all emoji, reserved ones too.

    So it has met every name, as the tokenizer of a real model has; no picture goes with that.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    rng = random.Random(0)
    lines = [caption(random_scene(rng), rng) for _ in range(4000)]
    lines += [f"a {name} on the" for name in (*CLASS_OF, *names("other")) for _ in range(20)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    letters = [chr(c) for c in range(33, 127)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special + byte_tokens,
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    model: Any = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_tokens([AddedToken(PREFIX, normalized=False)])
    tokenizer.model_max_length = 256
    return tokenizer


def build_pipeline(vae: Any) -> Lumina2Pipeline:
    """The pipeline with random weights, around a trained autoencoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = build_tokenizer()
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=256,
        sliding_window=256,
        initializer_range=TEXT_WIDTH**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=vae.config["latent_channels"],
        hidden_size=192,
        num_layers=8,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=6,
        multiple_of=32,
        ffn_dim_multiplier=0.5,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(300, 32, 32),
        cap_feat_dim=TEXT_WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=Gemma2Model(text).eval(),
        tokenizer=tokenizer,
    )
