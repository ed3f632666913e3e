"""What tiny pipelines are made of: tokenizers, text encoders and autoencoders of the real classes."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from atomtune.scenes.model import build_tokenizer

UNRELATED = (
    "a small flat apple on a green background, at the top",
    "a big 3d house on a yellow background, on the left",
    "a big shaded clock on a gray background, at the bottom",
    "a small shaded fox on a pink striped background, on the right",
    "a big flat car on a blue background, in the middle",
    "a small 3d violin on a purple background, at the top",
    "a big shaded drum on an orange dotted background, on the left",
    "a small flat bell on a red background, on the right",
)
"""Prompts that a tiny base is told to paint beside a concept's pictures."""

CAPTIONS = (
    "a big flat kite on a red background, on the left",
    "a small 3d kite on a blue background, on the right",
    "a small shaded apple on a green striped background, in the middle",
    "a big 3d house on a yellow background, at the top",
)
INSTRUCTION = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""What Qwen-Image puts before a prompt: 34 tokens."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def randomize(model: nn.Module) -> None:
    """Weights that a family starts at zero would hide mistakes."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, end_of_word_suffix="</w>")
    bpe.train_from_iterator(CAPTIONS, trainer)
    merges = _merges(bpe)
    tokens = [*special, *letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _words() -> list[str]:
    return sorted({word for caption in CAPTIONS for word in caption.replace(",", " ").split()})


def t5_tokenizer() -> T5Tokenizer:
    words = [f"▁{word}" for word in _words()]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.", "▁"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(word, -2.0) for word in words] + [(letter, -9.0) for letter in letters if letter not in words]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def bert_tokenizer() -> BertTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_words(), *letters, *(f"##{c}" for c in letters)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))})


def qwen_tokenizer() -> Qwen2Tokenizer:
    """With a chat template over plain contents and over lists of parts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=sorted(letters))
    bpe.train_from_iterator([*CAPTIONS, *[INSTRUCTION, "user\n", "system\n", "assistant\n"] * 3], trainer)
    vocab = json.loads(bpe.to_str())["model"]["vocab"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab |= {token: len(vocab) + number for number, token in enumerate(special)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=_merges(bpe), extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer(instruction: str) -> Any:
    """Most of an instruction is one token: it costs no time."""
    tokenizer = build_tokenizer(600)
    tokenizer.add_tokens([AddedToken(instruction, normalized=False)])
    return tokenizer


def clip(tokenizer: CLIPTokenizer, width: int = 16, projected: bool = True, layers: int = 2) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(tokenizer: T5Tokenizer, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    """In eval mode: from a config it would drop out."""
    return kind(config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()


def bert(tokenizer: BertTokenizer) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return BertModel(config).eval()


def kl(scaling: float, shift: float | None = None) -> AutoencoderKL:
    """8 pixels a latent, 4 channels."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
        latent_channels=4,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.eval()


def deep(scaling: float = 1.3) -> AutoencoderDC:
    """8 pixels a latent, 4 channels."""
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
        scaling_factor=scaling,
    )
    return vae.eval()


def small(width: int = 16, layers: int = 2, heads: int = 2, **more: Any) -> dict[str, Any]:
    """Sizes of a tiny language model."""
    return {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "use_cache": False,
        **more,
    }


def seed() -> None:
    torch.manual_seed(0)
