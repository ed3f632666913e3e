"""The repository keeps its promises: no traces of a machine, links that resolve, pins, one way to test."""

import ast
import dataclasses
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "atomtune"
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home|tmp/bash)[/_]")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.(?:npmjs|yarnpkg|npmmirror)\b")
PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==(\d+[a-z0-9.]*)")
NOT_OURS = {"__pycache__", "build", "dist", "node_modules", "runs"}


@cache
def files() -> tuple[Path, ...]:
    """What git holds or would take; without git, everything but what the tools and the runs leave behind."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, check=False)
        if listed.returncode == 0:
            paths = (ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name)
            return tuple(sorted(path for path in paths if path.is_file()))
    found = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [
            name
            for name in inner
            if name == ".ci" or not (name in NOT_OURS or name.startswith(".") or name.endswith(".egg-info"))
        ]
        found += [Path(folder, name) for name in names]
    return tuple(sorted(path for path in found if path.is_file()))


def text_of(path: Path) -> str | None:
    """The text of a file, None for a binary one."""
    data = path.read_bytes()
    try:
        return None if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        for number, line in enumerate((text_of(path) or "").splitlines(), 1)
        if pattern.search(line)
    ]


def pins() -> dict[str, str]:
    """Package -> version, for every line of constraints.txt that is no comment."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            match = PIN.fullmatch(line)
            assert match, f"constraints.txt: not an exact pin: {line!r}"
            found[match[1]] = match[2]
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_files_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in files()}
    assert {"Makefile", ".ci/run", "src/atomtune/__init__.py", "tests/docs/test_repository.py"} <= names
    assert not any(name.startswith((".venv/", ".git/")) for name in names)


def test_no_path_of_a_machine() -> None:
    assert lines_with(MACHINE_PATH) == []


def test_no_host_of_a_registry() -> None:
    assert lines_with(REGISTRY) == []


@pytest.mark.parametrize("text", ["see |work|x", '"|root|.cache"', "=|home|me|", "|tmp|bash_jobs|1"])
def test_a_machine_path_would_be_seen(text: str) -> None:
    assert MACHINE_PATH.search(text.replace("|", "/"))


@pytest.mark.parametrize("text", ["a/work/b", "https://x.y/home/z", "/tmp/x", "/homestead/"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_assets_stay_small() -> None:
    assets = SOURCE / "scenes" / "assets"
    size = sum(path.stat().st_size for path in files() if path.is_relative_to(assets))
    assert 0 < size <= 40e6, f"{size / 1e6:.1f} MB under scenes/assets"


def test_every_sheet_has_its_notice() -> None:
    notice = (SOURCE / "scenes" / "assets" / "NOTICE.md").read_text(encoding="utf-8")
    for package in ("emoji-datasource-twitter", "emoji-datasource-google", "@lobehub/fluent-emoji-3d"):
        assert package in notice
    for sheet in (path for path in files() if path.suffix == ".webp" and "assets" in path.parts):
        assert f"*-{sheet.stem.partition('-')[2]}.webp" in notice


def links(markdown: str) -> list[str]:
    """Relative targets of a Markdown text, outside its code, without fragments."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, flags=re.MULTILINE)
    found += re.findall(r"\b(?:src|href)=[\"']([^\"']+)", prose)
    relative = (target for target in found if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", target))
    targets = (target.partition("#")[0] for target in relative)
    return [target for target in targets if target]


def test_links_are_read_as_markdown_means_them() -> None:
    text = 'a [b](c.md#d "t") ![e](f/g.png) [h](https://i.j) [k](#l) `[m](n)`\n```\n[o](p)\n```\n<img src="q">\n'
    assert links(text) == ["c.md", "f/g.png", "q"]


def test_relative_links_resolve() -> None:
    broken = [
        f"{path.relative_to(ROOT)} -> {target}"
        for path in files()
        if path.suffix == ".md"
        for target in links(path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert broken == []


def test_constraints_are_exact_and_sorted() -> None:
    assert pins()["torch"] == "2.13.0"
    assert list(pins()) == sorted(pins())


def test_every_direct_dependency_is_pinned() -> None:
    wanted = itertools.chain(project()["dependencies"], *project()["optional-dependencies"].values())
    names = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names - {"atomtune"} <= set(pins())


def outer_imports(tree: ast.Module) -> set[str]:
    """Packages that a module needs to be imported at all: those of its functions, and those that may fail, left out."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try)
    found, waiting = set[str](), [*ast.iter_child_nodes(tree)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
        elif not isinstance(node, inner) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node))[:40]:
            waiting += ast.iter_child_nodes(node)
    return {name.partition(".")[0] for name in found}


def test_nothing_optional_is_needed_to_import_the_package() -> None:
    """Complaint 50: an optional GPU package breaks the install."""
    packages = importlib.metadata.packages_distributions()
    needed = {re.split(r"[^a-z0-9-]", line)[0] for line in project()["dependencies"]}
    asked = {
        name: str(path.relative_to(ROOT))
        for path in files()
        if path.suffix == ".py" and path.is_relative_to(SOURCE)
        for name in outer_imports(ast.parse(text_of(path) or ""))
    }
    outside = asked.keys() - sys.stdlib_module_names - {"atomtune"}
    assert {"torch", "PIL"} <= outside
    ours = {name for name in outside if needed & {d.lower().replace("_", "-") for d in packages.get(name, ())}}
    assert {name: asked[name] for name in outside - ours} == {}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_test_runs_every_check() -> None:
    # Without make's own variables: under `make test` they would speak of the outer make.
    makes_own = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    outside = {name: value for name, value in os.environ.items() if name not in makes_own}
    command = ["make", "--no-print-directory", "-C", str(ROOT), "-n", "test"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True, env=outside).stdout
    for step in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest"):
        assert step in plan


def test_ci_is_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


def test_every_room_is_a_package() -> None:
    """Without `__init__.py` a folder is left out of the wheel, and the import contract does not see it."""
    rooms = {path.parent for path in files() if path.suffix == ".py" and path.is_relative_to(SOURCE)}
    missing = [room for room in sorted(rooms) if not (room / "__init__.py").exists()]
    assert [room.relative_to(ROOT).as_posix() for room in missing] == []


def test_only_scenes_opens_the_sprites() -> None:
    opens = re.compile(r"files\(\s*[\"']atomtune\.scenes|scenes/assets")
    outside = [path for path in files() if path.suffix == ".py" and path.is_relative_to(SOURCE)]
    outside = [path for path in outside if not path.is_relative_to(SOURCE / "scenes")]
    assert [str(path.relative_to(ROOT)) for path in outside if opens.search(text_of(path) or "")] == []


def test_contributing_names_the_fields_of_a_backbone() -> None:
    from atomtune.backbones.base import Backbone

    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = guide.partition("## A new backbone")[2].partition("## A new measure")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(rows)) == [field.name for field in dataclasses.fields(Backbone)]


def test_contributings_sparsifier_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from atomtune.sparse import sparsifiers

    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"## A new sparsifier.*?```python\n(.*?)```", guide, re.DOTALL)
    assert code
    monkeypatch.setattr(sparsifiers, "SPARSIFIERS", dict(sparsifiers.SPARSIFIERS))
    exec(code[1], dict(vars(sparsifiers)))
    pre_codes = torch.linspace(-2, 2, 12).reshape(3, 4)
    codes = sparsifiers.make_sparsifier("capped", 4)(pre_codes)
    assert torch.equal(codes, pre_codes.clamp(0, 1))
