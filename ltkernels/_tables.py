"""Tables that a Module is made of: put back where they were lost, and not replaced by those of another loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MadeOfTables(torch.nn.Module):
    """A Module that keeps what its tables were made as, beside the buffers that hold them.

    A state dict whose tables are others is refused: the loss would compute with them, and its options would say something else.
    ``torch.device("meta")`` makes buffers that hold nothing; after ``to_empty`` `reset_parameters` fills them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start: dict[str, Tensor] = {}  # on the CPU, whatever torch's default device is
        self._made: set[str] = set()

    def _table(self, name: str, value: Tensor | None, *, made: bool = True, learned: bool = False) -> None:
        """Registers a buffer, or a Parameter where it is `learned`, on torch's default device where it is not on another than the CPU.
        `made`: of counts and options, and not a user's own, which a state dict may replace."""
        if value is None or value.is_meta:
            self.register_buffer(name, value)
            return
        device = torch.get_default_device() if value.is_cpu else value.device
        self._start[name] = value.detach().cpu().clone()
        if made:
            self._made.add(name)
        value = self._start[name].to(device, copy=True)
        if learned:
            self.register_parameter(name, torch.nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Puts what the loss was made with back in place, and lets go what it has gathered since."""
        for name, start in self._start.items():
            held = getattr(self, name)
            if held is not None:
                held.copy_(start)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Before anything is copied: a refused state leaves the loss as it was.
        for name in self._made:
            saved, own = state_dict.get(prefix + name), self._start[name]
            if not isinstance(saved, Tensor) or saved.shape != own.shape or saved.is_meta:
                continue  # torch says what it is
            other = (saved.detach().cpu().to(own.dtype) != own).nonzero()
            if len(other):
                at = tuple(other[0].tolist())
                raise ValueError(
                    f"the checkpoint's {prefix}{name}{list(at)} is {saved[at].item():.6g}, that of this {type(self).__name__} is "
                    f"{own[at].item():.6g}: it was made of other counts or options"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)


class KeepsTables(MadeOfTables):
    """One whose tables also keep their dtype under ``.half()`` and friends: a prior rounded to 8 bits is another loss."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
