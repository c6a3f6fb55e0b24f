"""Generated pictures that complete a rare class: from a network's features to a list of files.

    python make_data.py pictures pictures
    python select_images.py

The folder `pool` stands for what your generator wrote: 300 pictures of `cat`, of which most are too bright. A random draw of 60 takes
over that fault, as the offset from the real pictures' mean says (in standard errors; samples of the class itself lie at about 1):

    random draw: offset 25.5
    match_pool:  offset 1.3, list of 60 files in selected.txt
"""

from pathlib import Path

import numpy as np
import torch
from make_data import picture
from PIL import Image

from ltkernels import diversity, selection, train

POOL, TAKEN, RARE = Path("pool"), 60, "cat"

# A generator's output.
POOL.mkdir(exist_ok=True)
rng = np.random.default_rng(0)
for i in range(300):
    pixels = picture(2, rng) + (rng.random() < 0.7) * rng.uniform(20, 60)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(POOL / f"{i:03d}.png")

# A network that knows the classes: 60 ants, 20 bees, 8 cats.
settings = train.Config(data="csv:pictures/labels.csv", image_size=24, epochs=10, threads=1)
train.train(settings, out="runs/features", force=True)
model = train.load("runs/features")

# What is to be chosen from, and what it should not move: the features of the pool and of the real pictures.
files = sorted(POOL.iterdir())
rows = [line.split(",") for line in Path("pictures/labels.csv").read_text().splitlines()]
original = model.features([Path("pictures") / row[0] for row in rows if row[1] == RARE])
pool = model.features(files)

drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:TAKEN]
print(f"random draw: offset {diversity.standardized_offset(original, pool[drawn]):.1f}")
picked = selection.match_pool(original, pool, TAKEN, seed=0)
Path("selected.txt").write_text("".join(f"{files[i]}\n" for i in picked.indices.tolist()))
print(f"match_pool:  offset {picked.offset:.1f}, list of {TAKEN} files in selected.txt")
