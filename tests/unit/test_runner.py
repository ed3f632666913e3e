import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atomtune.compare import runner
from atomtune.compare.cells import Cell, Outcome, Store
from atomtune.compare.results import others, restore, rows, write_result
from atomtune.compare.runner import run
from atomtune.errors import UserError

# What the children import. A cell does what its task says, and leaves a line in the file `trace`.
WORK = """
import os, signal, subprocess, sys, time
from pathlib import Path


def measure(cell, folder):
    folder = Path(cell.config["folder"])
    with (folder / "trace").open("a") as file:
        file.write(f"{cell.task}-{cell.seed} {os.getpid()}\\n")
    tried = (folder / "trace").read_text().count(f"{cell.task}-{cell.seed} ")
    print("measuring", cell.label)
    if cell.task == "crash once" and tried == 1:
        os._exit(3)
    if cell.task == "raise":
        raise ValueError("two\\nlines")
    if cell.task == "exit":
        sys.exit(0)
    if cell.task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.task == "nan":
        return [{"score": 1.0}, {"score": float("nan")}]
    if cell.task == "big":
        return [{"text": "x" * 1_000_000}]
    if cell.task == "orphan":
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / "orphan").write_text(str(left.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.task == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "deaf").write_text("")
    if cell.task in ("wait", "stubborn"):
        for _ in range(1200):
            if (folder / "go").exists():
                break
            time.sleep(0.05)
    time.sleep(cell.config.get("sleep", 0))
    threads = os.environ["OMP_NUM_THREADS"]
    return [{"score": cell.seed / 2, "torch": "torch" in sys.modules, "threads": threads, "pid": os.getpid()}]
"""

# A run in a process of its own, which can be killed.
DRIVER = """
import json, signal, sys
from pathlib import Path
from atomtune.compare.cells import Cell
from atomtune.compare.runner import run

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cells, folder, options = json.loads(sys.argv[1])
    cells = [Cell(**cell) for cell in cells]
    print(json.dumps([outcome.rows for outcome in run(cells, "grid_work:measure", Path(folder), **options)]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where cells leave their traces; the module of the work can be imported, by the children too."""
    (tmp_path / "grid_work.py").write_text(WORK)
    (tmp_path / "grid_driver.py").write_text(DRIVER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def drivers(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with contextlib.ExitStack() as stack:

        def start(cells: list[Cell], **options: Any) -> subprocess.Popen[str]:
            plain = [dict(vars(cell)) for cell in cells]
            for fields in plain:
                fields.pop("key", None)
            plan = json.dumps([plain, str(folder / "store"), options])
            command = [sys.executable, str(folder / "grid_driver.py"), plan]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def cell(folder: Path, task: str, seed: int = 0, **config: Any) -> Cell:
    return Cell(task, "lora", "kite", seed, {"folder": str(folder), **config})


def measured(folder: Path, cells: list[Cell], **options: Any) -> list[Outcome]:
    return run(cells, "grid_work:measure", folder / "store", **({"progress": False} | options))


def trace(folder: Path) -> Counter[str]:
    """How often each cell was begun."""
    path = folder / "trace"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.rpartition(" ")[0] for line in lines)


def pids(folder: Path) -> list[int]:
    return [int(line.rpartition(" ")[2]) for line in (folder / "trace").read_text().splitlines()]


def alive(pid: int) -> bool:
    """Zombies that nobody has collected are dead."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in (folder / "store" / "cells").iterdir() if path.suffix not in (".json", ".log")]


# ------------------------------------------------------------------------------------------------- one run
def test_what_becomes_of_cells(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = ["raise", "fine", "crash once", "kill", "nan", "exit", "big"]
    cells = [cell(folder, task) for task in tasks]
    with caplog.at_level(logging.WARNING):
        outcomes = measured(folder, [*cells, cells[1]], processes=2)
    assert [outcome.cell for outcome in outcomes] == cells
    errors = {outcome.cell.task: outcome.error for outcome in outcomes}
    assert errors == {
        "raise": "ValueError: two lines",
        "fine": None,
        "crash once": None,
        "kill": "killed by signal 9",
        "nan": "ValueError: column `score` of row 1 must be text, a finite number or None, got nan",
        "exit": "SystemExit: 0",
        "big": None,
    }
    assert trace(folder) == {f"{task}-0": 1 if task in ("fine", "big") else 2 for task in tasks}
    good = {outcome.cell.task: outcome.rows for outcome in outcomes if outcome.rows}
    assert good["fine"][0] | {"pid": 0} == {"score": 0.0, "torch": False, "threads": "1", "pid": 0}
    assert good["big"] == [{"text": "x" * 1_000_000}]
    assert len(set(pids(folder))) == 12  # a fresh process each time
    assert os.getpid() not in pids(folder)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "failed: kill lora kite seed 0: killed by signal 9 (more in " in said

    store = Store(folder / "store")
    assert [store.read(c) for c in cells] == outcomes
    assert all(outcome.code and outcome.started.startswith("20") and outcome.seconds >= 0 for outcome in outcomes)
    logs = {c.task: store.log(c).read_text() for c in cells}
    assert logs["fine"] == "measuring fine lora kite seed 0\n"
    assert logs["raise"].count("Traceback (most recent call last)") == 2
    assert logs["raise"].count('raise ValueError("two') == 2
    assert "--- attempt 1 failed: ended with exit code 3 before it gave its rows" in logs["crash once"]
    assert logs["kill"].startswith("measuring kill")
    assert logs["kill"].endswith("--- failed: killed by signal 9\n")
    assert left_behind(folder) == []


def test_a_second_run_tries_only_what_failed(folder: Path) -> None:
    cells = [cell(folder, "fine"), cell(folder, "raise")]
    first = measured(folder, cells, retries=0)
    second = measured(folder, cells, retries=0)
    assert trace(folder) == {"fine-0": 1, "raise-0": 2}
    assert second[0] == first[0]
    assert second[1].error == first[1].error
    assert second[1].started > first[1].started
    third = measured(folder, cells[:1], again=True, threads=3)
    assert trace(folder) == {"fine-0": 2, "raise-0": 2}
    assert third[0].rows is not None
    assert third[0].rows[0]["threads"] == "3"
    other = cell(folder, "fine", sleep=0.01)
    measured(folder, [other])
    assert trace(folder) == {"fine-0": 3, "raise-0": 2}


def test_a_finished_grid_needs_no_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(folder, [cell(folder, "fine")])
    monkeypatch.setattr(Store, "claim", None)
    monkeypatch.setattr(Store, "write", None)
    assert measured(folder, [cell(folder, "fine")]) == first
    assert measured(folder, []) == []


def test_a_broken_file_is_measured_again(folder: Path) -> None:
    only = cell(folder, "fine")
    measured(folder, [only])
    path = Store(folder / "store").path(only)
    path.write_bytes(path.read_bytes()[:-20])
    assert measured(folder, [only])[0].rows
    assert trace(folder) == {"fine-0": 2}
    assert Store(folder / "store").read(only) is not None


def test_what_a_cell_starts_ends_with_it(folder: Path) -> None:
    begin = time.monotonic()
    assert measured(folder, [cell(folder, "orphan")], retries=0)[0].error == "killed by signal 9"
    until(lambda: not alive(int((folder / "orphan").read_text())), 5)
    assert time.monotonic() - begin < 20


def test_the_environment_is_as_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    assert (measured(folder, [cell(folder, "fine")])[0].rows or [{}])[0]["threads"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    assert signal.getsignal(signal.SIGINT) is handler


def test_torch_is_told_its_threads(folder: Path) -> None:
    (folder / "torch.py").write_text("told = []\nset_num_threads = told.append\n")  # found first by the child
    (folder / "torch_work.py").write_text(
        "import torch\n\n\ndef f(cell, folder):\n    return [{'told': torch.told[-1]}]\n"
    )
    outcome = run([cell(folder, "x")], "torch_work:f", folder / "store", progress=False, threads=2)[0]
    assert outcome.rows == [{"told": 2}]


def test_a_run_from_a_thread(folder: Path) -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(measured(folder, [cell(folder, "fine")])))
    thread.start()
    thread.join()
    assert found[0].rows


def test_code_is_that_of_the_work(folder: Path) -> None:
    first = measured(folder, [cell(folder, "fine")])[0]
    (folder / "grid_work.py").write_text(WORK + "\n# a comment\n")
    assert measured(folder, [cell(folder, "fine", 1)])[0].code == first.code
    (folder / "grid_work.py").write_text(WORK + "\nx = 1\n")
    assert measured(folder, [cell(folder, "fine", 2)])[0].code != first.code
    assert measured(folder, [cell(folder, "fine")])[0] == first


def test_the_bar_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(folder, [cell(folder, "fine")])
    cells = [cell(folder, "fine"), cell(folder, "raise"), cell(folder, "fine", 1)]
    measured(folder, cells, retries=0, progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "failed: raise lora kite seed 0: ValueError: two lines (more in " in said.err
    last = said.err.strip().splitlines()[-1]
    assert "3/3" in last
    assert "2 done, 1 failed, 0 running; last: fine lora kite seed 1" in last


# ------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "`processes` must be at least 1, got 0"),
        ({"retries": -1}, "`retries` must be at least 0, got -1"),
        ({"threads": 0}, "`threads` must be at least 1, got 0"),
        ({"work": "grid_work"}, "`work` must be module:function, .* got 'grid_work'"),
        ({"work": "grid_work:"}, "`work` must be module:function"),
        ({"work": ":measure"}, "`work` must be module:function"),
        ({"work": "no_such.module:f"}, "`work` must be module:function"),
        ({"modules": ["no_such"]}, "`modules` must name modules"),
    ],
)
def test_mistakes_are_told_before_the_work(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**({"cells": [cell(folder, "fine")], "work": "grid_work:measure", "folder": folder / "store"} | options))
    assert not (folder / "store").exists()


def test_a_missing_function_fails_the_cell(folder: Path) -> None:
    outcome = run([cell(folder, "fine")], "grid_work:missing", folder / "store", progress=False, retries=0)[0]
    assert outcome.error == "AttributeError: module 'grid_work' has no attribute 'missing'"


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "store").write_text("")
    with pytest.raises(UserError, match=r"Not a directory\)?. "):
        measured(folder, [cell(folder, "fine")])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_stops_the_run_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cells = [cell(folder, "fine"), cell(folder, "wait")]
    monkeypatch.setattr(os, step, full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        measured(folder, cells, processes=2)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(folder))
    assert "\n" not in str(caught.value)
    assert left_behind(folder) == []
    assert not any(alive(pid) for pid in pids(folder))
    (folder / "go").write_text("")
    assert all(outcome.rows for outcome in measured(folder, cells))


# ------------------------------------------------------------------------------------------------- stopped runs
def test_a_killed_run_goes_on(folder: Path, drivers: Callable[..., subprocess.Popen[str]]) -> None:
    cells = [cell(folder, "fine"), cell(folder, "raise"), cell(folder, "wait", 1), cell(folder, "wait", 2)]
    driver = drivers(cells, processes=2, retries=0)
    until(lambda: sum(trace(folder).values()) == 4)
    until(lambda: len(list((folder / "store" / "cells").glob("*.json"))) == 2)
    driver.kill()
    driver.wait()
    until(lambda: not any(alive(pid) for pid in pids(folder)), 15)  # no child is left to work for nobody
    assert len(left_behind(folder)) == 2  # its lock files
    (folder / "go").write_text("")
    outcomes = measured(folder, cells, processes=2, retries=0)
    assert [outcome.rows is not None for outcome in outcomes] == [True, False, True, True]
    assert trace(folder) == {"fine-0": 1, "raise-0": 2, "wait-1": 2, "wait-2": 2}
    assert left_behind(folder) == []


def test_ctrl_c(folder: Path, drivers: Callable[..., subprocess.Popen[str]]) -> None:
    cells = [cell(folder, "fine"), cell(folder, "wait", 1), cell(folder, "wait", 2), cell(folder, "fine", 3)]
    driver = drivers(cells, processes=2)
    until(lambda: sum(trace(folder).values()) == 3)
    begin = time.monotonic()
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=30)[1]
    assert time.monotonic() - begin < runner.GRACE
    assert driver.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "Stopping 2 running cells; Ctrl-C again stops at once." in said
    assert "Stopped. 1 of 4 cells are kept in" in said
    assert "the same command goes on." in said
    assert not any(alive(pid) for pid in pids(folder))
    assert left_behind(folder) == []
    assert len(list((folder / "store" / "cells").glob("*.json"))) == 1
    (folder / "go").write_text("")
    assert all(outcome.rows for outcome in measured(folder, cells, processes=2))
    assert trace(folder) == {"fine-0": 1, "wait-1": 2, "wait-2": 2, "fine-3": 1}


def test_a_second_ctrl_c_stops_at_once(folder: Path, drivers: Callable[..., subprocess.Popen[str]]) -> None:
    driver = drivers([cell(folder, "stubborn")])
    until((folder / "deaf").exists)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.9)
    assert driver.poll() is None  # it waits for the child
    begin = time.monotonic()
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=30)
    assert time.monotonic() - begin < 3
    assert driver.returncode == -signal.SIGINT
    assert not any(alive(pid) for pid in pids(folder))
    assert left_behind(folder) == []


# ------------------------------------------------------------------------------------------------- two runs
def test_two_runs_share_the_work(folder: Path, drivers: Callable[..., subprocess.Popen[str]]) -> None:
    cells = [cell(folder, "fine", seed, sleep=0.05) for seed in range(6)]
    cells += [cell(folder, "raise", 100)]
    two = [drivers(cells, progress=False, retries=0), drivers(cells[::-1], progress=False, retries=0)]
    first, second = (json.loads(driver.communicate(timeout=60)[0]) for driver in two)
    assert first == second[::-1]
    # The failed cell is tried once too, or twice if one run was over before the other had begun.
    assert trace(folder) - Counter({"raise-100": 2}) == {f"fine-{seed}": 1 for seed in range(6)}
    assert left_behind(folder) == []
    assert measured(folder, cells[:6], progress=False) == [Store(folder / "store").read(c) for c in cells[:6]]


def test_cells_of_a_run_that_dies_are_run_here(folder: Path, drivers: Callable[..., subprocess.Popen[str]]) -> None:
    held = cell(folder, "wait")
    cells = [held, *(cell(folder, "fine", seed) for seed in range(2))]
    other = drivers([held])
    until(lambda: trace(folder)["wait-0"] == 1)
    ours = drivers(cells)
    until(lambda: len(list((folder / "store" / "cells").glob("*.json"))) == 2)
    time.sleep(0.8)
    assert ours.poll() is None  # it waits for the other
    assert trace(folder)["wait-0"] == 1
    other.kill()
    other.wait()
    (folder / "go").write_text("")
    found, said = ours.communicate(timeout=30)
    assert "0 running, 1 of another run" in said
    assert [each[0]["score"] for each in json.loads(found)] == [0.0, 0.0, 0.5]
    assert trace(folder) == {"wait-0": 2, "fine-0": 1, "fine-1": 1}


def test_what_another_run_measures_meanwhile_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the other too; and with `again`, what was there before does not count, what comes does."""
    good, bad = cell(folder, "fine"), cell(folder, "fine", 1)
    store, claim, tried = Store(folder / "store"), Store.claim, []
    store.write(Outcome(good, [{"score": 1}], None, 1.0, "old", "2026"))
    fresh = [Outcome(good, [{"score": 2}], None, 1.0, "x", "2027"), Outcome(bad, None, "theirs", 1.0, "x", "2027")]
    found: list[Outcome] = []
    with store.claim(good), store.claim(bad):
        monkeypatch.setattr(Store, "claim", lambda self, each: tried.append(each) or claim(self, each))
        thread = threading.Thread(target=lambda: found.extend(measured(folder, [good, bad], again=True)))
        thread.start()
        until(lambda: len(tried) >= 2)
        for outcome in fresh:
            store.write(outcome)
    thread.join()
    assert found == fresh
    assert trace(folder) == {}


# ------------------------------------------------------------------------------------------------- ray
def test_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ["fine", "crash once", "raise", "kill"]
    cells = [cell(folder, task) for task in tasks]
    before = signal.getsignal(signal.SIGTERM)
    # Its sockets lie there, and the system wants their paths short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        outcomes = measured(folder, cells, ray="local", processes=2)
    errors = [outcome.error for outcome in outcomes]
    assert errors[:3] == [None, None, "ValueError: two lines"]
    assert errors[3] is not None
    assert errors[3].startswith("WorkerCrashedError: ")
    assert trace(folder) == {f"{task}-0": 1 if task == "fine" else 2 for task in tasks}
    assert len(set(pids(folder))) == 7
    assert (outcomes[0].rows or [{}])[0]["threads"] == "1"
    log = Store(folder / "store").log(cells[2]).read_text()
    assert log.count("Traceback (most recent call last)") == 2
    assert signal.getsignal(signal.SIGTERM) is before
    assert left_behind(folder) == []
    assert measured(folder, cells[:2]) == outcomes[:2]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:port"])
def test_ray_that_is_not_there(folder: Path, address: str) -> None:
    with pytest.raises(
        UserError, match=f'`ray` must be the address of a cluster that runs, or "local", got .{address}'
    ):
        measured(folder, [cell(folder, "fine")], ray=address)


def test_ray_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"`ray` needs the package ray, which is missing: install atomtune\[ray\]\."):
        measured(folder, [cell(folder, "fine")], ray="local")


# ------------------------------------------------------------------------------------------------- results
def some_outcomes() -> list[Outcome]:
    good, bad = Cell("style", "lora", "kite", 1, {}), Cell("style", "dora", "kite", 2, {})
    measured = [{"score": 0.5, "method": "lora at half"}, {"score": None}]
    return [Outcome(good, measured, None, 1.0, "x"), Outcome(bad, None, "killed by signal 9", 1.0, "x")]


def test_rows_tell_what_failed() -> None:
    found = rows(some_outcomes())
    good, bad = (outcome.cell.key for outcome in some_outcomes())
    assert found == [
        {"task": "style", "method": "lora at half", "subject": "kite", "seed": 1, "cell": good, "score": 0.5},
        {"task": "style", "method": "lora", "subject": "kite", "seed": 1, "cell": good, "score": None},
        {"task": "style", "method": "dora", "subject": "kite", "seed": 2, "cell": bad, "error": "killed by signal 9"},
    ]
    assert list(found[0]) == ["task", "method", "subject", "seed", "cell", "score"]


def test_a_grid_goes_on_from_its_stored_result_alone(tmp_path: Path) -> None:
    outcomes = some_outcomes()
    cells = [outcome.cell for outcome in outcomes]
    path = tmp_path / "result.json"
    assert restore(path, cells, tmp_path / "a") == 0
    write_result(path, "c", rows(outcomes), 1.0, outcomes=outcomes)
    assert restore(path, cells, tmp_path / "a") == 1  # the failed one is measured again
    kept = Store(tmp_path / "a").read(cells[0])
    assert kept is not None
    again = tmp_path / "again.json"
    write_result(again, "c", rows([kept, outcomes[1]]), 1.0, outcomes=[kept], started="then")
    assert json.loads(again.read_text())["rows"] == json.loads(path.read_text())["rows"]
    assert json.loads(again.read_text())["cells"] == json.loads(path.read_text())["cells"]
    assert restore(path, cells, tmp_path / "a") == 0
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"`results` holds result.json, which is no whole result"):
        restore(path, cells, tmp_path / "b")


def test_a_result_keeps_what_a_grid_does_not_have(tmp_path: Path) -> None:
    good, bad = some_outcomes()
    path, settings = tmp_path / "result.json", {"task": "style", "set": {"steps": 2}}
    assert others(path, [good.cell], settings) is None
    write_result(path, "c 1", rows([good, bad]), 2.0, outcomes=[good], settings=settings)
    beside = others(path, [bad.cell], settings)
    assert beside is not None
    assert {row["method"] for row in beside.rows} == {"lora", "lora at half"}  # not the failure of the cell itself
    mended = dataclasses.replace(bad, rows=[{"score": 1.0, "size": 4}], error=None)
    mended = dataclasses.replace(mended, cell=dataclasses.replace(bad.cell, config={"size": 4}))
    write_result(path, "c 2", rows([mended]), 1.0, outcomes=[mended], settings=settings, beside=beside)
    result = json.loads(path.read_text())
    assert result["command"] == "c 1\nc 2"
    assert result["cells"].keys() == {good.cell.key, mended.cell.key}
    assert result["seconds"] == 2.0
    again = others(path, [mended.cell], settings)
    assert again is not None
    assert {row["subject"] for row in again.rows} == {"kite"}
    other_size = dataclasses.replace(mended.cell, config={"size": 8})
    again = others(path, [other_size], settings)
    assert again is not None
    assert len(again.rows) == 3
    with pytest.raises(UserError, match="`add` needs a result with settings"):
        others(path, [bad.cell], settings | {"set": {}})


def test_a_result_file_has_the_fields_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, "atomtune compare", rows(some_outcomes()), 12.34)
    result = json.loads(path.read_text())
    stored = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "scenes.json").read_text())
    assert list(result) == list(stored)
    assert result["rows"] == rows(some_outcomes())
    assert result["seconds"] == 12.3
    assert os.uname().nodename not in result["machine"].split(", ")
    assert result["started"].endswith("+00:00")
    write_result(path, "c", [], 1.0, started="2026-01-01", commit="abc", machine="a GPU")
    assert json.loads(path.read_text())["commit"] == "abc"
    assert [each.name for each in path.parent.iterdir()] == ["result.json"]


def test_no_path_of_a_machine_lands_in_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "my work").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    texts = {
        f"--out={here}/runs/x --base '/data/models/a b'": "--out=runs/x --base '.../a b'",
        f"FileNotFoundError: {tmp_path}/me/secret/x.json": "FileNotFoundError: ~/secret/x.json",
        'no (/a/b), "/c", /d/e/: gone': 'no (.../b), ".../c", .../e: gone',
        "see https://a.b/c/d and/or s3://e/f, ../g/h, ./i/j, k/l, 1/2, a / b": None,
        "file:///a/b.json": ".../b.json",
    }
    write_result(tmp_path / "r.json", next(iter(texts)), [{"error": text} for text in texts], 1.0)
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["error"] for row in result["rows"]] == [short or text for text, short in texts.items()]
    assert result["command"] == next(iter(texts.values()))


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column `score` of row 0"):
        write_result(tmp_path / "r.json", "c", [{"score": float("nan")}], 1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        write_result(tmp_path / "file" / "r.json", "c", [], 1.0)
