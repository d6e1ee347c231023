"""Text out of tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator


def pieces(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids piece by piece, as soon as a character is whole.

    Args:
        decode: a tokenizer's, ids to text.
        ids: as they come, such as from ``generate``.
    """
    held: list[int] = []
    shown = done = 0  # held[:shown] is context for the decoder, and begins what held[:done] shows
    for token in ids:
        held.append(token)
        before, text = decode(held[shown:done]), decode(held[shown:])
        if len(text) > len(before) and not text.endswith("�"):
            yield text[len(before) :]
            shown, done = done, len(held)
    rest = decode(held[shown:])[len(decode(held[shown:done])) :]
    if rest:
        yield rest
