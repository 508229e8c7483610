"""Tables in the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, no_wrap: bool = False
) -> Table:
    """A table whose first `words` columns hold words and stand left; the others hold figures. Brackets are no markup."""
    made = Table(
        title=Text(title, "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if number < words else "right", no_wrap=no_wrap)
    for row in rows:
        made.add_row(*map(Text, row))
    return made
