"""Adapters on disk, in PEFT's layout: written whole or not at all, loaded whole or not at all."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from atomtune.errors import UserError, did_you_mean
from atomtune.files import checksum
from atomtune.files import key as digest_of

from . import gate
from .config import FORMAT_VERSION, AtomConfig
from .layer import AtomLinear
from .model import adapter_config, atom_layers, attach, discard_adapters, site_name, unwrap
from .notes import NOTES, Notes, notes, notes_text, read_notes
from .register import NAME

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
STATISTICS = "statistics.safetensors"
CARD = "README.md"
PICTURES = "pictures"
RUN_STATUS = "status.json"
MIXTURE = "mixture.json"
_OURS = (WEIGHTS, CONFIG, STATISTICS, NOTES, CARD, PICTURES)
_ROOT = "base_model.model."  # PeftModel.from_pretrained wants it in the keys
PARTIAL = "partial:"
_SAMPLES = 64
_SHAPING = (
    *("n_atoms", "k", "sparsifier", "encoder", "threshold", "normalize", "encoder_bias", "steps", "size_pattern"),
    *("sites", "gate_input", "gate_mask", "gate_dim", "gate_starts"),
)


# --------------------------------------------------------------------------------------------------- save


def save(
    model: Any,
    folder: str | Path,
    adapter: str = "default",
    *,
    card: dict[str, Any] | None = None,
    statistics: dict[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Write the adapter to a folder that `load` and PeftModel.from_pretrained read; returns the folder.

    `statistics`: tensors by site and name. `card`: `title`, `text`, `base_model`, `license`, `tags`,
    `pictures` (paths, copied in, or pairs of path and caption); any other entry is a row of a table.
    An existing adapter is replaced in one rename, and only by a complete one that was read back; files in
    the folder that are not ours stay. Raises UserError on NaN or infinite weights, a folder that holds
    something else, or a disk that fails.
    """
    folder = Path(folder).resolve()
    base = unwrap(model)
    tensors = {key: t.detach().cpu().contiguous() for key, t in _adapter_tensors(base, adapter).items()}
    _check_finite(tensors, "Training diverged; nothing was saved.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Give a folder.")
    _check_ours(folder)
    config = adapter_config(base, adapter)
    config = dataclasses.replace(
        config,
        atomtune_version=importlib.metadata.version("atomtune"),
        inference_mode=True,
    )
    note_base(config, base)
    fresh = folder.with_name(f".{folder.name}.saving")
    try:
        recover(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        _write_tensors(tensors, fresh / WEIGHTS, config=_shape(config))
        (fresh / CONFIG).write_text(json.dumps(_plain(config), indent=2, sort_keys=True) + "\n")
        if statistics:
            flat = {
                f"{site}.{name}": t.detach().cpu().contiguous()
                for site, named in statistics.items()
                for name, t in named.items()
            }
            _write_tensors(flat, fresh / STATISTICS)
        if noted := notes_text(base, adapter):
            (fresh / NOTES).write_text(noted, encoding="utf-8")
        (fresh / CARD).write_text(_card(config, card or {}, fresh), encoding="utf-8")
        _check_same(_read_tensors(fresh / WEIGHTS)[0], tensors)
        _replace(folder, fresh)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UserError(f"Could not write {folder}: {error}. What was there before is untouched.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _check_ours(folder: Path) -> None:
    """Raises UserError where files lie that a saved adapter would take the names of, and that are no adapter's."""
    taken = [name for name in _OURS if name != PICTURES and (folder / name).exists()]
    if not taken or (folder / RUN_STATUS).is_file():  # a run's own folder was free when it began
        return
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"] if CONFIG in taken else None
    except (ValueError, OSError, TypeError, KeyError, RecursionError):
        kind = NAME if (folder / WEIGHTS).is_file() else None  # a broken one of ours is replaced by a whole one
    if kind != NAME:
        raise UserError(f"{folder} holds {', '.join(taken)} that is no atom adapter's. Choose another folder.")


def _adapter_tensors(base: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's parameters and buffers themselves, by their key in the file."""
    found = {
        f"{_ROOT}{site}.atom_dictionary.{name}": tensor
        for site, layer in atom_layers(base, adapter).items()
        for name, tensor in layer.dictionary(adapter).state_dict().items()
    }
    prompts = gate.prompt_gate(base, adapter)
    for name, tensor in ({} if prompts is None else prompts.state_dict()).items():
        found[f"{_ROOT}{gate.ATTRIBUTE}.gates.{name}"] = tensor
    return found


def _plain(config: AtomConfig) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _write_tensors(tensors: dict[str, Tensor], path: Path, **more: str) -> None:
    """With a checksum in the file itself: one that PEFT writes anew has none, and is believed without.

    The same tensors are the same bytes: safetensors by itself writes metadata in an order that changes.
    """
    metadata = {"format": "pt", "sha256": checksum(tensors), **more}
    data = safetensors.torch.save(tensors)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8 : 8 + size]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _shape(config: AtomConfig) -> str:
    """A hash of the fields that say what the weights compute."""
    return digest_of(json.dumps({name: getattr(config, name) for name in _SHAPING}, sort_keys=True))


def _replace(folder: Path, fresh: Path) -> None:
    """Put the complete folder `fresh` at `folder`, keeping files there that are not ours."""
    for path in [*fresh.rglob("*"), fresh]:
        _sync(path)
    previous = previous_of(folder)
    if folder.exists():
        os.rename(folder, previous)
    os.rename(fresh, folder)
    _sync(folder.parent)
    recover(folder)


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off: at no time is the only good copy without a way back."""
    folder = folder.resolve()
    previous = previous_of(folder)
    if not previous.is_dir():
        return
    if not folder.exists():
        os.rename(previous, folder)
        return
    for entry in _not_ours(previous):
        target = folder / entry.relative_to(previous)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            os.rename(entry, target)
    shutil.rmtree(previous, ignore_errors=True)  # what can't be removed is no reason to fail: the new one is in place


def _not_ours(folder: Path) -> Iterator[Path]:
    """What lies in an adapter's folder and was not saved with it; of pictures, those that its card does not show."""
    yield from (entry for entry in folder.iterdir() if entry.name not in _OURS)
    card, pictures = folder / CARD, folder / PICTURES
    shown = card.read_text(encoding="utf-8") if card.is_file() else ""
    if pictures.is_dir():
        yield from (entry for entry in pictures.iterdir() if f"({PICTURES}/{entry.name})" not in shown)


def previous_of(folder: Path) -> Path:
    """Where the folder lies while another takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _card(config: AtomConfig, card: Mapping[str, Any], fresh: Path) -> str:
    """The model card; copies its pictures into the folder."""
    base = card.get("base_model") or config.base_model_name_or_path
    head = {"library_name": "peft", "base_model": base, "license": card.get("license")}
    sizes = [config.atoms_at(site) for site in config.sites or []]
    rows = {
        "base model": base,
        "atoms": f"{sum(sizes)} at {sum(size > 0 for size in sizes)} of {len(sizes)} sites",
        "sparsifier": config.sparsifier,
        "prompt gate": "yes" if config.gate_input else "no",
        "atomtune": config.atomtune_version,
    }
    own = ("title", "text", "base_model", "license", "tags", "pictures")
    rows |= {name: value for name, value in card.items() if name not in own}
    # JSON strings are YAML strings: nothing in a title can break the front matter.
    front = [f"{name}: {json.dumps(value)}" for name, value in head.items() if value]
    front.append(f"tags: {json.dumps(['atomtune', *card.get('tags', [])])}")
    lines = ["---", *front, "---", f"# {card.get('title', 'An atomtune adapter')}", ""]
    if card.get("text"):
        lines += [card["text"], ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    for number, picture in enumerate(card.get("pictures", [])):
        path, caption = picture if isinstance(picture, tuple) else (picture, "")
        target = Path(PICTURES) / f"{number:02d}{Path(path).suffix}"
        (fresh / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(path, fresh / target)
        lines += ["", f"![{caption}]({target})"]
    lines += ["", "```python", "import atomtune", "adapter = atomtune.load(pipe, folder)", "```", ""]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- load


def load(
    model: Any,
    folder: str | Path,
    adapter: str = "default",
    *,
    allow_other_base: bool = False,
    trainable: bool = False,
) -> None:
    """Attach the adapter in a folder; it becomes the active atom adapter.

    Raises UserError, with the model as it was, on: missing, truncated or foreign files, keys or shapes that
    don't fit, NaN or infinite weights, a newer format, or another base than the adapter was trained on
    (a warning with `allow_other_base`).
    """
    folder = Path(folder).resolve()
    base = unwrap(model)
    config, tensors, shape = _read(folder)
    noted = read_notes(folder)
    config.inference_mode = not trainable
    _check_base(base, config, allow_other_base)
    with _untouched_on_error(model, base, adapter):
        try:
            attach(model, config, adapter)
        except (TypeError, AttributeError, KeyError, RecursionError, re.error) as error:
            raise UserError(f"{folder / CONFIG} is not valid: {error}.") from error
        targets = _adapter_tensors(base, adapter)
        _check_keys(targets, tensors, folder)
        _check_pair(config, shape, folder)
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(tensors[key])
        notes(base, adapter).update(noted)


def load_statistics(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors saved beside an adapter, by site and name; empty where none were saved."""
    path = Path(folder) / STATISTICS
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (_read_tensors(path)[0] if path.exists() else {}).items():
        site, _, name = key.rpartition(".")
        found.setdefault(site, {})[name] = tensor
    return found


def read(folder: str | Path) -> tuple[AtomConfig, dict[str, dict[str, Tensor]], Notes]:
    """What `load` reads, without a model: config, tensors by site (the gate's at `atom_gate`) and name, notes."""
    folder = Path(folder).resolve()
    config, tensors, shape = _read(folder)
    _check_pair(config, shape, folder)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, inside, name = key.removeprefix(_ROOT).partition(".atom_dictionary.")
        if not inside:
            site, _, name = site.partition(".gates.")
        found.setdefault(site, {})[name] = tensor
    return config, found, read_notes(folder)


def check_there(folder: Path) -> None:
    """Raises UserError where no adapter lies in a folder; of a run that has not ended it says how to go on."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if (folder / MIXTURE).is_file():
        raise UserError(f"{folder} is a mixture. Give one of its parts, or merge them: atomtune mix --one-file.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no adapter: {_unfinished(folder) or f'{name} is missing.'}")


def _unfinished(folder: Path) -> str:
    """Where a run stands that has not ended, and how to go on; nothing where the folder is no run's."""
    try:
        found = json.loads((folder / RUN_STATUS).read_text(encoding="utf-8"))
        where = f"the run stands at step {found['step']} of {found['steps']} ({found['state']})"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return f"{where}. Go on: atomtune train --resume --out {folder}"


def _read(folder: Path) -> tuple[AtomConfig, dict[str, Tensor], str | None]:
    """The checked content of a folder, with keys as `save` writes them, and the `_shape` of the weights' own config."""
    recover(folder)
    check_there(folder)
    config = _read_config(folder / CONFIG)
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    _check_finite(tensors, f"{folder / WEIGHTS} is not usable.")
    tensors = {_ROOT + site_name(key.removeprefix(_ROOT)): tensor for key, tensor in tensors.items()}
    if not any(".atom_dictionary." in key for key in tensors):
        raise UserError(f"{folder / WEIGHTS} holds no atoms: none of its {len(tensors)} keys match.")
    # Before anything of that size is made: the config must not promise more than the file holds.
    for site in config.sites or []:
        atoms = tensors.get(f"{_ROOT}{site}.atom_dictionary.atoms")
        held = 0 if atoms is None else len(atoms)
        if config.atoms_at(site) != held:
            raise UserError(f"{folder}: {CONFIG} says {config.atoms_at(site)} atoms at {site}, {WEIGHTS} holds {held}.")
    return config, tensors, metadata.get("config")


def _read_config(path: Path) -> AtomConfig:
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    if not isinstance(values, dict) or values.get("peft_type") != NAME:
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise UserError(f"{path} describes a {kind} adapter, not an atom adapter. Load it with its own library.")
    version = values.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, written by atomtune {values.get('atomtune_version')}; "
            f"this one reads up to {FORMAT_VERSION}. Upgrade atomtune."
        )
    known = {field.name for field in dataclasses.fields(AtomConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        warnings.warn(f"{path}: unknown entries ignored: {', '.join(unknown)}.", stacklevel=4)
    try:
        config = AtomConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not valid: {error}") from error
    if not isinstance(config.sites, list) or not all(isinstance(site, str) for site in config.sites):
        raise UserError(f"{path} is not valid: `sites` must list the sites, got {config.sites!r}.")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, which are those of its checksum if it has one, and its other metadata."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is broken or not a safetensors file: {error}.") from error
    if metadata.get("sha256") not in (None, checksum(tensors)):
        raise UserError(f"{path} is damaged: its checksum is wrong. Put back a copy, or save the adapter again.")
    return tensors, metadata


@contextmanager
def _untouched_on_error(model: Any, base: nn.Module, adapter: str) -> Iterator[None]:
    """Take the adapter off again on an error, and give back what was trainable and active before."""
    configs = getattr(base, "peft_config", None) or {}
    if adapter in configs:
        raise UserError(f"An adapter named {adapter!r} is already attached. Choose another name or delete it.")
    trainable = [(p, p.requires_grad) for p in base.parameters()]
    active = [(m, m._active_adapter) for m in base.modules() if isinstance(m, BaseTunerLayer)]
    of_wrapper = model.active_adapter if isinstance(model, PeftModel) else None
    try:
        yield
    except Exception:
        discard_adapters(model, adapter)
        for layer, names in active:
            layer._active_adapter = names
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if of_wrapper is not None:
            model.active_adapter = of_wrapper
            model.base_model.active_adapter = of_wrapper
        raise


def _check_keys(targets: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    missing, unexpected = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing:
        raise UserError(f"{folder / WEIGHTS} lacks {len(missing)} of {len(targets)} keys: {missing[0]}, ...")
    if unexpected:
        raise UserError(f"{folder / WEIGHTS} has {len(unexpected)} keys that don't fit: {unexpected[0]}, ...")
    for key, target in targets.items():
        if target.shape != tensors[key].shape or target.is_floating_point() != tensors[key].is_floating_point():
            raise UserError(
                f"{folder / WEIGHTS}: {key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, "
                f"the base model needs {target.dtype} {tuple(target.shape)}."
            )


def _check_pair(config: AtomConfig, shape: str | None, folder: Path) -> None:
    if shape not in (None, _shape(config)):
        raise UserError(f"{folder / CONFIG} is not the one that {WEIGHTS} was saved with. Put back the pair.")


def _check_finite(tensors: dict[str, Tensor], then: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{key} holds NaN or infinite values. {then}")


def _check_same(read: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    if read.keys() != written.keys() or not all(torch.equal(read[key], written[key]) for key in read):
        raise OSError("the file read back differs from what was written")


# ------------------------------------------------------------------------------------------- fingerprint


def fingerprint(model: Any, through: torch.dtype = torch.float32) -> str:
    """A hash of the base model under any adapters: its class, and each parameter's name, shape and samples.

    Samples are up to 64 values at even distances, rounded to bfloat16, so that float32 and bfloat16 loads of
    one checkpoint agree; `through` is a precision before that, as of a float16 load. The config file is left out:
    a library's upgrade adds fields to it. Where parameters are quantized or not in memory, they are skipped, and
    the result starts with `partial:`; such a result can't be compared with a full one.
    """
    return _fingerprints(model, through)[0]


def _fingerprints(model: Any, *through: torch.dtype) -> list[str]:
    """`fingerprint` through each of some precisions, the weights read once."""
    base = unwrap(model)
    ours = {
        id(parameter)
        for layer in base.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for parameter in child.parameters()
    }
    named = sorted((site_name(name), p) for name, p in base.named_parameters() if id(p) not in ours)
    plain = [(name, p.detach()) for name, p in named if _is_plain(p)]
    digests = [hashlib.sha256(type(base).__name__.encode()) for _ in through]
    for name, parameter in plain:
        flat = parameter.flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].cpu()
        for digest, precision in zip(digests, through, strict=True):
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.to(precision).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return [("" if len(plain) == len(named) else PARTIAL) + digest.hexdigest() for digest in digests]


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is Tensor and parameter.is_floating_point() and not parameter.is_meta


def note_base(config: AtomConfig, base: nn.Module) -> None:
    """Fill in what the base looks like; where it can't be read, what was known of it tells more."""
    names = ("base_fingerprint", "base_fingerprint_float16")
    for name, found in zip(names, _fingerprints(base, torch.float32, torch.float16), strict=True):
        if getattr(config, name) is None or not found.startswith(PARTIAL):
            setattr(config, name, found)


def prints_of(config: AtomConfig) -> set[str]:
    """What an adapter's base looked like, in the precision that it had, and in float16."""
    return {known for known in (config.base_fingerprint, config.base_fingerprint_float16) if known}


def _check_base(base: nn.Module, config: AtomConfig, allow_other_base: bool) -> None:
    if config.base_fingerprint is None:
        return
    (here, halved), there = _fingerprints(base, torch.float32, torch.float16), config.base_fingerprint
    if prints_of(config) & {here, halved}:
        return
    if here.startswith(PARTIAL) != there.startswith(PARTIAL):
        warnings.warn(
            "The base model is quantized or offloaded, here or in training: whether it is the one this "
            "adapter was trained on can't be checked.",
            stacklevel=3,
        )
        return
    name = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    message = f"The adapter was trained on another base model{name} than this {type(base).__name__}."
    if not allow_other_base:
        raise UserError(f"{message} Load that base, or allow it with --allow-other-base.")
    warnings.warn(message, stacklevel=3)


# ------------------------------------------------------------------------------------------------- prune


def prune(model: Any, keep: dict[str, Tensor], adapter: str = "default") -> None:
    """Keep only the atoms at `keep[site]` (indices into the site's present atoms, in their new order).

    A site that keeps none is dropped; one that `keep` doesn't name stays whole. Parameters are new objects:
    an optimizer made before no longer trains them.
    """
    config = adapter_config(model, adapter)
    layers = atom_layers(model, adapter)
    for site, index in keep.items():
        if site not in layers:
            raise UserError(f"`keep`: no site with atoms is named {site!r}.{did_you_mean(site, layers)}")
        n_atoms, chosen = layers[site].r[adapter], index.tolist()
        if any(not 0 <= i < n_atoms for i in chosen) or len(set(chosen)) < len(chosen):
            raise UserError(f"`keep`: indices at {site} must be different and below {n_atoms}, got {chosen}.")
    for site, index in keep.items():
        _select(layers[site], adapter, index.long())
    sizes = {site: layer.r.get(adapter, 0) for site, layer in layers.items()}
    config.size_pattern = {site: sizes.get(site, 0) for site in config.sites or []}


def _select(layer: AtomLinear, adapter: str, index: Tensor) -> None:
    if not len(index):
        layer.drop(adapter)
        return
    strength = layer.atom_strength[adapter]
    layer.set_dictionary(adapter, layer.dictionary(adapter).select(index), strength[index.to(strength.device)])
