"""LoRA as pairs of factors, and its files: written for diffusers and for PEFT, read by diffusers' own loader."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from atomtune.errors import UserError, hushed
from atomtune.files import write_whole

from .layer import AtomLinear
from .model import hooked, unwrap

Factors = dict[str, tuple[Float[Tensor, "rank d_in"], Float[Tensor, "rank d_out"]]]
"""By site: what reads the input and what is added; their product is the update."""

RIDGE = 1e-3
"""Share of the mean variance of a site's input that is added to every direction's."""
DIFFUSERS, PEFT, CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
PREFIXES = ("transformer", "unet", "base_model.model")
"""What may stand before a site in the keys of a file: the part of a diffusers pipeline, or PEFT's own."""
ADAPTER = "lora"


def codes_in_effect(
    layer: AtomLinear, x: Float[Tensor, "*batch d_in"], adapter: str
) -> Float[Tensor, "*batch n_atoms"]:
    """The codes as this forward adds them: strengths, the adapter's scale and its gate multiplied in."""
    return layer._codes(x, adapter)


def factors(model: nn.Module, adapter: str = "rival") -> Factors:
    """The rank-one components of a PEFT LoRA, its scale put into what they add."""
    found: Factors = {}
    for path, module in model.named_modules():
        pairs: Any = getattr(module, "lora_A", None)
        if pairs is not None and adapter in pairs:
            layer: Any = module
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            found[path] = (down.detach().clone(), (up * layer.scaling[adapter]).T.detach().clone())
    return found


def rotated(parts: Factors) -> Factors:
    """The same updates as singular vectors, the largest first: component i of rank r is the i-th best."""
    turned: Factors = {}
    for site, (down, up) in parts.items():
        u, s, v = torch.linalg.svd(up.T @ down, full_matrices=False)
        rank = len(down)
        root = s[:rank].sqrt()
        turned[site] = (root[:, None] * v[:rank], root[:, None] * u[:, :rank].T)
    return turned


def _split(gram: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X, X^T C, C^T C."""
    d_in = len(gram) - len(atoms)
    return gram[:d_in, :d_in], gram[:d_in, d_in:], gram[d_in:, d_in:]


def reduced_rank(
    gram: Float[Tensor, "d d"], atoms: Float[Tensor, "n_atoms d_out"], rank: int
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "rank d_out"]]:
    """The factors whose product is nearest to Y = C D in least squares over X, with a small ridge.

    `gram` is Z^T Z of Z = (X, C), so d = d_in + n_atoms. Reduced-rank regression (Izenman 1975, J. Multivariate
    Analysis 5:248): with X^T X = L L^T, singular vectors of L^-1 X^T Y, here from the small factors of C and D.
    There are `rank` rows, or as many as atoms.
    """
    xx, xc, _ = _split(gram, atoms)
    ridge = RIDGE * xx.diagonal().mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(xx + ridge * torch.eye(len(xx)).to(xx))
    left, inner = torch.linalg.qr(torch.linalg.solve_triangular(root, xc, upper=False))
    right, outer = torch.linalg.qr(atoms.T)
    u, s, v = torch.linalg.svd(inner @ outer.T)
    rank = min(rank, len(s))
    sizes = s[:rank].sqrt()
    down = torch.linalg.solve_triangular(root.T, left @ u[:, :rank] * sizes, upper=True).T
    return down, sizes[:, None] * (v[:rank] @ right.T)


def error_of(
    down: Float[Tensor, "rank d_in"],
    up: Float[Tensor, "rank d_out"],
    gram: Float[Tensor, "d d"],
    atoms: Float[Tensor, "n_atoms d_out"],
) -> tuple[float, float]:
    """(squared error of the factors' product, energy of Y), with what `reduced_rank` is given."""
    xx, xc, cc = _split(gram, atoms)
    energy = (cc @ atoms * atoms).sum()
    missed = energy - 2 * (down @ xc @ atoms * up).sum() + (down @ xx @ down.T @ up * up).sum()
    return missed.clamp_min(0).item(), energy.item()


@contextmanager
def added(layers: Mapping[str, nn.Module], parts: Factors) -> Iterator[None]:
    """Inside, each layer adds its update, whatever else is attached."""

    def hook(down: Tensor, up: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _, x, out: out + (x[0] @ down.T.to(out)) @ up.to(out)

    with hooked(layers[site].register_forward_hook(hook(*pair)) for site, pair in parts.items()):
        yield


def save_lora(parts: Factors, rank: int, folder: Path, base: str | None, part: str) -> None:
    """Write a LoRA twice: for diffusers' `load_lora_weights(folder)` and for PEFT's `from_pretrained`.

    It is for `part` of the pipeline, `transformer` or `unet`. Every site gets `rank` rows, of zeros where it has fewer:
    loaders then agree on the scale, which is 1.
    """
    tensors: dict[str, Tensor] = {}
    for site, pair in parts.items():
        down, up = (nn.functional.pad(t.float().cpu(), (0, 0, 0, rank - len(t))) for t in pair)
        tensors |= {f"{site}.lora_A.weight": down, f"{site}.lora_B.weight": up.T.contiguous()}
    for name, prefix in ((DIFFUSERS, part), (PEFT, PREFIXES[-1])):
        named = {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}
        write_whole(folder / name, safetensors.torch.save(named, {"format": "pt"}))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(parts)}
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    write_whole(folder / CONFIG, json.dumps(config, indent=1) + "\n")


@contextmanager
def lora_of(pipe: Any, path: Path) -> Iterator[Factors]:
    """Inside, the LoRA of a file (or of a folder with one) is on the pipeline's transformer, and on nothing else.

    Raises UserError on what is not safetensors, on values that are not finite, on keys that the model has no place for.
    """
    base: Any = unwrap(pipe)
    if getattr(base, "peft_config", None):
        raise UserError("`pipe` must be the base alone, but an adapter is attached. Remove it first.")
    file, keys = lora_file(path)
    try:
        yield _load(pipe, base, file, keys)
    finally:
        base.unload_lora()


def lora_file(path: Path) -> tuple[Path, list[str]]:
    """The file of a LoRA, and its keys. Raises UserError where there is none, where it is pickled, broken, or atoms."""
    names = (DIFFUSERS, PEFT)
    found = next((path / name for name in names if (path / name).is_file()), path)
    if not found.is_file():
        raise UserError(f"`lora` must be a file, or a folder with {' or '.join(names)}: there is none at {path}.")
    if found.suffix != ".safetensors":
        raise UserError(f"`lora` must be a .safetensors file, got {found}: pickled files run code and are not opened.")
    try:
        with safetensors.safe_open(found, "pt") as opened:
            keys = sorted(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{found} is broken, or no safetensors file: {error}.") from error
    if any(".atom_dictionary." in key for key in keys):
        raise UserError(f"{found} holds atoms already, and no LoRA. Use it as it is, or name a LoRA.")
    return found, keys


def _load(pipe: Any, base: Any, file: Path, keys: list[str]) -> Factors:
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        with _hushed():
            state, *alphas, metadata = pipe.lora_state_dict(str(file), use_safetensors=True, return_lora_metadata=True)
            if not any("lora_A" in key for key in keys):
                state = convert_unet_state_dict_to_peft(state)
            prefix = next((p for p in PREFIXES if any(key.startswith(f"{p}.") for key in state)), None)
            if prefix == PREFIXES[-1] and (file.parent / CONFIG).is_file():
                metadata = _metadata(file.parent / CONFIG, prefix)
            given = {"prefix": prefix, "adapter_name": ADAPTER, "metadata": metadata}
            base.load_lora_adapter(dict(state), network_alphas=alphas[0] if alphas else None, **given)
    except Exception as error:  # diffusers has no error of its own for a foreign file
        reason = " ".join(str(error).split())[:200]
        raise UserError(_misfit(base, file, keys) + f" diffusers says: {type(error).__name__}: {reason}") from error
    parts = {site: pair for site, pair in factors(base, ADAPTER).items() if pair[0].ndim == 2}
    place = "" if prefix is None else f"{prefix}."
    odd = set(state) ^ {f"{place}{site}.lora_{part}.weight" for site in parts for part in "AB"}
    odd |= {key for key in keys if "dora_scale" in key}  # diffusers drops them, and goes on without
    if odd or not parts:
        raise UserError(_misfit(base, file, sorted(odd)))
    bad = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{file} is not usable: {bad[0]} holds NaN or infinite values.")
    parts = {site: (down.float(), up.float()) for site, (down, up) in parts.items() if down.any() and up.any()}
    if not parts:
        raise UserError(f"{file} is a LoRA that changes nothing: all of its updates are zero.")
    return parts


def _misfit(base: Any, file: Path, keys: list[str]) -> str:
    if not keys:
        return f"{file} is empty."
    some = ", ".join(keys[:3])
    return f"{file} is no plain LoRA for this {type(base).__name__}: {len(keys)} keys do not fit, such as {some}."


def _metadata(path: Path, prefix: str) -> dict[str, Any]:
    """What PEFT's config says of a LoRA's size and scale, as diffusers keeps it."""
    wanted = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
    config = json.loads(path.read_text(encoding="utf-8"))
    return {f"{prefix}.{name}": config[name] for name in wanted if config.get(name) is not None}


@contextmanager
def _hushed() -> Iterator[None]:
    """Diffusers tells of errors and misfits before it raises, or instead; here they are errors of one line."""
    with hushed("diffusers", level=logging.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
