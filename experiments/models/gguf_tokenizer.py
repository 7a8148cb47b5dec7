"""The tokenizer inside a GGUF file, as a byte-level BPE of the tokenizers library.

Encodes as the model's own tokenizer.json does. A pre-tokenizer that is not known is an error.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from experiments import files

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words, punctuation, white space, and digits in groups that a regular expression counts."""
    pattern = tokenizers.Regex(_SPLIT.replace("DIGITS", digits))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_alone])


_PRE_TOKENIZERS = {
    "gpt-2": _BYTES,
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}
_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NEEDED = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")
_READ = {*_NEEDED, "add_bos_token", *_IDS.values(), *_ENDS}
_REFUSED_IF_TRUE = {
    "add_space_prefix",
    "add_eos_token",
    "add_sep_token",
    "remove_extra_whitespaces",
}
_HARMLESS = {
    *(f"{name}_token_id" for name in ("cls", "mask", "seperator", "prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}
"""Roles of tokens that a decoder has no use for, in the spelling of the format."""


class GGUFTokenizer:
    """What the keys `tokenizer.*` of a GGUF file say.

    Args:
        keys: these keys and their values, without the prefix "tokenizer.ggml.".
        chat_template: a Jinja template, if there is one.

    Raises:
        Failure: a key is missing or unknown, or asks for another kind of tokenizer.
    """

    def __init__(self, keys: Mapping[str, Any], chat_template: str | None):
        self.keys = keys
        self.chat_template = chat_template
        self.adds_bos = keys.get("add_bos_token", keys.get("pre") == "llama-bpe")
        for key in _NEEDED + ("bos_token_id",) * self.adds_bos:
            if key not in keys:
                raise _refuse(f"{key} is missing")
        for key in sorted(set(keys) - _READ - _REFUSED_IF_TRUE - _HARMLESS):
            raise _refuse(f"{key} is not known")
        for key in sorted(_REFUSED_IF_TRUE):
            if keys.get(key, False):
                raise _refuse(f"{key}=True is not supported")
        if keys["model"] != "gpt2":
            raise _refuse(f"model={keys['model']!r} is not supported: it must be 'gpt2'")
        if keys["pre"] not in _PRE_TOKENIZERS:
            known = ", ".join(sorted(_PRE_TOKENIZERS))
            raise _refuse(f"pre={keys['pre']!r} is not supported: it must be one of {known}")
        self.tokens = self._tokens()
        for key in sorted({*_IDS.values(), *_ENDS} & set(keys)):
            if keys[key] >= len(self.tokens):
                raise _refuse(f"{key}={keys[key]} is no token")

    def _tokens(self) -> list[str]:
        """All tokens but unused ones at the end, which only fill up the embedding table."""
        tokens, types = list(self.keys["tokens"]), list(self.keys["token_type"])
        if len(tokens) != len(types):
            raise _refuse(f"token_type has {len(types)} entries for {len(tokens)} tokens")
        while types and types[-1] == TokenType.UNUSED:
            tokens.pop()
            types.pop()
        if len(set(tokens)) < len(tokens):
            raise _refuse("tokens has one of them twice")
        for token, kind in zip(tokens, types, strict=True):
            if kind not in (TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED):
                raise _refuse(f"the token {token!r} is of the type {kind}, which is not supported")
        return tokens

    def _of_type(self, kind: TokenType) -> list[tokenizers.AddedToken]:
        pairs = zip(self.tokens, self.keys["token_type"], strict=False)
        special = kind is TokenType.CONTROL
        return [
            tokenizers.AddedToken(token, normalized=False, special=special)
            for token, its_kind in pairs
            if its_kind == kind
        ]

    def build(self) -> tokenizers.Tokenizer:
        """The tokenizer.

        Raises:
            Failure: merges and tokens do not fit.
        """
        pre, vocab = self.keys["pre"], {token: i for i, token in enumerate(self.tokens)}
        merges = [tuple(merge.split(" ")) for merge in self.keys["merges"]]
        try:
            model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
        except Exception as error:  # the library raises nothing narrower
            raise _refuse(f"merges do not fit the tokens: {error}") from error
        tokenizer = tokenizers.Tokenizer(model)
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(self._of_type(TokenType.CONTROL))
        tokenizer.add_tokens(self._of_type(TokenType.USER_DEFINED))
        if self.adds_bos:
            bos = self.keys["bos_token_id"]
            name = self.tokens[bos]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
            )
        return tokenizer

    def settings(self, context: int) -> dict[str, Any]:
        """What goes to tokenizer_config.json."""
        named = {
            name: self.tokens[self.keys[key]] for name, key in _IDS.items() if key in self.keys
        }
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            **named,
            **template,
        }

    def generation(self) -> dict[str, Any]:
        """What goes to generation_config.json."""
        named = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
        ids = {name: self.keys[key] for name, key in named.items() if key in self.keys}
        return ids | {"eos_token_id": sorted({self.keys[k] for k in _ENDS if k in self.keys})}


def _refuse(why: str) -> files.Failure:
    return files.Failure(f"tokenizer.ggml.{why}.")
