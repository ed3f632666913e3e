"""The tensor cache: right pairing, one edit makes one entry again, damage is mended, nothing half written."""

import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atomtune.data.cache import Cache, key
from atomtune.data.order import batch_at
from atomtune.errors import UserError


def counting(made: list[str], name: str, value: float = 1.0) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        made.append(name)
        return {"latents": torch.full((2, 3), value)}

    return make


def never() -> dict[str, Tensor]:
    raise AssertionError("made although it is there")


def test_key_depends_on_every_part_and_where_parts_end() -> None:
    keys = [
        key("ab", "c"),
        key("a", "bc"),
        key("abc"),
        key(b"abc"),
        key("abc", ""),
        key(),
        key("picture", "512x512", "vae", "float16"),
        key("picture", "512x512", "vae", "float32"),
    ]
    assert len(set(keys)) == len(keys)
    assert key("a", b"b") == key("a", b"b")
    assert len(key()) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    made = {
        "plain": torch.arange(6).reshape(2, 3).to(dtype),
        "turned": torch.arange(6).reshape(2, 3).to(dtype).T,
        "shared": torch.ones(1, dtype=dtype).expand(4),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.ones((0, 3), dtype=dtype),
    }
    cache = Cache(tmp_path)
    first, second = cache.get(key("x"), lambda: made), cache.get(key("x"), never)
    for name, tensor in made.items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor)
        assert second[name].dtype == dtype


def test_gradients_stay_outside(tmp_path: Path) -> None:
    tensors = Cache(tmp_path).get(key("x"), lambda: {"a": torch.ones(2, requires_grad=True) * 2})
    assert not tensors["a"].requires_grad


def test_pairing_holds_over_three_shuffled_epochs(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), list[str]()
    for step in range(9):
        for item in batch_at(step, n=6, batch_size=2, seed=step % 2):
            tensors = cache.get(key(f"picture {item}"), counting(made, str(item), float(item)))
            assert torch.equal(tensors["latents"], torch.full((2, 3), float(item)))
    assert len(made) == len(set(made))


def test_one_edit_or_a_new_dtype_makes_only_what_changed(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), list[str]()
    for name, content in (("a", b"1"), ("b", b"2"), ("a", b"1"), ("b", b"2 edited")):
        cache.get(key(content, "float32"), counting(made, name))
    assert made == ["a", "b", "b"]
    cache.get(key(b"1", "float16"), counting(made, "a in float16"))
    assert made[-1] == "a in float16"


def test_a_crash_keeps_what_was_written(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), list[str]()

    def fails() -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("no memory left")

    cache.get(key("a"), counting(made, "a"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        cache.get(key("b"), fails)
    assert cache.missing([key("a"), key("b")]) == (key("b"),)
    for name in "ab":
        cache.get(key(name), counting(made, name))
    assert made == ["a", "b"]
    assert cache.missing([key("a"), key("b")]) == ()


def damage_short(data: bytes) -> bytes:
    return data[:-3]


def damage_empty(data: bytes) -> bytes:
    return b""


def damage_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def damage_name(data: bytes) -> bytes:
    return data.replace(b'"latents"', b'"latentz"')


def damage_text(data: bytes) -> bytes:
    return b"not a cache entry at all, but long enough"


@pytest.mark.parametrize("damage", [damage_short, damage_empty, damage_bit, damage_name, damage_text])
def test_a_damaged_entry_is_told_and_made_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    cache, made = Cache(tmp_path), list[str]()
    cache.get(key("a"), counting(made, "a", 2.0))
    path = cache.path(key("a"))
    data = damage(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="atomtune.data.cache"):
        tensors = cache.get(key("a"), counting(made, "a again", 2.0))
    assert torch.equal(tensors["latents"], torch.full((2, 3), 2.0))
    assert made == ["a", "a again"]
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    cache.get(key("a"), never)


def test_an_entry_moved_to_anothers_place_is_not_believed(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), list[str]()
    cache.get(key("a"), counting(made, "a", 1.0))
    cache.get(key("b"), counting(made, "b", 2.0))
    shutil.copy(cache.path(key("a")), cache.path(key("b")))
    assert cache.get(key("b"), counting(made, "b again", 2.0))["latents"][0, 0] == 2


def test_deleting_the_folder_at_any_moment_only_costs_time(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "cache"), list[str]()
    kept = cache.get(key("a"), counting(made, "a"))
    shutil.rmtree(cache.folder)
    assert torch.equal(kept["latents"], torch.ones(2, 3))

    def deletes() -> dict[str, Tensor]:
        shutil.rmtree(cache.folder, ignore_errors=True)
        return counting(made, "again")()

    cache.get(key("a"), deletes)
    assert made == ["a", "again"]
    assert cache.read(key("a")) is not None


def test_deleting_between_the_two_halves_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atomtune.data.cache as module

    cache, replace, deletions = Cache(tmp_path / "cache"), module.os.replace, [1]

    def delete_then_replace(source: str, target: Path) -> None:
        if deletions:
            deletions.pop()
            shutil.rmtree(cache.folder)
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", delete_then_replace)
    cache.get(key("a"), counting([], "a"))
    assert cache.read(key("a")) is not None


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atomtune.data.cache as module

    def full(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(UserError, match=r"Could not write the cache entry .*: disk full"):
        Cache(tmp_path).get(key("a"), counting([], "a"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_many_writers_of_one_entry_agree(tmp_path: Path) -> None:
    """Threads, each with a cache of its own, share nothing but the folder, as processes do."""
    results: list[Tensor] = []
    gate = threading.Barrier(4)

    def work() -> None:
        cache = Cache(tmp_path)

        def make() -> dict[str, Tensor]:
            gate.wait(timeout=10)  # all four find it missing
            return {"latents": torch.arange(1000.0)}

        results.append(cache.get(key("a"), make)["latents"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, torch.arange(1000.0)) for result in results)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key('a')}.safetensors"]


OTHER_PROCESS = """
import sys, torch
from pathlib import Path
from atomtune.data.cache import Cache, key
print("ready", flush=True)
sys.stdin.readline()
for item in range(40):
    made = {"latents": torch.full((99,), float(item))}
    tensors = Cache(Path(sys.argv[1])).get(key(str(item)), lambda: made)
    assert torch.equal(tensors["latents"], torch.full((99,), float(item)))
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", OTHER_PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        for item in range(40):
            tensors = Cache(tmp_path).get(key(str(item)), lambda item=item: {"latents": torch.full((99,), float(item))})
            assert torch.equal(tensors["latents"], torch.full((99,), float(item)))
        other.stdin.close()
        assert other.wait(timeout=20) == 0
    assert Cache(tmp_path).missing(key(str(item)) for item in range(40)) == ()
    assert list(tmp_path.rglob("*.tmp")) == []


def test_nothing_made_and_a_file_for_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        Cache(tmp_path).get(key("a"), dict)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a folder, got the file"):
        Cache(tmp_path / "file")
