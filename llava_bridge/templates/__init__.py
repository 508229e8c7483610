"""Chat templates (package data) for LLMs that have none, or none whose answers can be told from what is read."""

from pathlib import Path

from clips_core.errors import InputError

_FOLDER = Path(__file__).parent


def shipped_templates() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def shipped_template(name: str) -> str:
    """A template's text.

    Raises:
        InputError: if there is none of that name, naming those that there are.
    """
    if name not in shipped_templates():
        raise InputError(f"no chat template {name!r}: take one of {', '.join(shipped_templates())}")
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def read_template(name: str) -> str:
    """The text of a shipped template, or of a file whose name ends in .jinja.

    Raises:
        InputError: if there is no such template or file.
    """
    if not name.endswith(".jinja"):
        return shipped_template(name)
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"chat template {name}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat template {name}: cannot be read as text ({error})") from None
