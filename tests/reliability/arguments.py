"""Class counts and the small languages of the settings under hostile values: an answer, or one clear ValueError or TypeError."""

from __future__ import annotations

import math
import random
from typing import Any

from _part import Part, Tally

_NUMBERS = (
    0,
    1,
    2,
    7,
    -1,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    True,
    None,
    "3",
    b"3",
    [1],
    "x" * 9999,
)
_TEXTS = (
    "", "max", "target:0.3", "target:nan", "target:" + "9" * 5000, "step:160=0.01", "step:1=2,1=3", "step:-1=1", "tau=1.25,g=0.15", "tau=",
    "=1", "tau=nan", "csv,tensorboard", "../../x", "\x00", "\x1b[31m", "9" * 5000, "random:1", ",,,", "step:" + "1=1," * 3000, "\udcff",
)  # fmt: skip


def _counts(rng: random.Random) -> Any:
    size = rng.choice((0, 1, 2, 3, 10))
    plain = [rng.choice((1, 2, 5, 100, 10**6)) for _ in range(size)]
    if rng.random() < 0.7:
        for _ in range(min(size, 2)):
            plain[rng.randrange(size)] = rng.choice(_NUMBERS)
    return rng.choice((plain, plain, tuple(plain), rng.choice(_NUMBERS), {1: 2}, iter(plain)))


def _calls(rng: random.Random) -> tuple[str, Any]:
    """(what is called, the call)."""
    import numpy as np
    import torch

    import ltkernels as ltk
    from ltkernels import train
    from ltkernels.train import presets
    from ltkernels.train.config import Config
    from ltkernels.train.data import Dataset, class_sizes, make_long_tailed, with_counts
    from ltkernels.train.recipe import parse_lr_schedule
    from ltkernels.train.schedules import parse_options

    counts, number, text = _counts(rng), rng.choice(_NUMBERS), rng.choice(_TEXTS)
    losses = [
        getattr(ltk.nn, name)
        for name in ("LDAM", "LogitAdjusted", "VectorScaling", "KPS", "Seesaw")
        if hasattr(ltk.nn, name)
    ]
    data = Dataset.from_arrays(np.eye(12), np.arange(12) % 3, np.eye(12), np.arange(12) % 3)
    loss = rng.choice(losses)
    labels = np.array(rng.choice(([0, 1, 1], [0], [], [-1, 0], [0.5], [2**40])))
    return rng.choice(
        (
            (f"{loss.__name__}({counts!r:.200})", lambda: loss(counts)(torch.randn(2, 3), torch.tensor([0, 1]))),
            (f"with_counts({counts!r:.200})", lambda: with_counts(data, counts)),
            (f"class_sizes({number!r:.80}, 3, 10)", lambda: class_sizes(number, 3, 10.0)),
            (f"class_sizes(100, 3, {number!r:.80})", lambda: class_sizes(100, 3, number, rng.choice(("exp", "step")))),
            (f"make_long_tailed({labels!r:.80}, {number!r:.80})", lambda: make_long_tailed(labels, number)),
            (f"presets.load({text!r:.80})", lambda: presets.load(text)),
            (f"Config(select={text!r:.80})", lambda: Config(select=text)),
            (f"parse_lr_schedule({text!r:.80})", lambda: parse_lr_schedule(text)),
            (f"parse_options({text!r:.80})", lambda: parse_options(text)),
            (f"Config(log={text!r:.80})", lambda: Config(log=text)),
            (f"load({text!r:.80})", lambda: train.data.load(text)),
            (f"Config(epochs={number!r:.80})", lambda: Config(epochs=number)),
            (f"Config(lr={number!r:.80})", lambda: Config(lr=number)),
        )
    )


def _run(seed: int, cases: int) -> Tally:
    tally = Tally()
    for case in range(cases):
        what, call = _calls(random.Random(f"{seed} {case}"))
        tally.cases += 1
        try:
            call()
        except (ValueError, TypeError) as error:
            if not str(error) or len(str(error)) > 15000:
                tally.failures.append(f"seed {seed} case {case} {what}: a message of {len(str(error))} characters")
        except Exception as error:
            tally.failures.append(f"seed {seed} case {case} {what}: raised {type(error).__name__}: {str(error)[:200]}")
    tally.faults = tally.cases
    return tally


PARTS = (Part("arguments", "class counts and setting texts with hostile values", 1000, _run),)
