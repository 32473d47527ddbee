"""Which answer a response gives, and which answers are the same."""

import json
import os
import time
from pathlib import Path

import pytest

import tipdistill as tip
from tipdistill.evaluate import Verifiers, extract_answer
from tipdistill.evaluate.verifier import last_boxed

DATA = Path(os.environ.get("TIPDISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers(1) as started:
        yield started


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} and then it was cut \boxed{4", "3"),
        (r"\boxed{} holds nothing, \boxed{ } neither", None),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 5 is TeX", "5"),
        (r"\fbox{7}", "7"),
        (r"} } \left\{ \boxed{7} \right.", "7"),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_complete_box(response, answer):
    assert last_boxed(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("First 3, then 4. The answer is 12. That is all.", "12"),
        ("She has 3 + 4 = 7 marbles.\n#### 7", "7"),
        (r"The answer is \boxed{9}, and not 12.", "9"),
        ("Nothing to say.", None),
        ("", None),
    ],
)
def test_without_a_box_the_last_answer_given(response, answer):
    assert extract_answer(response) == answer


def test_finding_a_box_takes_linear_time():
    start = time.perf_counter()
    last_boxed("{" * 20_000 + r"\boxed{" * 50_000)
    assert time.perf_counter() - start < 5  # a scan from each opening takes minutes


EQUIVALENT = [
    ("25", "025"), ("025", "25"), ("204", "204.0"), ("204", "204."), ("1000", "1,000"), ("1,000", "1000"),
    ("1000", "1{,}000"), ("1000", r"1\,000"), ("0", "-0"), ("-3", "−3"), ("10000000000", "10^{10}"),
    (r"\frac{1}{2}", "0.5"), (r"\frac12", "1/2"), (r"\frac{3}{56}", r"\dfrac{3}{56}"), (r"\frac{1}{3}", "0.333333"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"1\frac{1}{2}", r"\frac{3}{2}"), (r"10\%", "10"), ("0.1", r"10\%"),
    ("1,-2", "-2, 1"), ("1,-2", r"\{-2, 1\}"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"11\sqrt2", r"11\sqrt{2}"),
    ("x=5", "5"), ("5", "x=5"), ("y=2x+3", "2x+3"), (r"90^\circ", "90"), (r"\$18.90", "18.9"), ("5", r"5\text{ cm}"),
    ("x^2+2x+1", "(x+1)^2"), ("3-4i", "-4i+3"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"), (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\text{Evelyn}", "Evelyn"), (r"\text{(C)}", "C"), (r"\text{June 20}", "June 20"), ("even", r"\text{even}"),
    ("4210_{5}", "4210_5"), ("$7$", "7"), ("A", "A"),
]  # fmt: skip
DIFFERENT = [
    ("25", "26"), ("25", "-25"), ("25", "250"), ("12", "1 2"), ("34", "3,4"), ("72", "72.5"), ("7", "7.00001"),
    (r"\frac{1}{3}", "0.33"), (r"\pi", "3.14"), (r"\pi", "3.14159"), (r"1\frac{1}{2}", r"\frac{1}{2}"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[1,2]", "[1,2)"), ("1,-2", "1,2"), ("1,-2", "1"),
    ("x^2+2x+1", "(x-1)^2"), ("3-4i", "3+4i"), ("p-q", "q-p"), (r"\sqrt{51}", "7.14"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
    (r"\text{Evelyn}", r"\text{Briana}"), (r"\text{(C)}", "(D)"), (r"\text{abc}", "cab"), ("even", "odd"),
    (r"\text{June 20}", "June 21"), ("4210_{5}", "4210_6"), ("5", "five and a half"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), EQUIVALENT)
def test_equivalent_answers(verifiers, reference, answer):
    assert verifiers.judge([(f"So it is \\boxed{{{answer}}}.", reference)])[0].correct


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different_answers(verifiers, reference, answer):
    assert not verifiers.judge([(f"So it is \\boxed{{{answer}}}.", reference)])[0].correct


def test_what_math_verify_leaves_open(verifiers):
    """Known limits, so that a change is seen: a bare number counts for one in a base, and letters commute."""
    assert verifiers.judge([(r"\boxed{4210}", "4210_{5}")])[0].correct
    assert verifiers.judge([(r"\boxed{BA}", "AB")])[0].correct


@pytest.mark.parametrize("name", ["math500", "aime24", "aime25"])
def test_every_reference_answer_verifies_against_itself(verifiers, name, monkeypatch):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent; TIPDISTILL_DATA names its folder")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == {"math500": 500}.get(name, 30)
    verdicts = verifiers.judge([(f"\\boxed{{{answer}}}", answer) for answer in answers])
    assert [answer for answer, verdict in zip(answers, verdicts, strict=True) if not verdict.correct] == []
    # and not only because equal texts are equal: math-verify by itself agrees
    from tipdistill.evaluate.verifier import _parse, _verified

    boxed = [_parse(f"\\boxed{{{answer}}}") for answer in answers]
    assert [answer for answer, parsed in zip(answers, boxed, strict=True) if not _verified(parsed, parsed)] == []


def test_the_public_name():
    assert tip.evaluate.is_correct(r"First \boxed{24}, but then $\boxed{025}$.", "25")
    assert not tip.evaluate.is_correct(r"First \boxed{25}, but then $\boxed{24}$.", "25")
    assert tip.evaluate.is_correct("So the answer is 18 apples.", "18")
    assert not tip.evaluate.is_correct("", "18")
    with pytest.raises(TypeError, match="answer must be a string, got int"):
        tip.evaluate.is_correct(r"\boxed{25}", 25)
