"""The reliability campaign: every part in a process of its own, and what it did as a table and a result file.

    python tests/reliability --effort 10 --seed 1 --out benchmarks/results/reliability.json
    python -m benchmarks.report benchmarks/results/reliability.json --readme benchmarks/README.md

A part is a `Part` in the tuple ``PARTS`` of a module of this folder (those whose name begins with an underscore help the others). A
crash, a signal or a hang of its process is a failure, and the campaign goes on. Each part's seed comes from the campaign's seed and the
part's name, so that ``--seed N --only PART`` repeats it. The exit code is 1 where anything failed.

``--sanitized PATH ...`` names folders into which ltkernels was installed with ThreadSanitizer or AddressSanitizer:

    LTKERNELS_SANITIZE=thread pip install --target PATH --no-deps . -Ccmake.build-type=Debug

Without them those parts are skipped, and the result says so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # the contract and the helpers; the oracle

from _part import Part, Tally  # noqa: E402

# Seconds that a part may take at 1x and below.
LIMIT = 300.0


def find_parts(folder: Path, module: str = "[!_]*") -> dict[str, tuple[str, Part]]:
    """Every part of the folder's modules, or of one of them, by name, with its module."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    found: dict[str, tuple[str, Part]] = {}
    for path in sorted(folder.glob(f"{module}.py")):
        for part in importlib.import_module(path.stem).PARTS:
            if part.name in found:
                raise SystemExit(f"two parts are called {part.name!r}")
            found[part.name] = path.stem, part
    return found


def seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def serve(part: Part, seed: int, cases: int, answer: Path) -> None:
    """The process of one part: its tally goes into a file, so that whatever it prints harms nothing."""
    try:
        tally = part.run(seed, cases)
    except Exception:
        tally = Tally(failures=[f"seed {seed}: the part itself raised:\n{traceback.format_exc()}"])
    answer.write_text(json.dumps(asdict(tally)))


def run_part(name: str, module: str, folder: Path, seed: int, cases: int, limit: float) -> tuple[Tally, float]:
    """(what the part did, CPU seconds of its process and of those that it waited for)."""
    with tempfile.TemporaryDirectory() as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log")
        command = [
            sys.executable,
            str(FOLDER),
            "--parts",
            str(folder),
            "--serve",
            module,
            name,
            str(seed),
            str(cases),
            str(answer),
        ]
        with log.open("wb") as output:
            # A session of its own: whatever it leaves behind is ended with it.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=scratch, start_new_session=True
            )
            end, hung = time.monotonic() + limit, False
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                if time.monotonic() > end:
                    hung = True
                    break
                time.sleep(0.02)
            # Before it is reaped: until then its number, which is the group's, belongs to nobody else.
            os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        text = log.read_text(errors="replace").strip()[-2000:]
        where = f"seed {seed}, {cases} cases"
        if hung:
            return Tally(failures=[f"{where}: no end within {limit:g} s\n{text}"]), cpu
        if code != 0 or not answer.exists():
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Tally(failures=[f"{where}: the process ended with {how}\n{text}"]), cpu
        return Tally(**json.loads(answer.read_text())), cpu


def machine() -> dict[str, Any]:
    """As in every result file. The file is loaded by its path: with the checkout on sys.path its ltkernels would be in the way."""
    spec = importlib.util.spec_from_file_location("benchmarks_harness", ROOT / "benchmarks" / "harness.py")
    harness: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = harness
    spec.loader.exec_module(harness)
    return harness.machine()


def campaign(options: argparse.Namespace) -> int:
    parts = find_parts(options.parts)
    unknown = sorted(set(options.only) - set(parts))
    if unknown:
        raise SystemExit(f"unknown part {', '.join(unknown)}; known: {', '.join(parts)}")
    wanted = [found for name, found in parts.items() if not options.only or name in options.only]
    if options.sanitized:
        os.environ["LTKERNELS_SANITIZED"] = os.pathsep.join(str(path.resolve()) for path in options.sanitized)
    os.environ["LTKERNELS_EFFORT"] = str(options.effort)  # some parts need memory that a quick run should not take
    print(f"reliability campaign: effort {options.effort:g}x, seed {options.seed}, {len(wanted)} parts", flush=True)
    rows, failed, begin = [], 0, time.monotonic()
    for module, part in wanted:
        seed, cases = seed_of(options.seed, part.name), max(1, round(part.cases * options.effort))
        tally, cpu = run_part(part.name, module, options.parts, seed, cases, options.limit * max(1.0, options.effort))
        rows.append(
            {"part": part.name, "what": part.what, "seed": seed, "cpu_hours": round(cpu / 3600, 5), **asdict(tally)}
        )
        done = f"skipped: {tally.skipped}" if tally.skipped else f"{tally.cases} cases, {tally.faults} faults injected"
        print(f"{part.name}: {done}, {len(tally.failures)} failures, {cpu:.1f} s of CPU", flush=True)
        for text in tally.failures[:10]:
            print("    " + text.replace("\n", "\n    "), flush=True)
        failed += len(tally.failures)
    cases, faults = (sum(row[name] for row in rows) for name in ("cases", "faults"))
    print(
        f"{cases} cases, {faults} faults injected, {failed} failures in {time.monotonic() - begin:.0f} s; seed {options.seed}"
    )
    if options.out:
        result = {
            "kind": "reliability",
            "machine": machine(),
            "effort": options.effort,
            "seed": options.seed,
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/reliability", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--effort", type=float, default=1.0, help="1, 10 or 100 times the cases (and any number between)"
    )
    parser.add_argument("--seed", type=int, default=None, help="one is drawn and printed where none is given")
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument(
        "--sanitized", type=Path, nargs="+", metavar="PATH", help="folders of sanitized builds, see above"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds that a part may take at 1x (default %(default)g)"
    )
    parser.add_argument("--parts", type=Path, default=FOLDER, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.effort > 0.0:
        parser.error(f"--effort is {options.effort:g}; it must be above 0")
    if options.serve:
        module, name, seed, cases, answer = options.serve
        serve(find_parts(options.parts, module)[name][1], int(seed), int(cases), Path(answer))
        return 0
    if options.seed is None:
        options.seed = secrets.randbelow(2**31)
    return campaign(options)


if __name__ == "__main__":
    sys.exit(main())
