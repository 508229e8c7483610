"""What classes are called, and the prompts that their names are put into. open_clip's own lists are imported, not copied."""

from collections.abc import Callable, Sequence
from pathlib import Path

from clips_core.errors import InputError
from clips_core.zero_shot import are_imagenet_ids

Template = Callable[[str], str]

CLASS_NAMES = "classnames.txt"  # as CLIP_benchmark's exports have them, in the folder of a split or the one around it
TEMPLATES = "zeroshot_classification_templates.txt"


def class_names(names: str | None, ids: Sequence[str] | None, beside: Path, data: Path) -> list[str]:
    """What each class is called in words, in the order of their numbers.

    Args:
        names: imagenet, folders, or a file with a line a class; None: the file beside the pictures, else ImageNet's where the
            folders are called so, else the folders' own names, underscores as spaces.
        ids: names of the class folders, sorted; None: the pictures are in tars, which number their classes.
        beside: the folder of the pictures.
        data: folder that a file's path is relative to.

    Raises:
        InputError: naming the file, if it is missing or holds another number of classes; if nothing says the names.
    """
    import open_clip

    file = _beside(beside, CLASS_NAMES) if names is None else None
    if names not in (None, "imagenet", "folders"):
        file = data / str(names)
    if file is not None:
        lines = _lines(file)
        if ids is not None and len(lines) != len(ids):
            raise InputError(f"{file}: names {len(lines)} classes, but {beside} has {len(ids)} class folders")
        return [name for _, name in lines]
    if names == "imagenet" or (names is None and ids is not None and are_imagenet_ids(ids)):
        if ids is not None and not are_imagenet_ids(ids):
            raise InputError(
                f"{beside}: has {len(ids)} class folders; ImageNet has 1,000, named n01440764 and so on. Of a part of it, give the "
                "names in a file with a line a class"
            )
        return list(open_clip.IMAGENET_CLASSNAMES)  # in the order of the sorted ids
    if ids is None:
        raise InputError(
            f"{beside}: nothing says what its classes are called; put {CLASS_NAMES} beside it, a line a class from number 0 on, or "
            "set names to such a file or to imagenet"
        )
    return [name.replace("_", " ") for name in ids]


def templates(name: str | None, beside: Path, data: Path) -> list[Template]:
    """Prompts as functions of a class's name.

    Args:
        name: openai_imagenet (80), simple_imagenet (7), or a file with a prompt a line, with {c} or {} for the name; None: the
            file beside the pictures, else openai_imagenet.
        beside, data: as in `class_names`.

    Raises:
        InputError: naming the file, and the line that has no place for the name.
    """
    import open_clip

    shipped = {
        "openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple_imagenet": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }
    file = _beside(beside, TEMPLATES) if name is None else None
    if file is None and (name is None or name in shipped):
        return list(shipped[name or "openai_imagenet"])
    file = file or data / str(name)
    return [_template(file, number, line) for number, line in _lines(file)]


def _template(file: Path, number: int, line: str) -> Template:
    place = next((mark for mark in ("{c}", "{}") if mark in line), None)
    if place is None:
        raise InputError(f"{file}, line {number}: {line!r} has no place for the class's name; write {{c}} there")
    return lambda name: line.replace(place, name)


def _beside(folder: Path, name: str) -> Path | None:
    return next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)


def _lines(file: Path) -> list[tuple[int, str]]:
    """Number and text of each line, those after the last text left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.rstrip().splitlines(), start=1)]
    if not lines:
        raise InputError(f"{file}: is empty")
    for number, line in lines:
        if not line:  # skipped, it would shift the numbers of all classes after it
            raise InputError(f"{file}, line {number}: is empty")
    return lines
