"""Text to token ids: the tokenizer that came with a checkpoint, or one token a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pi0_ros.wording import first_line

PAD_ID = 0  # in every tokenizer that pi models use


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or does not fit the model."""


class Tokenizer(Protocol):
    """What a prompt needs of a tokenizer. Padding is always id 0."""

    vocab_size: int

    def encode(self, text: str, bos: bool = False) -> list[int]: ...


class ByteTokenizer:
    """One token a UTF-8 byte: id = byte + 3, after 0 = padding, 1 = end, 2 = beginning. Needs no download."""

    vocab_size = 260

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [2] * bos + [byte + 3 for byte in text.encode("utf-8", errors="replace")]


class SentencePieceTokenizer:
    """A SentencePiece .model file, such as openpi's paligemma_tokenizer.model."""

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path}: not a SentencePiece model: {first_line(error)}") from None
        self.vocab_size = self._model.vocab_size()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self._model.encode(text, add_bos=bos)


class HuggingFaceTokenizer:
    """A folder that transformers' AutoTokenizer reads. Nothing is downloaded and no code of the folder is run."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # every kind of broken folder raises something else
            raise TokenizerError(f"{folder}: not a Hugging Face tokenizer folder: {first_line(error)}") from None
        if self._tokenizer.bos_token_id is None:
            raise TokenizerError(f"{folder}: this tokenizer has no bos token, and pi prompts begin with one")
        # Special tokens behind all others, as PaliGemma's <image>, are not embedded by models of pi: no text gives one.
        special = {number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self.vocab_size = len(self._tokenizer)
        while self.vocab_size - 1 in special - {self._tokenizer.bos_token_id}:
            self.vocab_size -= 1

    def encode(self, text: str, bos: bool = False) -> list[int]:
        # A prompt is words, whatever it holds: "<bos>" in it is no control token (nor is it in SentencePiece).
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [self._tokenizer.bos_token_id] * bos + ids


def load_tokenizer(path: str | Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer at `path` (a Hugging Face folder, a SentencePiece .model file, or a folder with one), or bytes.

    Raises:
        TokenizerError: nothing usable there, more tokens than the model embeds, or no path for a model whose vocabulary
            is not the byte-level one.
    """
    if path is None:
        if vocab_size != ByteTokenizer.vocab_size:
            raise TokenizerError(
                f"no tokenizer given for a model of {vocab_size} tokens; give --tokenizer (a Hugging Face folder or a "
                f"SentencePiece .model) to train or convert, which put it into the checkpoint"
            )
        return ByteTokenizer()
    path = Path(path)
    tokenizer = _open(path)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(f"{path}: {tokenizer.vocab_size} tokens, but the model embeds only {vocab_size}")
    return tokenizer


def _open(path: Path) -> Tokenizer:
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise TokenizerError(f"{path}: no such tokenizer file or folder")
    models = sorted(path.glob("*.model"))
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        if len(models) == 1:
            return SentencePieceTokenizer(models[0])
        found = sorted(entry.name for entry in path.iterdir())
        raise TokenizerError(f"{path}: needs tokenizer.json or one .model file, found {found}")
    return HuggingFaceTokenizer(path)
