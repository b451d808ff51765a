"""The instruction, and in pi0.5 the state, as tokens."""

from __future__ import annotations

import logging

import numpy as np

from pi0_ros.policy.tokenizer import PAD_ID, Tokenizer

PROMPT_FORMATS = ("pi0", "pi05", "lerobot_pi05")

_BIN_EDGES = np.linspace(-1.0, 1.0, 257)[:-1]  # 256 bins over the normalised range
_log = logging.getLogger(__name__)


def clean(prompt: str) -> str:
    """Outer white space off, underscores and newlines to spaces (openpi: models/tokenizer.py)."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: np.ndarray) -> np.ndarray:
    """Normalised state -> int64 bins 0..255 over -1..1; below -1 is -1, above 1 is 255 (openpi: models/tokenizer.py).

    Edges are float64, and a number on an edge belongs to the bin above it: 0.0 -> 128.
    """
    return np.digitize(state, bins=_BIN_EDGES) - 1


class PromptEncoder:
    """Prompts to token ids in one of the formats that checkpoints were trained with.

        pi0           cleaned prompt, then a newline as a token of its own; no state (pi05_libero uses it too)
        pi05          "Task: {prompt}, State: {bins};\\nAction: ", bins of the robot's own joints
        lerobot_pi05  as pi05, but the state padded with zeros to `action_dim` first: more bins, all of them 128
                      (lerobot up to 0.4.4)

    What is too long loses its end, with a warning once for every prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_format: str, max_len: int, action_dim: int = 32) -> None:
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt format must be one of {', '.join(PROMPT_FORMATS)}, found {prompt_format!r}")
        self.tokenizer, self.format, self.max_len, self.action_dim = tokenizer, prompt_format, max_len, action_dim
        self._cached: dict[str, np.ndarray] = {}
        self._warned: set[str] = set()

    @property
    def reads_state(self) -> bool:
        """Whether the state is part of the prompt."""
        return self.format != "pi0"

    def encode(self, prompt: str, state: np.ndarray | None = None) -> np.ndarray:
        """Token ids without padding, int64 [L], L at most `max_len`.

        state: normalised, of the robot's own joints, [J]; needed where the format holds it.
        """
        if self.reads_state:
            if state is None:
                raise ValueError(f"prompt format {self.format!r} holds the state, none was given")
            return self._cut(prompt, *self.tokens(prompt, state))
        if prompt not in self._cached:
            self._cached[prompt] = self._cut(prompt, *self.tokens(prompt))
            while len(self._cached) > 64:  # prompts come from outside
                del self._cached[next(iter(self._cached))]
        return self._cached[prompt]

    def tokens(self, prompt: str, state: np.ndarray | None = None) -> tuple[list[int], bool]:
        """As `encode`, but all ids, however many, and whether cutting them to `max_len` costs some of the state."""
        if not self.reads_state:
            return self.tokenizer.encode(clean(prompt), bos=True) + self.tokenizer.encode("\n"), False
        text = self._with_state(prompt, np.asarray(state))
        ids = self.tokenizer.encode(text, bos=True)
        if len(ids) <= self.max_len:
            return ids, False
        return ids, len(self.tokenizer.encode(text.rpartition(";")[0], bos=True)) > self.max_len

    def encode_padded(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [max_len], padded on the right with 0, and their validity, bool [max_len]."""
        ids = self.encode(prompt, state)
        padded = np.full(self.max_len, PAD_ID, np.int64)
        padded[: len(ids)] = ids
        return padded, np.arange(self.max_len) < len(ids)

    def _with_state(self, prompt: str, state: np.ndarray) -> str:
        if self.format == "lerobot_pi05":
            state = np.pad(state, (0, max(self.action_dim - len(state), 0)))
        return f"Task: {clean(prompt)}, State: {' '.join(map(str, state_bins(state)))};\nAction: "

    def _cut(self, prompt: str, ids: list[int], costs_state: bool) -> np.ndarray:
        if len(ids) > self.max_len and prompt not in self._warned:
            self._warned.add(prompt)
            what = ": some of the state is cut" if costs_state else ""
            _log.warning("prompt %.80r has %d tokens, only the first %d count%s", prompt, len(ids), self.max_len, what)
        return np.array(ids[: self.max_len], np.int64)
