"""Run the cells of a grid, each in a process of its own, and keep what they give; a stopped grid goes on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from atomtune.compare.cells import Cell, Outcome, Row, Store, code_digest, plain_rows
from atomtune.errors import UserError

log = logging.getLogger(__name__)

TICK = 0.5
"""Seconds between looks at Ctrl-C, and at cells that another run has."""
GRACE = 5.0
"""Seconds that a process gets to end by itself."""


def run(
    cells: Sequence[Cell],
    work: str,
    folder: Path,
    *,
    processes: int = 1,
    retries: int = 1,
    ray: str | None = None,
    progress: bool = True,
    again: bool = False,
    threads: int = 1,
    modules: Sequence[str] | None = None,
) -> list[Outcome]:
    """The outcomes of the cells, in their order and each once: read where `folder` has them, measured otherwise.

    `work` is "module:function", from a Cell and the folder to its rows. Each cell has a fresh process with `threads`
    threads, at most `processes` at once; if it raises or dies it is tried `retries` times more, then kept as failed,
    and tried anew by the next run. `again` measures finished cells too. Any number of runs may share the folder.
    `ray` is the address of a cluster, or "local": its tasks take the place of processes, as many at once as it has
    CPUs / `threads`, or `processes` if that is more. `modules` are those whose source decides the rows (Outcome.code);
    None is the package of `work`. Ctrl-C ends it; what is finished is kept.
    """
    for name, value, least in (("processes", processes, 1), ("retries", retries, 0), ("threads", threads, 1)):
        if value < least:
            raise UserError(f"`{name}` must be at least {least}, got {value}.")
    _check(work)
    sources = (work.partition(".")[0].partition(":")[0],) if modules is None else tuple(modules)
    store, wanted = Store(folder), list(dict.fromkeys(cells))
    before = {cell: store.read(cell) for cell in wanted}
    kept = {} if again else {cell: old for cell, old in before.items() if old is not None and old.error is None}
    if len(kept) < len(wanted):
        code_digest(sources)  # a wrong name is told before the work
        with contextlib.ExitStack() as stack:
            stopped = stack.enter_context(_ctrl_c())
            shown = stack.enter_context(contextlib.closing(_Progress(len(wanted), len(kept), progress)))
            pool: _Pool
            if ray is None:
                pool = _Processes(work, store, processes, threads)
            else:
                pool = _Ray(work, store, processes, threads, retries, ray)
            grid = _Grid(store, pool, retries, sources, before, kept, shown)
            stack.callback(grid.let_go)  # after the pool is closed
            stack.enter_context(contextlib.closing(pool))
            try:
                _work_through(grid, deque(cell for cell in wanted if cell not in kept), stopped)
            except KeyboardInterrupt:
                shown.say(f"Stopping {len(grid.running)} running cells; Ctrl-C again stops at once.")
                pool.close()
                done = sum(outcome.error is None for outcome in grid.settled.values())
                way = "the same command measures all again" if again else "the same command goes on"
                shown.say(f"Stopped. {done} of {len(wanted)} cells are kept in {folder}; {way}.")
                raise
    return [kept[cell] for cell in wanted]


def _check(work: str) -> None:
    module, _, function = work.partition(":")
    try:
        found = bool(function) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UserError(f"`work` must be module:function, of a module that can be imported, got {work!r}.")


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was hit: the first time is only noted, so that nothing is cut short; the second raises."""
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------- grid
class _Try(NamedTuple):
    """How one attempt at a cell ended."""

    rows: list[Row] | None
    error: str | None
    seconds: float
    last: bool = False
    """No other attempt is due, whatever is left of `retries`."""


class _Pool(Protocol):
    size: int

    def start(self, cell: Cell) -> None: ...

    def ended(self, seconds: float) -> list[tuple[Cell, _Try]]:
        """Those that have ended; waits up to `seconds` for the first."""

    def close(self) -> None:
        """End what runs, and wait for it."""


@dataclass
class _Running:
    claim: contextlib.ExitStack
    attempt: int
    started: str
    code: str


@dataclass
class _Grid:
    """What a run knows of its cells."""

    store: Store
    pool: _Pool
    retries: int
    sources: Sequence[str]
    before: Mapping[Cell, Outcome | None]
    """What lay in the store at the start: an outcome that differs from it was measured meanwhile, by another run."""
    settled: dict[Cell, Outcome]
    """Shared with the caller."""
    progress: _Progress

    def __post_init__(self) -> None:
        self.running: dict[Cell, _Running] = {}

    def take(self, cell: Cell) -> bool:
        """Settle the cell by what another run has measured meanwhile, or start it; False if another run has it."""
        with contextlib.ExitStack() as claim:
            if not claim.enter_context(self.store.claim(cell)):
                return False
            outcome = self.store.read(cell)
            if outcome is not None and outcome != self.before[cell]:
                self.settle(outcome)
                return True
            with contextlib.suppress(OSError):
                self.store.log(cell).unlink(missing_ok=True)
            self.start(cell, claim.pop_all(), 1)
        return True

    def start(self, cell: Cell, claim: contextlib.ExitStack, attempt: int) -> None:
        self.running[cell] = _Running(claim, attempt, _now(), code_digest(self.sources))
        self.pool.start(cell)

    def end(self, cell: Cell, result: _Try) -> None:
        """Keep the outcome of a cell, or start it again."""
        ended = self.running[cell]
        if result.error is not None and not result.last and ended.attempt <= self.retries:
            _note(self.store.log(cell), f"--- attempt {ended.attempt} failed: {result.error}\n")
            self.start(cell, ended.claim, ended.attempt + 1)
            return
        seconds = round(result.seconds, 3)
        outcome = Outcome(cell, result.rows, result.error, seconds, ended.code, ended.started)
        self.store.write(outcome)
        if result.error is not None:
            _note(self.store.log(cell), f"--- failed: {result.error}\n")
        del self.running[cell]
        ended.claim.close()
        self.settle(outcome)

    def settle(self, outcome: Outcome) -> None:
        self.settled[outcome.cell] = outcome
        self.progress.settled(outcome, self.store)

    def let_go(self) -> None:
        for running in self.running.values():
            running.claim.close()
        self.running.clear()


def _work_through(grid: _Grid, todo: deque[Cell], stopped: Callable[[], bool]) -> None:
    """Settle all cells; those that another run has come last, when it is done with them or has died."""
    others: deque[Cell] = deque()
    while todo or others or grid.running:
        for _ in range(len(todo) or len(others)):
            if stopped():
                raise KeyboardInterrupt
            if len(grid.running) >= grid.pool.size:
                break
            cell = (todo or others).popleft()
            if not grid.take(cell):
                others.append(cell)
        grid.progress.show(len(grid.running), len(others))
        for cell, result in grid.pool.ended(TICK):
            grid.end(cell, result)
        if stopped():
            raise KeyboardInterrupt
    grid.progress.show(0, 0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _note(path: Path, text: str) -> None:
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(text)


class _Progress:
    """One bar over all cells, on stderr."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        from tqdm import tqdm

        self.shown, self.done, self.failed, self.last, self.text = shown, done, 0, "", ""
        self.bar = tqdm(
            total=total, initial=done, unit="cell", file=sys.stderr, disable=not shown, dynamic_ncols=True, smoothing=0
        )

    def settled(self, outcome: Outcome, store: Store) -> None:
        self.bar.n += 1
        self.done += outcome.error is None
        self.failed += outcome.error is not None
        self.last = f"; last: {outcome.cell.label}"
        if outcome.error is not None:
            self.say(f"failed: {outcome.cell.label}: {outcome.error} (more in {store.log(outcome.cell)})")

    def show(self, running: int, others: int) -> None:
        waiting = f", {others} of another run" if others else ""
        text = f"{self.done} done, {self.failed} failed, {running} running{waiting}{self.last}"
        if text != self.text or sys.stderr.isatty():  # the clock of the bar goes on, but not in a file
            self.bar.set_postfix_str(text)
        self.text = text

    def say(self, text: str) -> None:
        if self.shown:
            self.bar.write(text, file=sys.stderr)
        else:
            log.warning("%s", text)

    def close(self) -> None:
        self.bar.close()


# ---------------------------------------------------------------------------------------------------- one cell
def _measure(work: str, cell: Cell, folder: Path, threads: int) -> _Try:
    """Runs in the process of the cell; what goes wrong is printed in full and told in a line."""
    begin = time.monotonic()
    rows, error = None, None
    try:
        module, _, function = work.partition(":")
        imported = importlib.import_module(module)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(threads)
        rows = plain_rows(getattr(imported, function)(cell, folder))
    except BaseException as problem:  # SystemExit too
        traceback.print_exc()
        error = _reason(problem)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return _Try(rows, error, time.monotonic() - begin)


def _reason(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    name = "" if isinstance(problem, UserError) else type(problem).__name__
    return ": ".join(filter(None, (name, text)))[:400]


def _threads(number: int) -> dict[str, str]:
    """For the environment, read when numpy and torch are first imported."""
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
    return {f"{name}_{'' if name.endswith('MAXIMUM') else 'NUM_'}THREADS": str(number) for name in names}


# ---------------------------------------------------------------------------------------------------- processes
class _Child(NamedTuple):
    process: multiprocessing.process.BaseProcess
    results: multiprocessing.connection.Connection
    begin: float


class _Processes:
    """A spawned process a cell. It leads a process group, so that whatever it starts ends with it."""

    def __init__(self, work: str, store: Store, processes: int, threads: int) -> None:
        self.size, self.work, self.store, self.threads = processes, work, store, threads
        self.children: dict[Cell, _Child] = {}

    def start(self, cell: Cell) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # else `start` does, and lets Ctrl-C through
        results, sender = context.Pipe(duplex=False)
        arguments = (sender, self.work, cell, self.store.folder, self.threads, self.store.log(cell))
        process = context.Process(target=_child, args=arguments, name=cell.label)
        with _inherited(_threads(self.threads)):
            process.start()
        sender.close()
        self.children[cell] = _Child(process, results, time.monotonic())

    def ended(self, seconds: float) -> list[tuple[Cell, _Try]]:
        if not self.children:
            time.sleep(seconds)
        handles = [handle for child in self.children.values() for handle in (child.results, child.process.sentinel)]
        multiprocessing.connection.wait(handles, seconds)
        found = []
        for cell, child in list(self.children.items()):
            alive = child.process.is_alive()
            if child.results.poll() or not alive:
                found.append((cell, _result(child)))
                del self.children[cell]
        return found

    def close(self) -> None:
        try:
            for child in self.children.values():
                _signal(child.process, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
            for child in self.children.values():
                _gone(child.process, deadline - time.monotonic())
        finally:
            for child in self.children.values():
                _end(child)
            self.children.clear()


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """A process started in here has the variables, and no Ctrl-C before it is in its own group."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _child(
    results: multiprocessing.connection.Connection, work: str, cell: Cell, folder: Path, threads: int, path: Path
) -> None:
    os.setpgrp()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        printed = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as problem:
        results.send(_Try(None, _reason(problem), 0.0))
        return
    for stream in (1, 2):
        os.dup2(printed, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a killed process leaves its last line
    results.send(_measure(work, cell, folder, threads))
    results.close()
    if os.path.getsize(path) == 0:
        path.unlink()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _result(child: _Child) -> _Try:
    """What an ended process has sent, or what became of it."""
    try:
        if child.results.poll():
            return child.results.recv()
    except (EOFError, OSError):
        pass
    finally:
        _gone(child.process, GRACE)
        status = child.process.exitcode
        _end(child)
    if status is not None and status < 0:
        error = f"killed by signal {-status}"
    else:
        error = f"ended with exit code {status} before it gave its rows"
    return _Try(None, error, time.monotonic() - child.begin)


def _gone(process: multiprocessing.process.BaseProcess, seconds: float) -> bool:
    """Whether it ends in time. Not `join`, which also waits for processes that it has left behind."""
    deadline = time.monotonic() + seconds
    while process.is_alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _signal(process: multiprocessing.process.BaseProcess, number: int) -> None:
    """To the process and all that it has started."""
    pid = process.pid
    if pid is None:
        return
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # it has no group yet, or nothing is left of it
        if process.is_alive():
            os.kill(pid, number)


def _end(child: _Child) -> None:
    _signal(child.process, signal.SIGKILL)
    if _gone(child.process, GRACE):
        child.process.join()
        child.process.close()
    child.results.close()


# ---------------------------------------------------------------------------------------------------- ray
class _Ray:
    """A task of a Ray cluster a cell; only this side writes files."""

    def __init__(self, work: str, store: Store, processes: int, threads: int, retries: int, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("`ray` needs the package ray, which is missing: install atomtune[ray].") from None
        self.ray, self.work, self.store, self.threads = ray, work, store, threads
        self.ours = not ray.is_initialized()
        self.tasks: dict[Any, tuple[Cell, float]] = {}
        before = signal.getsignal(signal.SIGTERM)
        if self.ours:
            _join_cluster(ray, address, processes * threads)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray has put its own
        self.size = max(processes, int(ray.cluster_resources().get("CPU", 1)) // threads)
        # One call a worker: each cell has a fresh process here too.
        self.task = ray.remote(num_cpus=threads, max_retries=retries, max_calls=1)(_remote)

    def start(self, cell: Cell) -> None:
        task = self.task.remote(self.work, cell, self.store.folder.resolve(), self.threads, os.getcwd(), sys.path)
        self.tasks[task] = (cell, time.monotonic())

    def ended(self, seconds: float) -> list[tuple[Cell, _Try]]:
        if not self.tasks:
            time.sleep(seconds)
            return []
        found = []
        for task in self.ray.wait(list(self.tasks), timeout=seconds)[0]:
            cell, begin = self.tasks.pop(task)
            try:
                result, printed = self.ray.get(task)
            except Exception as problem:  # the worker died, and so did those that Ray started in its place
                result, printed = _Try(None, _reason(problem), time.monotonic() - begin, last=True), ""
            if printed:
                _note(self.store.log(cell), printed)
            found.append((cell, result))
        return found

    def close(self) -> None:
        try:
            for task in self.tasks:
                with contextlib.suppress(Exception):
                    self.ray.cancel(task, force=True)
        finally:
            self.tasks.clear()
            if self.ours:
                self.ray.shutdown()


def _join_cluster(ray: Any, address: str, cpus: int) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report over the network
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1)}
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, **options)
    except Exception as error:
        raise UserError(
            f'`ray` must be the address of a cluster that runs, or "local", got {address!r} ({_reason(error)}).'
        ) from error


def _remote(work: str, cell: Cell, folder: Path, threads: int, workplace: str, path: list[str]) -> tuple[_Try, str]:
    """Runs on the cluster; returns also what the cell has printed."""
    os.environ.update(_threads(threads))
    sys.path.extend(place for place in path if place not in sys.path)
    with contextlib.suppress(OSError):
        os.chdir(workplace)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = _measure(work, cell, folder, threads)
    return result, printed.getvalue()
