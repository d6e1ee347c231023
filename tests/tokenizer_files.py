"""tokenizer.json of several kinds, small enough to be trained where they are needed."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, trainers

TEACHER = Path(__file__).parent / "teacher"


def sentencepiece(vocab_size, byte_fallback):
    """As Llama 2 has it: a mark for spaces, perhaps bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256 if byte_fallback else 0))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special[:2], limit_alphabet=45, show_progress=False
    )
    text = (TEACHER / "train.txt").read_text(encoding="utf-8")[:20_000]
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for token in special[2:]:
        vocab[token] = len(vocab)
    return content


def teacher(**parts):
    """The teacher's, byte-level, cut as other models cut."""
    return json.loads((TEACHER / "tokenizer.json").read_text(encoding="utf-8")) | parts
