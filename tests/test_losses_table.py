"""ft/losses/README.md: its table is written from the oracles' rows, its code runs, and the tests it names exist.

    python tests/test_losses_table.py     # writes the table anew

Only what was compared stands in the table, not the digits of rounding that a run happens to give.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "ft" / "losses" / "README.md"
BEGIN, END = "<!-- table: written by tests/test_losses_table.py -->\n", "<!-- end of table -->\n"
LIMIT = 1e-6
Row = tuple[str, str, str, float]


def rows() -> list[Row]:
    """(loss, option, oracle, largest difference of value or gradient), measured now."""
    import oracles_dpo
    import oracles_ebft
    import oracles_grpo

    return [*oracles_dpo.table(), *oracles_grpo.rows(), *oracles_ebft.ROWS]


def table(found: list[Row]) -> str:
    lines = ["| loss | option | compared with | difference |", "|---|---|---|---|"]
    for loss, option, oracle, difference in found:
        bound = f"<= {LIMIT:.0e}" if difference <= LIMIT else f"{difference:.1e}"
        words = (f"`{loss}`", option or "-", oracle, bound)
        lines.append("| " + " | ".join(word.replace("|", "\\|") for word in words) + " |")
    return "\n".join(lines) + "\n"


def parts() -> tuple[str, str, str]:
    """The README before, within and after the marks."""
    before, rest = README.read_text().split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


@pytest.fixture(scope="module")
def found() -> list[Row]:
    for name in ("trl", "liger_kernel"):
        pytest.importorskip(name, reason=f"the table compares with {name}; the extra `bench` installs it")
    return rows()


def test_every_difference_is_within_the_limit(found: list[Row]) -> None:
    assert len(found) > 150
    assert {row[:3]: row[3] for row in found if not row[3] <= LIMIT} == {}


def test_no_comparison_is_listed_twice(found: list[Row]) -> None:
    assert len({row[:3] for row in found}) == len(found)


def test_the_table_is_that_of_the_oracles(found: list[Row]) -> None:
    assert parts()[1] == table(found), "run `python tests/test_losses_table.py`"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.S))
def test_code_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", README.read_text())
    assert len(named) > 10
    for file, name in named:
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), (file, name)


def test_every_public_name_is_mentioned() -> None:
    from ft import losses

    missing = [name for name in losses.__all__ if f"`{name}`" not in parts()[0]]
    assert missing == []


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(before + BEGIN + table(rows()) + END + after)
