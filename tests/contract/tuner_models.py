"""Tiny models with random weights, one for each way an adapter reaches a model: the tests run over them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from atomtune.tuner import AtomConfig

DIM = 16  # of prompt embeddings
BATCH = 3


class Plain(nn.Module):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in range(2)
        )
        self.last = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor, prompt: Any = None, prompt_mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.last(x)


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


def _lumina() -> nn.Module:
    return Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=DIM,
    )


def _pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=DIM,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(BATCH * 6).view(BATCH, 6) % 32}


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _diffusion(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": _draw(BATCH, 4, 8, 8),
        "encoder_hidden_states": _draw(BATCH, 5, DIM),
        "timestep": torch.tensor([1.0, 300.0, 700.0]),
        **more,
    }


def _injected(model: nn.Module, config: AtomConfig, adapter: str = "default", **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        return inject_adapter_in_model(config, model, adapter, **kwargs)


def _added(model: Any, config: AtomConfig, adapter: str = "default") -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        model.add_adapter(config, adapter)
    return model


def _peft(model: Any, config: AtomConfig, adapter: str = "default", **kwargs: Any) -> Any:
    return get_peft_model(model, config, adapter_name=adapter, **kwargs)


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    attach: Callable[..., Any]
    targets: tuple[str, ...]
    gate: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        """The same weights at each call; tiny models leave some layers at zero, which would hide mistakes."""
        torch.manual_seed(0)
        model = self.build().eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        return model

    def config(self, **kwargs: Any) -> AtomConfig:
        return AtomConfig(**{"target_modules": list(self.targets), "n_atoms": 6, "threshold": 0.2, **kwargs})

    def run(self, model: Any, **kwargs: Any) -> Tensor:
        out = model(**{**self.inputs(), **kwargs})
        return out if isinstance(out, Tensor) else out[0]


SD3 = Case(
    "sd3-add_adapter",
    _sd3,
    lambda: _diffusion(pooled_projections=_draw(BATCH, 16), return_dict=False),
    _added,
    ("to_q", "to_out.0", "add_k_proj"),
    {"gate_input": "encoder_hidden_states", "gate_dim": DIM},
)
LUMINA = Case(
    "lumina2-add_adapter",
    _lumina,
    lambda: _diffusion(encoder_attention_mask=torch.ones(BATCH, 5, dtype=torch.bool), return_dict=False),
    _added,
    ("to_q", "to_k"),
    {"gate_input": "encoder_hidden_states", "gate_mask": "encoder_attention_mask", "gate_dim": DIM},
)
PIXART = Case(
    "pixart-inject",
    _pixart,
    lambda: _diffusion(return_dict=False),
    _injected,
    ("to_q", "to_v"),
    {"gate_input": "encoder_hidden_states", "gate_dim": DIM},
)
LLAMA = Case("llama-get_peft_model", _llama, _tokens, _peft, ("q_proj", "v_proj"))
GPT2 = Case("gpt2-get_peft_model", _gpt2, _tokens, _peft, ("c_attn",))
PLAIN = Case(
    "plain-inject",
    Plain,
    lambda: {"x": _draw(BATCH, 5, 8), "prompt": _draw(BATCH, 4, DIM)},
    _injected,
    ("up", "last"),
    {"gate_input": "prompt", "gate_mask": "prompt_mask", "gate_dim": DIM},
)
CASES = [SD3, LUMINA, PIXART, LLAMA, GPT2, PLAIN]


def fill(model: nn.Module, adapter: str = "default") -> None:
    """Give an adapter's atoms random values, as after training."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(f"atom_dictionary.{adapter}.atoms"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
