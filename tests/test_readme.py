"""Promise: what the guides show works. The README is short; its links, and those of the guide in every room, lead somewhere; snippets run;
commands parse; every loss has a section; the files that GitHub reads are well-formed."""

from __future__ import annotations

import doctest
import functools
import importlib.metadata
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

import ltkernels as ltk
from ltkernels import cli, losses
from ltkernels.commands.parts import config_of

ROOT = Path(__file__).parent.parent
ROOMS = [
    f"ltkernels/{name}"
    for name in ("losses", "contrastive", "neighbors", "selection", "train", "distributed", "integrations")
]
GUIDES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / ".github").glob("*.md")),
        *sorted(path for room in ("csrc", "ltkernels", "benchmarks") for path in (ROOT / room).rglob("README.md")),
    ]
}
README, CONTRIBUTING = GUIDES["README.md"], GUIDES[".github/CONTRIBUTING.md"]
OWN = [
    loss
    for loss in vars(ltk.nn).values()
    if isinstance(loss, type)
    and issubclass(loss, losses.AdjustedCrossEntropy)
    and loss is not losses.AdjustedCrossEntropy
]
EXPERTS = [
    loss
    for loss in vars(ltk.nn).values()
    if isinstance(loss, type) and issubclass(loss, ltk.nn.ExpertsLoss) and loss is not ltk.nn.ExpertsLoss
]
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", GUIDES["ltkernels/losses/README.md"], flags=re.S | re.M))


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDES[guide], flags=re.S | re.M)


# Public rooms whose docstrings have examples.
PUBLIC = [ltk.nn, ltk.functional, ltk.adjustments, ltk.inference, ltk.neighbors, ltk.selection]
SNIPPETS = [(guide, i, text) for guide in GUIDES for i, text in enumerate(blocks(guide, "python"))]


# ---- the README ----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert README.count("|---") == README.count("|---|---|---|") * 3, "one table"
    assert len(re.findall(r"^\|", README, flags=re.M)) <= 9
    assert "![" not in README, "the package index does not show pictures of relative links"
    assert len(blocks("README.md", "python")) == 3


def test_quick_start_has_exactly_two_commands() -> None:
    section = README.split("## Quick start")[1].split("\n## ")[0]
    assert len(re.findall(r"^python3 ", section, flags=re.M)) == 2


def test_what_the_index_shows_has_no_relative_links() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((pattern, replacement),) = re.findall(
        r"substitutions = \[\{ pattern = '(.+)', replacement = '(.+)' \}\]", settings
    )
    shown = re.sub(pattern, replacement, README)
    assert re.findall(r"\]\((?!https:)", README)
    assert not re.findall(r"\]\((?!https:)", shown)
    assert re.findall(r"^```.*?^```", shown, flags=re.S | re.M) == re.findall(r"^```.*?^```", README, flags=re.S | re.M)
    assert "losses (`ltkernels/losses/README.md`)" in shown


def test_every_room_has_a_guide() -> None:
    assert {f"{room}/README.md" for room in [*ROOMS, "benchmarks", "benchmarks/examples", "csrc"]} < set(GUIDES)


# ---- links ---------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings, which are those outside code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_leads_somewhere(guide: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", GUIDES[guide], flags=re.S | re.M)):
        path, _, anchor = target.partition("#")
        assert not path.startswith(("http:", "/")), target
        if path.startswith("https:"):
            continue
        found = (ROOT / guide).parent / path if path else ROOT / guide
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


# ---- snippets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "i", "snippet"),
    [pytest.param(*each, id=f"{each[0]}-{each[1]}") for each in SNIPPETS if "build = staticmethod" not in each[2]],
)
def test_snippet_runs(guide: str, i: int, snippet: str) -> None:
    with torch.random.fork_rng():
        exec(compile(snippet, f"{guide}, snippet {i}", "exec"), {})


@pytest.mark.parametrize("room", PUBLIC, ids=lambda room: room.__name__)
def test_the_examples_of_docstrings_run(room) -> None:
    finder, found = doctest.DocTestFinder(), 0
    for name in room.__all__:
        for test in finder.find(getattr(room, name), name, globs={"ltk": ltk, "torch": torch}):
            out = io.StringIO()
            torch.manual_seed(0)
            assert doctest.DocTestRunner().run(test, out=out.write).failed == 0, out.getvalue()
            found += len(test.examples)
    assert found


def test_a_loss_in_one_file() -> None:
    (example,) = [text for guide, _, text in SNIPPETS if "build = staticmethod" in text]
    scope = {"__name__": "ltkernels.losses.square_root", "__package__": "ltkernels.losses"}
    exec(compile(example, "CONTRIBUTING", "exec"), scope)
    try:
        loss = ltk.LOSSES["square_root"]
        assert loss is ltk.nn.SquareRoot
        assert ltk.adjustments.square_root([4, 1, 25]).weight.tolist() == pytest.approx([0.5, 1.0, 0.2])
        assert loss([4, 1, 25])(torch.randn(2, 3), torch.tensor([0, 1])).isfinite()
    finally:
        del ltk.LOSSES["square_root"]


@pytest.mark.parametrize("guide", GUIDES)
def test_margin_losses_stand_beside_a_cosine_head(guide: str) -> None:
    """In every block of code that makes one."""
    cosine = "|".join(loss.__name__ for loss in OWN if loss.logits == "cosine")
    for text in re.findall(r"^```\w*\n(.*?)^```", GUIDES[guide], flags=re.S | re.M):
        if re.search(rf"nn\.({cosine})\(", text):
            assert "CosineLinear(" in text, text


# ---- commands ------------------------------------------------------------------------------------------------------------


@functools.cache
def subcommands() -> dict[str, set[str]]:
    """The flags of every subcommand."""
    (choices,) = [action.choices for action in cli._parser()._actions if isinstance(action.choices, dict)]
    return {name: set(parser._option_string_actions) for name, parser in choices.items()}


def lines(guide: str) -> list[list[str]]:
    """The commands of the blocks of shell code, split into words."""
    text = "\n".join(blocks(guide, "bash")).replace("\\\n", " ")
    return [shlex.split(part, comments=True) for line in text.splitlines() for part in re.split(r"&&", line)]


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_parses(guide: str) -> None:
    for words in lines(guide):
        at = next((i for i, word in enumerate(words) if Path(word).name == "ltkernels"), None)
        if at is not None and (at == 0 or words[0] == "torchrun"):
            arguments = cli._parser().parse_args(words[at + 1 :])
            if "config" in vars(arguments) and arguments.command != "experiment":
                config_of(arguments)  # values within their bounds
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            check_benchmark(words[2:])
    prose = re.sub(r"^```.*?^```", "", GUIDES[guide], flags=re.S | re.M)
    for text in re.findall(r"`((?:ltkernels|python -m benchmarks\.)[ \w][^`]*)`", prose):
        words = shlex.split(text)
        if words[0] == "python":
            check_benchmark(words[2:])
        else:
            assert {word for word in words if word.startswith("--")} <= subcommands()[words[1]], text


def check_benchmark(words: list[str]) -> None:
    name = ROOT / "benchmarks" / f"{words[0].removeprefix('benchmarks.')}.py"
    flags = [word for word in words if word.startswith("--")]
    source = name.read_text(encoding="utf-8") + (ROOT / "benchmarks/harness.py").read_text(encoding="utf-8")
    assert all(f'"{flag}"' in source for flag in flags), words


@pytest.mark.parametrize("guide", [f"{room}/README.md" for room in ROOMS])
def test_every_flag_in_prose_exists(guide: str) -> None:
    known = set().union(*subcommands().values())
    assert set(re.findall(r"`(--[\w-]+)", GUIDES[guide])) <= known


# ---- losses --------------------------------------------------------------------------------------------------------------


def test_every_loss_has_a_section_and_every_section_a_loss() -> None:
    assert sorted(SECTIONS) == sorted(loss.__name__ for loss in [*OWN, *EXPERTS])


@pytest.mark.parametrize("loss", OWN, ids=lambda loss: loss.__name__)
def test_a_section_says_what_the_class_says(loss: type[losses.AdjustedCrossEntropy]) -> None:
    section = SECTIONS[loss.__name__]
    common = {*losses.Common.__annotations__, "empty"}
    parameters = [p for p in inspect.signature(loss).parameters.values() if p.name not in {*common, "common"}]
    own = ", ".join(str(p.replace(annotation=p.empty, kind=p.POSITIONAL_OR_KEYWORD)) for p in parameters)
    own = own.replace("'", '"')
    where = f"`--loss {loss.name}`" if loss.name else "from Python only"
    assert f"`{loss.__name__}({own})`, {where}, {loss.logits} head." in section
    assert f"\nArgmax of: {loss.predict}.\n" in section
    assert re.search(r"^    L = ", section, flags=re.M)
    assert "\nWhen: " in section
    for source in re.findall(r"(?:arXiv|doi):[\w./]*\w", inspect.getdoc(loss).split("Args:")[0]):
        assert source in section or re.search(r"Reference: as \w+\.", section), source


@pytest.mark.parametrize("loss", EXPERTS, ids=lambda loss: loss.__name__)
def test_a_section_says_what_the_class_of_experts_says(loss: type[ltk.nn.ExpertsLoss]) -> None:
    section = SECTIONS[loss.__name__]
    parameters = inspect.signature(loss).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = ", ".join(str(p.replace(annotation=p.empty)) for p in positional)
    assert f"`{loss.__name__}({own})`, from Python only" in section
    assert "\nArgmax of: the " in section
    assert "\nWhen: " in section
    for source in re.findall(r"arXiv:[\w./]*\w", inspect.getdoc(loss).split("Args:")[0]):
        assert source in section, source


# ---- what GitHub reads -----------------------------------------------------------------------------------------------------


def test_forms_and_workflows_are_well_formed() -> None:
    yaml = pytest.importorskip("yaml")
    found = {path.relative_to(ROOT / ".github").as_posix(): path for path in (ROOT / ".github").rglob("*.yml")}
    for name, path in found.items():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if name.startswith("workflows/"):
            assert content["permissions"] == {"contents": "read"}, name
            for job in content["jobs"].values():
                assert "runs-on" in job or "uses" in job
                assert all(("run" in step) != ("uses" in step) for step in job.get("steps", []))
        elif name != "ISSUE_TEMPLATE/config.yml":
            assert {"name", "description", "body"} <= set(content)
            ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
            assert len(ids) == len(set(ids))
    assert {"workflows/tests.yml", "workflows/wheels.yml", "workflows/release.yml", "ISSUE_TEMPLATE/bug.yml"} < set(
        found
    )


def test_actions_are_pinned_to_commits() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert len(used) > 5
    for action, rest in used:
        pinned = re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) and re.fullmatch(r" # v\d+\.\d+\.\d+", rest)
        assert action.startswith("./.github/") or pinned, action


def test_one_version_everywhere() -> None:
    version = importlib.metadata.version("ltkernels")
    assert f"\nversion: {version}\n" in (ROOT / ".github" / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version} (" in GUIDES["CHANGELOG.md"]
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
