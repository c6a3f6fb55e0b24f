"""What the FDG experiment compares: the settings of its protocol, fixed before anything is trained."""

from dataclasses import dataclass

from ltkernels._settings import check, setting

ARMS = {
    "mean": "the originals' mean kept",
    "match": "mean kept, FDG capped at its target",
    "match-uncapped": "mean kept, FDG at its target",
    "fdg": "FDG at its target, mean free",
    "items": "greedy single rows, FDG to its target",
    "clusters-target": "greedy clusters, FDG to its target",
    "clusters-max": "greedy clusters, largest FDG",
    "clusters-min": "greedy clusters, smallest FDG",
}


@dataclass(frozen=True)
class Protocol:
    """What the experiment compares. Raises ValueError or TypeError naming the setting."""

    levels: int = setting(5, "sets at uniformly spaced FDG; 0: none", at_least=0)
    sets: int = setting(5, "pools for every method", at_least=3)
    networks: int = setting(1, "trained networks that the sets take turns with", at_least=1)
    shares: tuple[float, ...] = setting((0.5, 0.9), "weights of the synthetic samples within a tail class")
    added: int = setting(
        300, "rows that an arm takes for a tail class at most; fewer where fewer reach the largest class", at_least=1
    )
    tail_divisor: int = setting(
        1, "few shots: real tail samples thinned by it, anew in every set (networks have seen all of them)", at_least=1
    )
    arms: tuple[str, ...] = setting(tuple(ARMS), "what is compared beside random draws")
    classifier: str = setting(
        "balanced",
        "balanced: every class weighs the same; literal: the completed counts do",
        choices=("balanced", "literal"),
    )
    space: str = setting(
        "feature",
        "feature: classifiers on a frozen network; image: a network for each arm (remix, cmo; without shares)",
        choices=("feature", "image"),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.levels == 1:
            raise ValueError("levels must be 0 or at least 2, got 1")
        if not self.shares or not all(0.0 < share < 1.0 for share in self.shares):
            raise ValueError(f"shares must be numbers between 0 and 1, got {self.shares}")
        if not set(self.arms) <= set(ARMS) or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms must be different ones of {', '.join(ARMS)}, got {','.join(self.arms)}")
        if self.space == "image" and self.classifier != "balanced":
            raise ValueError(f"space image trains networks: classifier {self.classifier} is for space feature")
