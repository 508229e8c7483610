"""Tables in the terminal: no figure is ever cut."""

import pytest
from rich.console import Console

from eval_suites.terminal import table

COLUMNS = ["arm", "strategy", "R@1, mean of both ways", "95 % interval", "trainings"]
ROWS = [
    ["clips without its decoder", "sub_caption", "69.4", "[−63.2, +75.6]", "3"],
    ["clip_mix", "truncation", "100.0", "[−4.3, +4.0]", "12"],
    ["and one that ends early"],
]


def words_of(text: str) -> tuple[str, str]:
    """All that stands in the first column and in the second, wrapped or not, without spaces."""
    lines = text.splitlines()
    heading = next(line for line in lines if line.startswith("arm "))
    second = len(heading) - len(heading[len("arm") :].lstrip())  # where it begins
    return (
        "".join(line[:second].replace(" ", "") for line in lines),
        "".join(line[second:].split()[0] for line in lines if line[second : second + 1].strip()),
    )


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_words_wrap_and_figures_stay_whole(width: int) -> None:
    console = Console(width=width, record=True)
    console.print(
        table("A title that is much longer than a narrow terminal has room for, by far", COLUMNS, ROWS, words=2)
    )
    text = console.export_text()
    for row in ROWS:
        for figure in row[2:]:
            assert figure in text
    arms, strategies = words_of(text)
    assert "".join(row[0].replace(" ", "") for row in ROWS) in arms
    assert "sub_captiontruncation" in strategies
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_brackets_are_no_markup() -> None:
    console = Console(width=80, record=True)
    console.print(table("[red]title", ["[bold]tower"], [["[blink]A"]]))
    text = console.export_text()
    assert "[red]title" in text and "[bold]tower" in text and "[blink]A" in text
