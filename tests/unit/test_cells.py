import errno
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atomtune.compare.cells import Cell, Outcome, Store, code_digest, plain_rows
from atomtune.errors import UserError


def cell(**changed: Any) -> Cell:
    fields = {"task": "customization", "method": "lora", "subject": "pineapple", "seed": 0, "config": {"lr": 0.1}}
    return Cell(**(fields | changed))


def outcome(**changed: Any) -> Outcome:
    good = Outcome(cell(), [{"score": 0.5, "note": "é", "kept": None, "ok": True}], None, 1.25, "abc", "2026-01-01")
    return replace(good, **changed)


# ------------------------------------------------------------------------------------------------- cells
def test_the_key_is_of_everything() -> None:
    others = [
        cell(task="style"),
        cell(method="dora"),
        cell(subject="kite"),
        cell(seed=1),
        cell(config={"lr": 0.2}),
        cell(config={"lr": "0.1"}),
        cell(config={"lr": 0.1, "steps": None}),
        cell(config={"lr": [0.1]}),
    ]
    assert len({c.key for c in (cell(), *others)}) == 9
    assert len(cell().key) == 20
    assert int(cell().key, 16) >= 0


def test_a_key_is_for_good() -> None:
    # Were it to change with a version of ours, all that was measured before would be measured again.
    assert cell(config={"lr": 1e-3, "prior": None, "sizes": [1, 2.5]}).key == "28479cef90fbc0e63254"


def test_order_of_config_and_kind_of_whole_numbers_do_not_matter() -> None:
    a = cell(config={"lr": 1, "inner": {"a": [1, 2], "b": -0.0}})
    b = cell(config={"inner": {"b": 0, "a": (1.0, 2)}, "lr": 1.0})
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b}) == 1
    assert cell(config={"lr": True}) != cell(config={"lr": 1})


def test_a_cell_keeps_its_own_config() -> None:
    config = {"sizes": [1]}
    ours = cell(config=config)
    config["sizes"].append(2)
    assert ours.config == {"sizes": [1]}
    assert pickle.loads(pickle.dumps(ours)) == ours


def test_the_label_is_for_people() -> None:
    assert cell().label == "customization lora pineapple seed 0"
    assert cell(task="language", subject="").label == "language lora seed 0"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": {"lr": math.nan}}, "config.lr"),
        ({"config": {"a": {"b": [1, math.inf]}}}, r"config\.a\.b\[1\]"),
        ({"config": {1: 2}}, "config"),
        ({"config": {"folder": Path("x")}}, "config.folder"),
        ({"config": [1]}, "config"),
        ({"seed": "0"}, "seed"),
        ({"seed": True}, "seed"),
        ({"subject": None}, "subject"),
    ],
)
def test_what_is_no_json_is_told_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"`{named}` of a cell must be"):
        cell(**changed)


# ------------------------------------------------------------------------------------------------- rows
def test_rows_become_plain() -> None:
    given = [
        {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": np.bool_(True), "e": None, "f": "x"}
    ]
    rows = plain_rows(given)
    assert rows == [{"a": 0.5, "b": 3, "c": 0.25, "d": True, "e": None, "f": "x"}]
    assert [type(value) for value in rows[0].values()] == [float, int, float, bool, type(None), str]


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), [1], {"x": 1}, torch.ones(3), Path("x")])
def test_a_value_that_is_none_is_told_by_column(value: Any) -> None:
    with pytest.raises(ValueError, match="column `drift` of row 1 must be text, a finite number or None, got"):
        plain_rows([{"drift": 0.0}, {"score": 1.0, "drift": value}])


@pytest.mark.parametrize("rows", [None, {"a": 1}, [], [1], [{1: 2}]])
def test_what_is_no_rows_is_an_error(rows: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        plain_rows(rows)


# ------------------------------------------------------------------------------------------------- store
def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, failed = Store(tmp_path), outcome(rows=None, error="killed by signal 9")
    assert store.read(cell()) is None
    assert not list(tmp_path.iterdir())  # reading makes nothing
    for each in (outcome(), failed):
        store.write(each)
        assert store.read(cell()) == each
    data = json.loads((tmp_path / "cells" / f"{cell().key}.json").read_text())
    assert data["cell"]["config"] == {"lr": 0.1}
    assert (data["error"], data["rows"]) == ("killed by signal 9", None)
    store.write(outcome())
    data = json.loads(store.path(cell()).read_text())
    assert list(data) == ["cell", "rows", "seconds", "code", "started"]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{cell().key}.json"]
    assert store.read(cell(seed=1)) is None


def test_a_cut_file_is_absent_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.write(outcome())
    whole = store.path(cell()).read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        store.path(cell()).write_bytes(whole[:length])
        with caplog.at_level(logging.WARNING):
            assert store.read(cell()) is None
        assert "is broken" in caplog.records[-1].getMessage()
        assert "customization lora pineapple seed 0" in caplog.records[-1].getMessage()
        assert store.path(cell()).read_bytes() == whole[:length]
    store.write(outcome())
    assert store.read(cell()) == outcome()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": 1'),
        ('"lr": 0.1', '"lr": 0.2'),
        ('"score": 0.5', '"score": NaN'),
        ('"seconds"', '"second"'),
        ('"rows"', '"row"'),
        ('"cell"', '"cells"'),
        ('"code"', '"error": "both", "code"'),
        ("{", "["),
        ('"started"', '"s\\u0000'),
    ],
)
def test_a_file_of_another_or_of_nobody_is_absent(tmp_path: Path, old: str, new: str) -> None:
    store = Store(tmp_path)
    store.write(outcome())
    text = store.path(cell()).read_text()
    assert old in text
    store.path(cell()).write_text(text.replace(old, new, 1))
    assert store.read(cell()) is None


@pytest.mark.parametrize("content", [b"", b"\0" * 400, b"\xff\xfe", b"null", b"[]", b'"x"', b"{}", b'{"cell": 3}'])
def test_rubbish_is_absent(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.write(outcome())
    store.path(cell()).write_bytes(content)
    assert store.read(cell()) is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = Store(tmp_path)
    store.write(outcome())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match=r"Could not write .*No space left on device\. Free space") as caught:
        store.write(outcome(seconds=2.0))
    assert "\n" not in str(caught.value)
    assert store.read(cell()) == outcome()
    assert len(list((tmp_path / "cells").iterdir())) == 1


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).write(outcome())
    assert list((tmp_path / "cells").iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    with (
        pytest.raises(UserError, match=r"`folder` must be a folder that can be written, got .*Not a directory"),
        store.claim(cell()),
    ):
        pass
    with pytest.raises(UserError, match="Could not write"):
        store.write(outcome())
    with pytest.raises(UserError, match="Could not read"):
        store.read(cell())


# ------------------------------------------------------------------------------------------------- claims
def test_one_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.claim(cell()) as first, store.claim(cell()) as second, store.claim(cell(seed=1)) as other:
        assert (first, second, other) == (True, False, True)
        with Store(tmp_path).claim(cell()) as third:
            assert not third
    with store.claim(cell()) as later:
        assert later
    assert list((tmp_path / "cells").iterdir()) == []


def test_a_claim_ends_with_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="ours"), store.claim(cell()):
        raise RuntimeError("ours")
    with store.claim(cell()) as again:
        assert again


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from atomtune.compare.cells import Cell, Store
        cell = Cell("customization", "lora", "pineapple", 0, {"lr": 0.1})
        with Store(Path(sys.argv[1])).claim(cell) as ours:
            (Path(sys.argv[1]) / "cells" / f".{cell.key}.1-ab.tmp").write_text("{")
            print(ours, flush=True)
            time.sleep(60)
    """)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with store.claim(cell()) as ours:
            assert not ours
        holder.kill()
    assert len(list((tmp_path / "cells").iterdir())) == 2
    with store.claim(cell()) as ours:
        assert ours
    assert list((tmp_path / "cells").iterdir()) == []


def test_many_processes_claim_in_turn(tmp_path: Path) -> None:
    """A counter that loses counts if two ever hold the claim at once; lock files come and go all the time."""
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from atomtune.compare.cells import Cell, Store
        folder, cell = Path(sys.argv[1]), Cell("t", "m", "s", 0, {})
        left = 60
        while left:
            with Store(folder).claim(cell) as ours:
                if ours:
                    count = int((folder / "count").read_text())
                    time.sleep(0.0005)
                    (folder / "count").write_text(str(count + 1))
                    left -= 1
    """)
    (tmp_path / "count").write_text("0")
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "180"
    assert list((tmp_path / "cells").iterdir()) == []


# ------------------------------------------------------------------------------------------------- code
@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "digested"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inner" / "__init__.py").write_text("raise SystemExit  # must not be imported\n")
    (folder / "work.py").write_text('"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    (tmp_path / "single.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with ExitStack() as stack:
        stack.callback(lambda: [sys.modules.pop(name, None) for name in ("digested", "digested.work")])
        yield folder


def test_words_do_not_change_the_digest(package: Path) -> None:
    before = code_digest(["digested"])
    assert len(before) == 20
    (package / "work.py").write_text("# A comment.\ndef f(x):\n    '''Another.'''\n\n    return (x +\n            1)\n")
    assert code_digest(["digested"]) == before
    (package / "notes.txt").write_text("x")
    (package / ".#work.py").symlink_to("nowhere")  # as editors do
    assert code_digest(["digested"]) == before
    assert "digested.inner" not in sys.modules


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("work.py", '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 2\n'),
        ("work.py", 'def f(x):\n    """Doc."""\n    return "x + 1"\n'),
        ("work.py", "def f(x:\n"),
        ("inner/new.py", ""),
        ("inner/__init__.py", "pass\n"),
    ],
)
def test_code_changes_the_digest(package: Path, file: str, text: str) -> None:
    before = code_digest(["digested"])
    (package / file).write_text(text)
    assert code_digest(["digested"]) != before


def test_the_digest_is_of_the_named_modules(package: Path) -> None:
    both = code_digest(["digested", "single"])
    assert both == code_digest(["single", "digested", "single"])
    assert len({both, code_digest(["digested"]), code_digest(["single"]), code_digest(["digested.work"])}) == 4
    (package.parent / "single.py").write_text("a = 2\n")
    assert code_digest(["digested", "single"]) != both


def test_the_digest_says_nothing_of_the_place(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = code_digest(["digested"])
    (tmp_path / "elsewhere").mkdir()
    package.rename(tmp_path / "elsewhere" / "digested")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert code_digest(["digested"]) == before


@pytest.mark.parametrize("module", ["no_such_module", "no.such.module", "math", "", "__main__x"])
def test_a_module_without_source_is_told(module: str) -> None:
    with pytest.raises(UserError, match=f"`modules` must name modules .*got '{module}'"):
        code_digest([module])


def test_the_key_knows_nothing_of_the_code(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(outcome(code="one"))
    assert store.read(cell()) == outcome(code="one")
    store.write(outcome(code="two"))
    assert len(list((tmp_path / "cells").iterdir())) == 1
