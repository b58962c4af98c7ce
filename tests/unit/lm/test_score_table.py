"""The tables of scores in the documentation have each score of the registries, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from selfdoubt.eval.scores.agreement import AGREEMENT_SCORES
from selfdoubt.lm.scores import ANSWER_SCORES, RANK_SCORES, Score, Signal

PAGE = Path(__file__).parents[3] / "docs" / "evaluate.md"


def test_each_score_is_documented_once():
    section = PAGE.read_text(encoding="utf-8").partition("\n## Scores\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    alone = [name for name, score in ANSWER_SCORES.items() if not isinstance(score, Score)]
    assert sorted(names) == sorted([*get_args(Signal), *alone, *RANK_SCORES, *AGREEMENT_SCORES, "p_false"])
