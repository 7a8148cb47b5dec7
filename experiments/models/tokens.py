"""From prompts to tokens and from tokens to text.

`Characters` reads small tasks letter by letter; `pretrained_tokens` reads as a model folder says.

Example:
    >>> tokenizer = Characters("0123456789+=")
    >>> tokenizer.encode("37+58=")
    [5, 9, 12, 7, 10, 13]
    >>> tokenizer.decode([11, 7, tokenizer.pad])
    '95�'
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from experiments.tasks.task import Chat


class Tokenizer(Protocol):
    """What sampling asks of a tokenizer.

    Attributes:
        size: how many tokens there are.
        pad: the token that pads sequences; it is masked wherever it stands.
        ends: the tokens that end a response.
    """

    size: int
    pad: int
    ends: tuple[int, ...]

    def encode(self, prompt: str | Chat) -> list[int]:
        """The tokens of a text, or of a chat up to where the assistant's next message begins."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a response's tokens, which may end with an end token."""
        ...


class Characters:
    """One token per character, for small tasks: 0 is padding, 1 ends a response.

    Those of one alphabet are equal, so that jit compiles for them once.

    Args:
        characters: the alphabet.
    """

    pad: int = 0
    ends: tuple[int, ...] = (1,)

    def __init__(self, characters: str):
        self._characters = "�" * 2 + characters
        self._tokens = {character: 2 + i for i, character in enumerate(characters)}
        self.size = len(self._characters)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._characters == self._characters

    def __hash__(self) -> int:
        return hash(self._characters)

    def encode(self, prompt: str | Chat) -> list[int]:
        """The tokens of a text; a chat, or another character, is a ValueError."""
        if not isinstance(prompt, str) or not prompt or set(prompt) - self._tokens.keys():
            raise ValueError(
                f"{prompt=} must be a text of the characters {''.join(self._tokens)!r}"
            )
        return [self._tokens[character] for character in prompt]

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters up to the end token; other tokens that are no character show as �."""
        return "".join(self._characters[token] for token in tokens if token not in self.ends)


def padded(
    tokenizer: Tokenizer, prompts: Sequence[str | Chat], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens of one width, padded on the left.

    Args:
        tokenizer: the tokenizer.
        prompts: n texts or chats.
        width: of the widest prompt that is allowed.

    Returns:
        Tokens (n, width) int32, and which of them are no padding (n, width) bool.

    Raises:
        ValueError: a prompt has more tokens, or none.
    """
    tokens = np.full((len(prompts), width), tokenizer.pad, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, is_valid, prompt in zip(tokens, valid, prompts, strict=True):
        encoded = tokenizer.encode(prompt)
        if not 1 <= len(encoded) <= width:
            raise ValueError(
                f"a prompt has {len(encoded)} tokens, but must have 1 to {width}: "
                f"{str(prompt)[:200]!r}"
            )
        row[width - len(encoded) :] = encoded
        is_valid[width - len(encoded) :] = True
    return tokens, valid
