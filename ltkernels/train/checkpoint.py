"""Checkpoints of a training in progress: written whole or not at all, and never trusted without their checksum.

A file's name ends in the SHA-256 of its bytes, so that content and checksum appear in one rename. A file that was
truncated or that lost a bit does not match its name: it is passed over for the one before it. Every file is plain
tensors, numbers and strings: `torch.load(path, weights_only=True)` reads it.
"""

import hashlib
import io
import logging
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltkernels._files import replacing

_log = logging.getLogger(__name__)

# Of what a training's state holds (`Training._state` of engine.py): another number where a key comes or goes.
FORMAT = 3
# The newest may be the damaged one; the one before it is then read.
_KEEP = 2
_NAME = re.compile(r"(?P<slug>.+)\.(?P<serial>\d{8})\.(?P<digest>[0-9a-f]{32})\.pt")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises OSError naming the path; the old file is then untouched."""
    with replacing(path) as file:
        file.write(content)


def dump(state: dict[str, Any]) -> bytes:
    """`torch.save` into memory: a full disk is then met by one write, not in the middle of a zip archive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def undump(content: bytes, source: object, device: str = "cpu") -> dict[str, Any]:
    """What `dump` made: plain tensors, numbers and strings alone. Raises ValueError naming `source` for anything else."""
    try:
        saved = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # a forged file makes the reader raise whatever it likes
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{source}: not a checkpoint: {reason}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{source}: not a checkpoint: it holds a {type(saved).__name__}")
    return saved


class PhaseStore:
    """The checkpoints of one phase (one training) of a run; `due` tells when the next one should be written."""

    def __init__(self, folder: Path, phase: str, fingerprint: str, every: float) -> None:
        # The hash keeps phases apart whose names differ in the characters that a file name cannot have.
        slug = re.sub(r"[^A-Za-z0-9_+-]", "-", phase)
        self._slug = f"{slug}-{hashlib.sha256(phase.encode()).hexdigest()[:6]}"
        self._folder, self._phase, self._fingerprint, self._every = folder, phase, fingerprint, every
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since the last checkpoint."""
        return time.monotonic() - self._last >= self._every

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` as the newest checkpoint and drop all but the one before it. Raises OSError naming the file."""
        content = dump({"format": FORMAT, "phase": self._phase, "fingerprint": self._fingerprint, "state": state})
        files = self._files()
        serial = files[-1][0] + 1 if files else 0
        digest = hashlib.sha256(content).hexdigest()[:32]
        self._folder.mkdir(exist_ok=True)
        write_bytes(self._folder / f"{self._slug}.{serial:08d}.{digest}.pt", content)
        for _, _, path in files[: -(_KEEP - 1)]:
            path.unlink(missing_ok=True)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint whose bytes match its checksum, on the CPU; None where there is none.

        Raises ValueError where it belongs to other settings or data: it would be resumed into something else.
        """
        damaged = False
        for _, digest, path in reversed(self._files()):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:32] != digest:
                damaged = True
                _log.warning(
                    "%s is damaged (its bytes do not match its checksum): not used, the one before it is", path
                )
                # Left in place, it would count as the one before when the next is written.
                path.unlink(missing_ok=True)
                continue
            saved = undump(content, path)
            if saved.get("fingerprint") != self._fingerprint:
                raise ValueError(f"{path}: the checkpoint is of other data or settings; --force starts anew")
            if saved.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: another version of ltkernels wrote this checkpoint (format {saved.get('format')!r}, this one reads "
                    f"{FORMAT}); go on with that version, or start anew with --force"
                )
            if not isinstance(saved.get("state"), dict):
                raise ValueError(f"{path}: not a checkpoint: it holds no state")
            return saved["state"]
        if damaged:
            _log.warning("%s holds no other checkpoint of it: %s starts anew", self._folder, self._phase)
        return None

    def _files(self) -> list[tuple[int, str, Path]]:
        """(serial, digest, path) of this phase's files, oldest first."""
        if not self._folder.is_dir():
            return []
        matches = [(match, path) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        ours = [(int(m["serial"]), m["digest"], path) for m, path in matches if m["slug"] == self._slug]
        return sorted(ours)


def capture_random(device: torch.device) -> dict[str, Any]:
    """The global random states of torch (CPU and `device`), numpy and python, as tensors and numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the global state is meant)
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), next_gauss],
    }


def restore_random(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `capture_random` took."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))


def seed_random(seed: int) -> None:
    """Seed the global random states of torch, numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (modules of the user's may draw from the global state)
    random.seed(seed)
