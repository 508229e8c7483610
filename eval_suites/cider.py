"""CIDEr of single captions, as pycocoevalcap computes it on its way to the mean that lmms-eval reports."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

SCALE = 10  # pycocoevalcap's CIDEr goes from 0 to 10


def cider(captions: Sequence[Mapping[str, Any]]) -> list[float]:
    """Each caption's CIDEr / 10, whose mean is the corpus's CIDEr / 10.

    How much a phrase counts depends on the references of all these pictures, which are the same for every model: so scores of two
    models on the same pictures can be compared in pairs, but not scores on other pictures.

    Args:
        captions: `{"image_id", "pred", "answer": references}` each, as lmms-eval's NoCaps keeps them.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    ids = [caption["image_id"] for caption in captions]
    if len(set(ids)) < len(ids):
        raise RuntimeError("two captions of the same image_id")
    with contextlib.redirect_stdout(io.StringIO()):
        references = PTBTokenizer().tokenize(
            {c["image_id"]: [{"caption": text} for text in c["answer"]] for c in captions}
        )
        own = PTBTokenizer().tokenize({c["image_id"]: [{"caption": c["pred"]}] for c in captions})
        _, scores = Cider().compute_score(references, own)
    by_id = dict(zip(references, scores, strict=True))
    return [float(by_id[i]) / SCALE for i in ids]
