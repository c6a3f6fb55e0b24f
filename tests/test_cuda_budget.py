"""The guards of .ci/cuda on small inputs: what makes them red."""

from __future__ import annotations

import pytest
from cuda_host import budget, sass

CODE = """
	.section	.text.first,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   DADD R6, R6, R8 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/              @P0  STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/                   EXIT ;
	.section	.text.second,"ax",@progbits
        /*0000*/                   EXIT ;
"""
NOW = sass.Counts(loads=1, stores=1, instructions=6, exponentials=1, doubles=1, barriers=1, local=1)


def test_counts() -> None:
    found = sass.kernels(CODE)
    assert [len(code) for code in found.values()] == [9, 1]
    assert sass.counts(found["first"]) == NOW
    assert sass.counts(found["second"]) == sass.Counts(0, 0, 1, 0, 0, 0, 0)
    assert sass.read_budget("# a comment\nfirst 1 1 6 1 1 1 1\n") == {"first": NOW}
    assert sass.failures({"first": NOW}, {"first": NOW}) == []
    assert sass.failures({"gone": NOW}, {"first": NOW}) == ["the budget names gone, which is not in the code"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loads": 0}, "0 16-byte loads of logits; it had 1"),
        ({"stores": 0}, "0 16-byte stores of logits; it had 1"),
        ({"instructions": 7}, "7 instructions; its budget is 6"),
        ({"exponentials": 2}, "2 exponentials"),
        ({"doubles": 2}, "2 doubles"),
        ({"barriers": 2}, "2 barriers"),
        ({"local": 2}, "2 local"),
    ],
)
def test_what_costs_more_is_red(change: dict[str, int], words: str) -> None:
    (said,) = sass.failures({"first": NOW}, {"first": NOW._replace(**change)})
    assert words in said


def test_a_tenth_more_instructions_is_allowed() -> None:
    budget_of_100 = NOW._replace(instructions=100)
    assert sass.failures({"first": budget_of_100}, {"first": NOW._replace(instructions=110)}) == []
    assert sass.failures({"first": budget_of_100}, {"first": NOW._replace(instructions=111)}) != []


def test_registers_and_spills() -> None:
    limits = budget.read_budget("rows<float,1> 80 112 so\nrows<float> 80 0 so\nrows 128 0 so\n")
    assert [budget.row_of(limits, name) for name in ("rows<float, 1>", "rows<float, 0>", "rows<bf16, 1>", "other")] == [
        "rows<float,1>",
        "rows<float>",
        "rows",
        "other",
    ]
    good = [
        ("sm_90", "rows<float, 1>", 80, 112),
        ("sm_90", "rows<float, 0>", 80, 0),
        ("sm_90", "rows<bf16, 0>", 128, 0),
    ]
    assert budget.failures(limits, good, ["sm_90"]) == []
    wrong = budget.failures(limits, [("sm_90", "rows<float, 1>", 81, 113), *good[1:]], ["sm_90"])
    assert ["81 registers" in wrong[0], "spills 113 bytes" in wrong[1], len(wrong)] == [True, True, 2]
