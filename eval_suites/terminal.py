"""Tables in the terminal."""

import textwrap
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table:
    """A table whose first `words` columns hold words and stand left; the others hold figures. Brackets are no markup.

    A row may end early: what it lacks stays empty. In a narrow terminal words are wrapped and figures are not: a figure with its
    end cut off is another figure. So that their headings do not make them wide, these are folded to the width of what stands below.
    """
    rows = list(rows)
    made = Table(
        title=Text(title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        if number < words:
            made.add_column(Text(column), justify="left", overflow="fold")
        else:
            width = max((len(row[number]) for row in rows if number < len(row)), default=len(column))
            heading = textwrap.fill(column, max(width, 1), break_long_words=False, break_on_hyphens=False)
            made.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))
    return made
