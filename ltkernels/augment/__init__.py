"""Augmentation for tail classes.

Image space, a batch at a time: `mixup`, `cutmix`, `remix`, `cmo` (with `foreground_indices`), whose targets go into any
loss of this library as they are; `crop_flip` and `resized_crop` are the usual crops and mirroring,
`five_crops` the views of a test picture. Pools of a tail class, made once:
`remix_pool` and `cmo_pool` of images, `fdc`, `smote` and `ofa` of features. `fuse` and `Calibration.sample` are OFA and FDC
for training batches; `m2m` translates majority samples, images or features.
"""

from ltkernels.augment.crops import crop_flip, five_crops, resized_crop
from ltkernels.augment.fusion import class_activation_maps, confusing_classes, fuse, ofa
from ltkernels.augment.mixing import cmo, cutmix, foreground_indices, mixup, remix
from ltkernels.augment.pools import cmo_pool, relative_heads, remix_pool
from ltkernels.augment.synthesis import Calibration, calibrate, fdc, most_similar_class, smote
from ltkernels.augment.translation import Translated, m2m

__all__ = [
    "Calibration",
    "Translated",
    "calibrate",
    "class_activation_maps",
    "cmo",
    "cmo_pool",
    "confusing_classes",
    "crop_flip",
    "cutmix",
    "fdc",
    "five_crops",
    "foreground_indices",
    "fuse",
    "m2m",
    "mixup",
    "most_similar_class",
    "ofa",
    "relative_heads",
    "remix",
    "remix_pool",
    "resized_crop",
    "smote",
]
