"""Tiny pipelines with random weights, of the real classes: the contract of a backbone runs over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from atomtune.scenes.model import TEXT_WIDTH, build_pipeline
from atomtune.tuner import AtomConfig, atom_layers, attach, remove_adapter

CAPTIONS = (
    "a big flat kite on a red background, on the left",
    "a small 3d kite on a blue background, on the right",
    "a small shaded apple on a green striped background, in the middle",
    "a big 3d house on a yellow background, at the top",
)


@dataclass(frozen=True)
class Family:
    """One row of the table that the contract runs over: a family, and how a tiny pipeline of it is made."""

    name: str
    build: Callable[[], Any]
    sites: tuple[str, ...]
    """Ends of the names of some sites, one of each kind, for short runs."""


@contextmanager
def random_atoms(pipe: Any, **config: Any) -> Iterator[None]:
    """Atoms of any size at its sites while it lasts; the last of each site never fires."""
    torch.manual_seed(3)
    attach(pipe.transformer, AtomConfig(**config))
    for layer in atom_layers(pipe.transformer).values():
        nn.init.normal_(layer.dictionary("default").atoms, std=0.3)
        layer.dictionary("default").bias.data[-1] = 1e6
    yield
    remove_adapter(pipe.transformer)


def randomize(model: nn.Module) -> None:
    """Weights that a family starts at zero would hide mistakes."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


# ------------------------------------------------------------------------------------------------------- SD3


def _clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, end_of_word_suffix="</w>")
    bpe.train_from_iterator(CAPTIONS, trainer)
    import json

    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*special, *letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    words = sorted({f"▁{word}" for caption in CAPTIONS for word in caption.replace(",", " ").split()})
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.", "▁"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(word, -2.0) for word in words] + [(letter, -9.0) for letter in letters if letter not in words]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: three text encoders, two streams, a block with a second attention."""
    torch.manual_seed(0)
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    randomize(transformer)
    t5_config = T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=_clip(clip),
        tokenizer=clip,
        text_encoder_2=_clip(clip),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(t5_config).eval(),
        tokenizer_3=t5,
    )


# --------------------------------------------------------------------------------------------------- Lumina2


def lumina2() -> Any:
    """The embedded model's own pipeline, its transformer and autoencoder smaller still."""
    torch.manual_seed(0)
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8, 8, 8),
        decoder_block_out_channels=(4, 8, 8, 8),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        scaling_factor=1.3,
    )
    vae.register_to_config(shift_factor=0.1)
    pipe = build_pipeline(vae.eval())
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=TEXT_WIDTH,
    )
    randomize(transformer)
    pipe.register_modules(transformer=transformer.eval())
    return pipe


FAMILIES = (
    Family("sd3", sd3, ("attn.to_q", "attn2.to_v", "attn.add_k_proj", "attn.to_add_out")),
    Family("lumina2", lumina2, ("to_q", "to_out.0")),
)
