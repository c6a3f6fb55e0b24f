#!/bin/bash
# A Hugging Face data set from disk (`save_to_disk`; pip install datasets). Nothing is downloaded.
set -euo pipefail
python "$(dirname "$0")/make_data.py" dataset dataset
ltkernels train --data hf:dataset/saved --epochs 10 --out runs/dataset
ltkernels predict runs/dataset dataset/new --out dataset.csv
ltkernels report runs/dataset
