"""The names that settings choose from, for the command line, which lists them before torch is there. tests/test_cli.py compares
them with what they name."""

DATA_SETS = (
    *("digits-lt", "fashion-mnist-lt", "cifar10-lt", "cifar100-lt", "openclipart-lt"),
    *("folder:PATH", "npz:PATH", "list:PATH", "csv:PATH", "hf:PATH"),
)
PROFILES = ("exp", "step")
SAMPLERS = ("instance", "balanced", "sqrt", "effective", "progressive")
SCHEDULES = ("none", "drw", "drs", "ga", "tla_adrw")
MIXERS = ("mixup", "remix", "cutmix", "cmo")
STAGES = ("crt", "lws", "tau-norm", "ncm", "ofa", "fdc")
LOSSES = (
    *(
        "ce",
        "logit_adjusted",
        "balanced_softmax",
        "la_adaptive_margin",
        "ldam",
        "cosface",
        "arcface",
        "class_balanced",
        "focal",
    ),
    *(
        "kps",
        "kps_ga",
        "vector_scaling",
        "cdt",
        "ala",
        "gcl",
        "label_aware_smoothing",
        "los",
        "seesaw",
        "softmax_equalization",
    ),
    *("eql", "cb_sigmoid", "cb_focal", "eql_v2", "acsl", "ecm", "balanced_bce"),
)
