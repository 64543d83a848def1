"""The "tokenizer" of a dual encoder: a text's token is its row number in the table of sentence embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch

from digrap_scale.errors import ConfigError

TEXTS_FILE = "texts.json"


class TextTable:
    """Texts in the order of the table's rows.

    Args:
        texts: one a row; no text twice.
        source: the file they came from, for error messages.

    Raises:
        ConfigError: a text occurs twice.
    """

    def __init__(self, texts: Iterable[str], source: str = TEXTS_FILE) -> None:
        self.texts = list(texts)
        self.source = source
        self._rows = {text: row for row, text in enumerate(self.texts)}
        if len(self._rows) != len(self.texts):
            seen: set[str] = set()
            twice = next(text for text in self.texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
            raise ConfigError(f"{source}: text {twice!r} occurs twice; every row needs a text of its own")

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(
        self,
        text: str | Sequence[str],
        return_tensors: str = "pt",
        padding: bool | str = True,
        truncation: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Row numbers of ``text`` (n texts): ``input_ids`` [n, 1] int64, ``attention_mask`` [n, 1] int64 ones.

        ``padding`` and ``truncation`` are taken for the tokenizers' sake: a row number is always one token long.

        Raises:
            ConfigError: a text is not in the table.
        """
        if return_tensors != "pt":
            raise ConfigError(f"{self.source}: return_tensors must be 'pt', found {return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        unknown = [item for item in texts if item not in self._rows]
        if unknown:
            near = get_close_matches(unknown[0], self.texts, n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ConfigError(
                f"{self.source}: {len(unknown)} text(s) not among its {len(self.texts)} rows, first "
                f"{unknown[0]!r}{hint}; "
                "embed them with tools/embed_texts.py"
            )
        rows = torch.tensor([self._rows[item] for item in texts], dtype=torch.int64).reshape(-1, 1)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> TextTable:
        """Read ``texts.json`` (a list of texts) of a model folder.

        Raises:
            ConfigError: the file is missing or is not a list of texts.
        """
        path = Path(folder) / TEXTS_FILE
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); a dual encoder's folder must hold it"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error}); write it with tools/embed_texts.py") from error
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{path}: expected a list of texts; write it with tools/embed_texts.py")
        return cls(texts, str(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write ``texts.json`` into ``folder`` (made if missing); returns the written paths."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / TEXTS_FILE
        path.write_text(json.dumps(self.texts, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        return (str(path),)
