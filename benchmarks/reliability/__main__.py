"""python benchmarks/reliability [PART ...]: hazards, what survives them, and the table of it.

Parts are those of PARTS; none is all. Writes benchmarks/results/reliability.json, in which the rows of parts that were
not run stay as they are. `--kills`, `--writes` (kills before file operations), `--disks` and `--mutants` are the
numbers, `--seed` draws everything.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks.reliability import damage, full, hostile, kills, mutants, workplace  # noqa: E402

from atomtune.compare.results import write_result  # noqa: E402

PARTS = {
    "moments": lambda place, o: [kills.at_random_moments(place, o.kills - o.kills // 10, o.seed)],
    "fresh": lambda place, o: [kills.at_random_moments_of_a_fresh_process(place, o.kills // 10, o.seed)],
    "writes": lambda place, o: [kills.at_random_writes(place, o.writes, o.seed)],
    "full": lambda place, o: [full.disk(place, o.disks, o.seed)],
    "damage": lambda place, o: damage.rows(place, o.seed),
    "mutants": lambda place, o: mutants.rows(place, o.mutants, o.seed),
    "hostile": lambda place, o: hostile.rows(place),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writes", type=int, default=50)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no more kills and disks begin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reliability.json")
    given = parser.parse_args()
    chosen = given.parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    begin = time.monotonic()
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"rows": [], "seconds": 0}
    if given.parts and before["rows"] and before["command"] != _command(given):
        parser.error(f"a part has the counts and the seed of the others, which came from: {before['command']}")
    found = {part: [row for row in before["rows"] if row["part"] == part] for part in PARTS}
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        place = workplace.prepare(Path(folder))
        place.until = begin + given.minutes * 60
        for part in chosen:
            print(part, file=sys.stderr, flush=True)
            found[part] = [{"part": part, **tally.row()} for tally in PARTS[part](place, given)]
            rows: list[dict[str, Any]] = [row for part in PARTS for row in found[part]]
            for row in found[part]:
                print(json.dumps(row), flush=True)
            seconds = time.monotonic() - begin + (0 if chosen == list(PARTS) else before["seconds"])
            write_result(given.out, _command(given), rows, seconds)
    return int(any(row["survived"] < row["tried"] for row in rows))


def _command(given: argparse.Namespace) -> str:
    """The command that makes the whole table."""
    counts = [f"--{name} {getattr(given, name)}" for name in ("kills", "writes", "disks", "mutants", "seed")]
    counts += [f"--minutes {given.minutes:g}"] if given.minutes < float("inf") else []
    return " ".join(["python benchmarks/reliability", *counts])


if __name__ == "__main__":
    sys.exit(main())
