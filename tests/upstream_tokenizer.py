"""Runs in the original LLaVA's environment: a small SentencePiece tokenizer in Llama's layout, as Vicuna 1.5 has one.

    python upstream_tokenizer.py CORPUS.txt FOLDER

FOLDER/slow is for the original (tokenizer.model), FOLDER/tokenizer.json is the same tokenizer converted, for everybody else.
"""

import sys
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer, LlamaTokenizerFast

corpus, folder = Path(sys.argv[1]), Path(sys.argv[2])
slow = folder / "slow"
slow.mkdir(parents=True)
# Llama 2's own settings, but for the size.
sentencepiece.SentencePieceTrainer.train(
    input=str(corpus), model_prefix=str(slow / "tokenizer"), model_type="bpe", vocab_size=420, byte_fallback=True,
    split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2,
    pad_id=-1, minloglevel=2,
)  # fmt: skip
(slow / "tokenizer.vocab").unlink()
LlamaTokenizer(str(slow / "tokenizer.model"), legacy=True).save_pretrained(slow)
LlamaTokenizerFast(vocab_file=str(slow / "tokenizer.model"), legacy=True).backend_tokenizer.save(
    str(folder / "tokenizer.json")
)
