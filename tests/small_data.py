"""Small data sets as arrays and files, and a command that must fail in one line."""

import numpy as np

from ltkernels.cli import main

SIZES = (30, 14, 6)


def vectors(sizes, seed=0, features=4):
    y = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).normal(size=(len(y), features)) + y[:, None], y


def npz(path, sizes=SIZES, **change):
    x, y = vectors(sizes)
    x_test, y_test = vectors([4] * len(sizes), 1)
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, **change})
    return f"npz:{path}"


def one_line(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1), captured.err
    return captured.err
