"""A finished adapter on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

FILES = ("adapter_model.safetensors", "adapter_config.json", "statistics.safetensors", "notes.json", "README.md")
"""What is sent: the adapter, and nothing else that a run folder holds."""


def push(run: Path, repository: str) -> str:
    """Send the adapter in a run's folder to a repository, made private where there is none; returns its address.

    Raises whatever the hub and the network raise; the adapter is safe on disk by then.
    """
    api = HfApi()
    address = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=run,
        allow_patterns=[*FILES, "pictures/*"],
        commit_message="Adapter trained with atomtune",
    )
    return str(address)
