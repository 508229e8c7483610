"""Chat templates for tokenizers that have none (package data), and by which LLaVA-1.5 was trained: vicuna_v1, llama3, chatml."""

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
