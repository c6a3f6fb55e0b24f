"""Small data for the examples: `python make_data.py KIND FOLDER`, KIND pictures, table, dataset or list.

Three classes of 60, 20 and 8 samples; what is to be predicted lies beside them.
"""

import csv
import sys
from pathlib import Path

import numpy as np

NAMES, COUNTS, COLOURS = ("ant", "bee", "cat"), (60, 20, 8), ((200, 60, 60), (60, 180, 60), (60, 60, 200))


def picture(label: int, rng: np.random.Generator) -> "np.ndarray":
    """(24, 24, 3) uint8: a noisy square in the colour of its class."""
    image = rng.integers(0, 90, (24, 24, 3)).astype(np.int64)
    top, left = rng.integers(0, 12, 2)
    image[top : top + 12, left : left + 12] += np.array(COLOURS[label]) // 2
    return image.clip(0, 255).astype(np.uint8)


def save(folder: Path, counts: "tuple[int, ...]", seed: int) -> "list[tuple[str, int]]":
    """Pictures of all classes in one folder; (name, class) of each."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng, made = np.random.default_rng(seed), []
    for label, count in enumerate(counts):
        for i in range(count):
            made.append((f"{label}{i:03d}.png", label))
            Image.fromarray(picture(label, rng)).save(folder / made[-1][0])
    return made


def write(path: Path, rows: "list[list[object]]") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def pictures(folder: Path) -> None:
    """A flat folder of pictures, and labels.csv that says which is what."""
    made = save(folder, COUNTS, 0)
    write(folder / "labels.csv", [["path", "label"], *([name, NAMES[label]] for name, label in made)])
    save(folder / "new", (3, 3, 3), 1)


def table(folder: Path) -> None:
    """A CSV of numbers, one column in thousands and one around a million."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, counts, seed in (("train.csv", COUNTS, 0), ("new.csv", (5, 5, 5), 1)):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(3), counts)
        x = rng.normal(size=(len(labels), 6)) + 1.5 * np.eye(3, 6)[labels]
        x = x * [1, 1000, 1, 1, 0.01, 1] + [0, 0, 0, 1e6, 0, 50]
        rows = [[*row.tolist(), NAMES[label]] for row, label in zip(x, labels)]
        write(folder / name, [["age", "income", "height", "time", "dose", "pulse", "label"], *rows])


def dataset(folder: Path) -> None:
    """A Hugging Face data set, as its `save_to_disk` writes it."""
    import datasets
    from PIL import Image

    names = save(folder / "new", (3, 3, 3), 1)
    assert names
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), COUNTS).tolist()
    images = [Image.fromarray(picture(label, rng)) for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(
        str(folder / "saved")
    )


def list_of_files(folder: Path) -> None:
    """Lists of `path label`, as ImageNet-LT and iNaturalist come."""
    for part, counts, seed in (("train", COUNTS, 0), ("test", (5, 5, 5), 1)):
        made = save(folder / "images" / part, counts, seed)
        lines = "".join(f"images/{part}/{name} {label}\n" for name, label in made)
        (folder / f"my_{part}.txt").write_text(lines, encoding="utf-8")


KINDS = {"pictures": pictures, "table": table, "dataset": dataset, "list": list_of_files}

if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
