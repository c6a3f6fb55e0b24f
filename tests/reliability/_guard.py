"""Cases that may hang, crash or eat the memory, each looked at from another process."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

# Above what reading the small files of these parts takes; the readers' own bounds for one file are below it.
MEMORY_BYTES = 1 << 30
ADDRESS_BYTES = 3 << 30  # threads reserve far more address space than they use
_SPIES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")


class Spy:
    """An audit hook that notes programs that are started, connections, and files opened outside `folder`.

    `canary` is a folder of files that nobody may read; anything but the null device outside `folder` may not be written.
    """

    def __init__(self, canary: Path) -> None:
        self.canary, self.folder, self.seen = str(canary), "", list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.folder:
            return
        if event in _SPIES:
            self.seen.append(f"{event}{arguments[:1]!r}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _, flags = arguments
            real = os.path.realpath(os.fsdecode(path))
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if real.startswith(self.canary) or (writes and not real.startswith((self.folder, os.devnull))):
                self.seen.append(f"opened {real}")


def peak() -> int:
    """The largest resident set, in bytes, since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def limit_memory() -> None:
    """Let this process map `ADDRESS_BYTES` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def guarded(work: Callable[[int, Spy], str], cases: int, seconds: float, name: str) -> list[str]:
    """`work(case, spy)` for every case, in a forked process: the failures. `work` returns what went wrong, or "".

    A case that takes longer than `seconds`, ends the process, maps or holds too much memory is a failure, and the next
    case goes on in a new process.
    """
    failures, at = [], 0
    while at < cases:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(work, range(at, cases), write)
        os.close(write)
        lines = os.fdopen(read, "rb", buffering=0)
        rest, verdict = b"", ""
        while True:
            if not select.select([lines], [], [], seconds)[0]:
                verdict = f"no end within {seconds:g} s"
                os.kill(pid, signal.SIGKILL)
                break
            data = lines.read(1 << 16)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                failure = json.loads(line)
                at += 1
                if failure:
                    failures.append(f"{name} {failure}")
        _, status = os.waitpid(pid, 0)
        lines.close()
        if at < cases:
            code = os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            failures.append(f"{name} case {at}: {verdict or f'the process ended with {how}'}")
            at += 1
    return failures


def _child(work: Callable[[int, Spy], str], cases: range, write: int) -> None:
    try:
        with tempfile.TemporaryDirectory() as canary:
            Path(canary, "secret.png").write_bytes(b"nobody's business")
            spy = Spy(Path(canary).resolve())
            limit_memory()
            for case in cases:
                reset_peak()
                before = peak()
                try:
                    failure = work(case, spy)
                except BaseException:
                    failure = f"case {case}: the check itself raised: {traceback.format_exc()[-1500:]}"
                grown = peak() - before
                if not failure and grown > MEMORY_BYTES:
                    failure = f"case {case}: the memory grew by {grown >> 20} MiB"
                os.write(write, json.dumps(failure).encode() + b"\n")
    finally:
        os._exit(0)
