"""The tokenizer of a model folder: its tokenizer.json, chat template and end tokens.

Chat templates are programs that come with a model: they run in jinja2's sandbox.
"""

import datetime
import json
import pathlib
from collections.abc import Iterable
from typing import Any, NoReturn

import jinja2.sandbox
import tokenizers

from experiments import files
from experiments.tasks.task import Chat


class Pretrained:
    """The tokenizer of a model folder: tokenizer.json, chat template, end tokens.

    End tokens are those of generation_config.json or, where that names none, of config.json.

    Args:
        folder: a Hugging Face model folder.

    Raises:
        files.Failure: the folder has no tokenizer.json or names no end token.
    """

    def __init__(self, folder: pathlib.Path):
        path = folder / "tokenizer.json"
        if not path.exists():
            raise files.Failure(
                f"{path} is not there. Choose a model folder with a tokenizer.json (a tokenizer of "
                "another format is written as one by transformers' AutoTokenizer.save_pretrained)."
            )
        self._folder = folder
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._settings = _read(folder / "tokenizer_config.json")
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.ends = self._end_tokens()
        pad = self._special("pad_token")
        known = None if pad is None else self._tokenizer.token_to_id(pad)
        self.pad = self.ends[0] if known is None else known

    def _special(self, name: str) -> str | None:
        token = self._settings.get(name)
        return token["content"] if isinstance(token, dict) else token

    def _end_tokens(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            found = _read(self._folder / name).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        raise files.Failure(
            f"{self._folder} names no end token: neither its generation_config.json nor its "
            "config.json has an eos_token_id. Add it there."
        )

    def encode(self, prompt: str | Chat) -> list[int]:
        """The tokens of a text as the tokenizer adds to it, or of a chat by its template.

        Raises:
            files.Failure: a chat, but the folder has no chat template, or it refuses the chat.
        """
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt).ids
        return self._tokenizer.encode(self.chat_text(prompt), add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode([int(token) for token in tokens])

    def chat_text(self, chat: Chat) -> str:
        """A chat as the model reads it, up to where the assistant's next message begins."""
        try:
            return self._template().render(
                messages=chat,
                add_generation_prompt=True,
                bos_token=self._special("bos_token") or "",
                eos_token=self._special("eos_token") or "",
            )
        except jinja2.TemplateError as error:
            raise files.Failure(
                f"The chat template of {self._folder} refuses {chat}: {error}. Change the chat, or "
                "the template."
            ) from error

    def _template(self) -> Any:
        path = self._folder / "chat_template.jinja"
        template = path.read_text() if path.exists() else self._settings.get("chat_template")
        if not isinstance(template, str):
            raise files.Failure(
                f"{self._folder} has no chat template, in chat_template.jinja or in "
                "tokenizer_config.json. Add one, or ask the task for plain texts."
            )

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.filters["tojson"] = lambda x, indent=None: json.dumps(
            x, ensure_ascii=False, indent=indent
        )
        sandbox.globals["raise_exception"] = refuse
        sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return sandbox.from_string(template)


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return files.parse(path.read_bytes(), dict, str(path), "Put back a copy of it.")
