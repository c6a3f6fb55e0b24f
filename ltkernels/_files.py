"""Files that are written whole or not at all, and what made them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, *, parents: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` where the block ends well: a temporary sibling, on the disk before it is renamed.
    `parents`: makes the folder.

    Raises OSError naming the path (a full disk, a read-only folder); what was there before is then untouched.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error
    finally:
        # Where the folder went read-only, the error above says so.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    # The rename itself is durable once the folder is; not every file system can say so of a folder, and the file is there.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, with "-dirty" where files differ from it; None where the folder is none (an installed wheel, which
    may lie within somebody else's repository) or git is not there."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
