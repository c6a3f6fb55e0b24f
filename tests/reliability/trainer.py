"""The trainer under faults: killed, signalled, a full disk, damaged checkpoints, read-only folders, clocks, two runs at once.

Every life of a run is a forked process that calls the command line. What it must do: end with code 0, or with one line on stderr
and the code that says why; and, resumed as often as it takes, give the numbers of the run that nothing disturbed, to the bit.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from _part import Part, Tally

# Everything that has a state, and a checkpoint after every step.
_TRAIN = """train --model=mlp --loss=ldam --schedule=drw --sampler=progressive --mix=remix --crop=1 --epochs=2 --batch-size=64
    --stage2=crt --retrain-epochs=1 --threads=1 --checkpoint-seconds=0 --resume=auto"""
_EXPERIMENT = """experiment fdg --data=digits-lt --methods=smote --levels=2 --sets=3 --model=mlp --epochs=1 --batch-size=64
    --retrain-epochs=1 --threads=1 --head-ratio=0.97 --processes=1 --checkpoint-seconds=0 --resume=auto"""
_SELECT = "select {} --sets 5 --head-ratio 0.6 --random-repeats 1"
# A life begins where all of this is imported already: it spends its time on what is to be disturbed.
_IMPORTED = (
    "ltkernels.cli",
    "ltkernels.experiments.fdg",
    "sklearn.datasets",
    "scipy.stats",
    "torch._dynamo",
    "matplotlib.pyplot",
    "faiss",
)
_LONG = 120.0
_NO_NAMESPACE = "no namespace of its own for mounts is permitted here"


class Life:
    """One process of the command line, its stderr in a file."""

    def __init__(self, arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self.log = log
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                with log.open("wb") as file:
                    os.dup2(file.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if before:
                    before()
                from ltkernels.cli import main

                code = main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def end(self, seconds: float = _LONG) -> int | None:
        """Exit code (minus the signal that ended it), or None where it still runs after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= until:
                return None
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    @property
    def errors(self) -> str:
        """What it said, but for the line an epoch that a run without a terminal prints."""
        lines = self.log.read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not re.match(r"(pretrain|train|retrain|select)/.* {2}\d+/\d+ ", line))


class Failed(Exception):
    """What a case found."""


def must(condition: Any, text: str) -> None:
    if not condition:
        raise Failed(text)


def _numbers(value: Any) -> Any:
    """A summary without its times and without what may differ between a run and its continuation."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items() if k != "checkpoints" and "seconds" not in k}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def _content(out: Path) -> dict[str, Any]:
    """What must be equal between two runs: every number, log line and weight of the folder."""
    import numpy as np
    import torch

    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        name = str(path.relative_to(out))
        must(".partial" not in name and ".replaced" not in name and "state/" not in name, f"{name} was left behind")
        if path.suffix == ".json":
            found[name] = _numbers(json.loads(path.read_text()))
        elif path.suffix in (".jsonl", ".csv"):
            found[name] = path.read_text()
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)["state"]
            found[name] = {key: value.numpy().tobytes() for key, value in state.items()}
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                found[name] = {key: archive[key].tobytes() for key in archive.files}
    return found


class Case:
    """A folder to run in, and the answer of the run that nothing disturbed."""

    def __init__(self, place: Path, arguments: list[str], whole: dict[str, Any], seconds: float) -> None:
        self.place, self.whole, self.seconds, self.lives = place, whole, seconds, 0
        self.out = place / "run"
        self.arguments = [*arguments, f"--out={self.out}"]

    def start(self, before: Callable[[], None] | None = None) -> Life:
        self.lives += 1
        return Life(self.arguments, self.place / f"log{self.lives}", before)

    def finish(self) -> str:
        """Resume to the end; the answer is the undisturbed one. Returns stderr."""
        life = self.start()
        code = life.end()
        if code is None:
            life.kill()
        must(code == 0, f"resumed, it ended with {code}: {life.errors[-500:]}")
        got = _content(self.out)
        for name in {*self.whole, *got}:
            must(got.get(name) == self.whole.get(name), f"{name} differs from the undisturbed run's")
        return life.errors


def _arguments(kind: str, scratch: Path) -> list[str]:
    import numpy as np

    if kind != "select":
        return (_TRAIN if kind == "train" else _EXPERIMENT).split()
    x = np.random.default_rng(0).normal(size=(260, 12)).astype(np.float32)
    np.savez(scratch / "features.npz", features=x, labels=np.repeat(np.arange(3), (180, 50, 30)))
    return _SELECT.format(scratch / "features.npz").split()


def _campaign(kinds: tuple[str, ...], one: Callable[[Case, random.Random], int], seed: int, cases: int) -> Tally:
    """`one(case, rng)` for every case: it injects faults, returns how many, and raises `Failed`."""
    import torch

    for name in _IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    torch.set_num_threads(1)
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        whole: dict[str, tuple[list[str], dict[str, Any], float]] = {}
        for case in range(cases):
            rng = random.Random(f"{seed} {case}")
            kind = kinds[case % len(kinds)]
            if kind not in whole:
                arguments = _arguments(kind, scratch)
                life = Life([*arguments, f"--out={scratch / kind}"], scratch / "log")
                code, taken = life.end(), time.monotonic() - life.started
                if code != 0:
                    tally.failures.append(
                        f"seed {seed}: the undisturbed {kind} ended with {code}: {life.errors[-800:]}"
                    )
                    return tally
                whole[kind] = arguments, _content(scratch / kind), taken
            folder = scratch / f"case{case}"
            folder.mkdir()
            try:
                tally.faults += one(Case(folder, *whole[kind]), rng)
            except Failed as error:
                tally.failures.append(f"seed {seed} case {case} ({kind}): {error}")
            tally.cases += 1
    return tally


def _killed(case: Case, rng: random.Random) -> int:
    """SIGKILL at random moments, several times in a row."""
    kills = 0
    for _ in range(rng.randrange(1, 7)):
        life = case.start()
        # Most of a life is the work; the first tenth, and what comes after, are looked at too.
        code = life.end(rng.uniform(0.0, 1.1) * case.seconds)
        if code is None:
            life.kill()
            kills += 1
        else:
            must(code == 0 or "exists" in life.errors, f"it ended with {code}: {life.errors[-500:]}")
            break
    if case.arguments[0] == "select" and (case.out / "selection.json").exists():
        must(_content(case.out) == case.whole, "the result differs from the undisturbed one")
        return kills
    case.finish()
    return kills


def _signalled(case: Case, rng: random.Random) -> int:
    """SIGINT and SIGTERM: one line, the code that names the signal, no lock left, and a run that can go on."""
    signum = rng.choice((signal.SIGINT, signal.SIGTERM))
    life = case.start()
    code = life.end(rng.uniform(0.02, 1.0) * case.seconds)
    if code is None:
        os.kill(life.pid, signum)
        code = life.end()
    if code not in (0, -signum):  # it had ended already, or had not come to its handlers yet
        must(code == 128 + signum, f"after {signum.name} it ended with {code}: {life.errors[-500:]}")
        must(life.errors.count("\n") == 1, f"after {signum.name} it said {life.errors[-500:]!r}")
        must(not (case.out / ".lock").exists(), "it left its lock")
    case.finish()
    return 1


def _own_mounts(out: Path, options: str) -> Callable[[], None]:
    """In the calling process and its children: `out` is a small disk of its own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
        if libc.mount(source, target, kind, flags, data) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    if libc.unshare(0x20000) != 0:  # CLONE_NEWNS
        raise PermissionError(ctypes.get_errno(), _NO_NAMESPACE)
    mount(None, b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: nobody else sees it
    out.mkdir(exist_ok=True)
    mount(b"none", os.fsencode(out), b"tmpfs", 0, options.encode())
    return lambda flags, data: mount(None, os.fsencode(out), None, 0x20 | flags, data.encode())  # type: ignore[return-value]


def _in_own_mounts(work: Callable[[Case, random.Random], int], case: Case, rng: random.Random) -> int:
    """`work` in a process whose mounts nobody else sees."""
    pid, answer = os.fork(), case.place / "answer"
    if pid == 0:
        try:
            text = str(work(case, rng))
        except Failed as error:
            text = f"failed {error}"
        except BaseException:
            text = f"failed {traceback.format_exc()[-1500:]}"
        answer.write_text(text)
        os._exit(0)
    os.waitpid(pid, 0)
    text = answer.read_text() if answer.exists() else "failed: the process ended"
    must(not text.startswith("failed"), text)
    return int(text)


def _full_mount(case: Case, rng: random.Random) -> int:
    remount = _own_mounts(case.out, f"size={rng.choice((4, 16, 40, 80, 160, 320)) * 1024}")
    _is_one_line(case.start(), "could not be written", "No space left")
    remount(0, "size=256m")
    case.finish()
    return 1


def _full_disk(case: Case, rng: random.Random) -> int:
    """A disk that fills up, where a small one may be mounted; else, and every second time, a write that finds no room."""
    if rng.random() < 0.5 and may_mount():
        return _in_own_mounts(_full_mount, case, rng)
    left, code = [rng.randrange(60)], rng.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))

    def before() -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
            real(descriptor)

        os.fsync = fsync

    _is_one_line(case.start(before), "could not be written", os.strerror(code))
    case.finish()
    return 1


def _is_one_line(life: Life, *words: str) -> None:
    code = life.end()
    if code == 0:
        return
    must(code == 2, f"it ended with {code}: {life.errors[-800:]}")
    must(life.errors.count("\n") == 1 and all(word in life.errors for word in words), f"it said {life.errors[-500:]!r}")


def _damaged(case: Case, rng: random.Random) -> int:
    """The newest checkpoint of a killed run, sometimes all of them, truncated or with bits flipped."""
    for _ in range(20):
        life = case.start()
        if life.end(rng.uniform(0.3, 0.9) * case.seconds) is None:
            life.kill()
        if (case.out / "summary.json").exists():
            return 0
        if any((case.out / "state").glob("*.pt")):
            break
    files = sorted((case.out / "state").glob("[!.]*.pt"), key=lambda p: p.name.split(".")[1])
    files.sort(key=lambda p: p.stat().st_mtime_ns)
    victims = files if rng.random() < 0.2 else files[-1:]
    for path in victims:
        content = bytearray(path.read_bytes())
        kind = rng.randrange(4)
        if kind == 0:
            del content[rng.randrange(len(content)) :]
        elif kind == 1:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            at = rng.randrange(len(content))
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
            content[at] ^= 0xFF
        else:
            content += b"\0"
        path.write_bytes(content)
    errors = case.finish()
    must("is damaged" in errors, f"nothing was said of the damage: {errors!r}")
    return len(victims)


def _read_only_mount(case: Case, rng: random.Random) -> int:
    remount = _own_mounts(case.out, "size=64m")
    life = case.start()
    if life.end(rng.uniform(0.0, 0.8) * case.seconds) is None:
        life.kill()
    if (case.out / "summary.json").exists():
        return 0
    remount(1, "")
    life = case.start()
    code = life.end()
    must(
        code == 2 and life.errors.count("\n") == 1, f"on a read-only folder it ended with {code}: {life.errors[-500:]}"
    )
    remount(0, "")
    case.finish()
    return 1


def _read_only(case: Case, rng: random.Random) -> int:
    return _in_own_mounts(_read_only_mount, case, rng)


def _clock(case: Case, rng: random.Random) -> int:
    """The wall clock goes backwards all the time, and files are from the future."""
    step = rng.uniform(0.1, 1e6)

    def before() -> None:
        at = [time.time()]

        def back() -> float:
            at[0] -= step
            return at[0]

        time.time = back
        time.time_ns = lambda: int(back() * 1e9)

    life = case.start(before)
    if life.end(rng.uniform(0.2, 0.9) * case.seconds) is None:
        life.kill()
    for path in case.out.rglob("*") if case.out.exists() else ():
        os.utime(path, (4e9, 4e9))
    if not (case.out / "summary.json").exists():
        life = case.start(before)
        must(life.end() == 0, f"it ended badly: {life.errors[-500:]}")
    case.finish()

    def durations(value: Any) -> list[float]:
        if isinstance(value, dict):
            own = [value["seconds"]] if isinstance(value.get("seconds"), float) else []
            return own + [s for item in value.values() for s in durations(item)]
        return [s for item in value for s in durations(item)] if isinstance(value, list) else []

    must(min(durations(json.loads((case.out / "summary.json").read_text()))) >= 0, "a negative duration")
    return 1


def _held(lock: Path) -> bool:
    """Whether somebody has the lock; the file is there a moment earlier."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _two_runs(case: Case, rng: random.Random) -> int:
    """A second run on the folder is refused while the first lives; killed, the first leaves no lock that counts."""
    first = case.start()
    end = time.monotonic() + _LONG
    lock = case.out / ".lock"
    code = None
    while not lock.exists() and code is None and time.monotonic() < end:
        code = first.end(0.0)
    if code is not None:
        must(code == 0, f"the first ended with {code}: {first.errors[-300:]}")
        return 0
    # Stopped, it still has its lock: the second comes in time, however short the first one's life is.
    os.kill(first.pid, signal.SIGSTOP)
    if _held(lock):
        life = case.start()
        code = life.end()
        must(
            code == 2 and "another run is writing into it" in life.errors,
            f"the second ended with {code}: {life.errors[-300:]}",
        )
    first.kill()
    case.finish()
    return 1


@functools.cache
def may_mount() -> bool:
    """Whether a process here may have mounts of its own."""
    pid = os.fork()
    if pid == 0:
        with tempfile.TemporaryDirectory() as place:
            try:
                _own_mounts(Path(place), "size=4096")
            except OSError:
                os._exit(1)
            os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _read_only_part(seed: int, cases: int) -> Tally:
    return _campaign(("train",), _read_only, seed, cases) if may_mount() else Tally(skipped=_NO_NAMESPACE)


def _part(kinds: tuple[str, ...], one: Callable[[Case, random.Random], int]) -> Callable[[int, int], Tally]:
    return functools.partial(_campaign, kinds, one)


PARTS = (
    Part("trainer: killed", "SIGKILL at random moments, several in a row; resumed to the same bits", 6,
         _part(("train", "train", "select", "train", "train", "experiment"), _killed)),
    Part("trainer: signalled", "SIGINT and SIGTERM; one line, an exit code, resumed to the same bits", 4, _part(("train",), _signalled)),
    Part("trainer: disk full", "a full disk, or an n-th write that fails; one line, resumed to the same bits", 4,
         _part(("train",), _full_disk)),
    Part("trainer: damaged checkpoint", "truncated and flipped: passed over with a word, resumed to the same bits", 3,
         _part(("train",), _damaged)),
    Part("trainer: read-only folder", "one line, resumed to the same bits once it can be written", 1, _read_only_part),
    Part("trainer: clock", "a wall clock that runs backwards, files from the future", 1, _part(("train",), _clock)),
    Part("trainer: two runs", "a second run on one folder is refused, a killed one's lock does not count", 2,
         _part(("train", "select"), _two_runs)),
)  # fmt: skip

if sys.platform != "linux":
    PARTS = tuple(
        Part(p.name, p.what, p.cases, lambda seed, cases: Tally(skipped="signals and mounts of Linux")) for p in PARTS
    )
