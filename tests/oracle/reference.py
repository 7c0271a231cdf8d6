"""What transformers says about a small random model, computed once, and the checkpoint that says the same to us."""

from __future__ import annotations

import functools

import numpy as np
import torch

from tests.oracle import compare, hf_models

TOKENS, NEW_TOKENS = 600, 48
LENGTHS = (600, 371, 64, 5, 1)  # prompts of a right-padded batch
CHUNK = 200  # of prefill


class Reference:
    """What the oracle says about one case, and the checkpoint directory that says the same to us."""

    def __init__(self, name: str, directory):
        self.case = hf_models.CASES[name]
        self.oracle = hf_models.build(self.case)
        self.directory = str(directory)
        hf_models.save(self.oracle, directory)
        self.prompt_logits = functools.cache(self.prompt_logits)
        self.greedy = functools.cache(self.greedy)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Token ids [5, TOKENS]; most tests use the first two rows."""
        return hf_models.random_tokens(self.case, (len(LENGTHS), TOKENS), seed=17).numpy()

    @functools.cached_property
    def full(self) -> np.ndarray:
        """Logits [5, TOKENS, V] of all rows."""
        return hf_models.full_forward(self.oracle, torch.tensor(self.ids)).numpy()

    def logits(self, ids) -> np.ndarray:
        """Logits [T, V] of one sequence."""
        return hf_models.full_forward(self.oracle, torch.tensor(np.asarray(ids))[None])[0].numpy()

    def prompt(self, row: int, length: int) -> list[int]:
        return self.ids[row, :length].tolist()

    def prompt_logits(self, row: int, length: int) -> np.ndarray:
        return self.logits(self.prompt(row, length))

    def greedy(self, row: int, length: int) -> list[int]:
        """What the oracle says after the first `length` tokens of a row."""
        return hf_models.greedy(self.oracle, torch.tensor(self.ids[row : row + 1, :length]), NEW_TOKENS)[0].tolist()

    def check_greedy(self, row: int, length: int, tokens: list[int], label: str, error: float) -> None:
        """Fails unless `tokens` follow prompt `row` of `length` tokens as the oracle's own do; near ties aside, as the measured
        `error` of the logits has it."""
        prompt = self.prompt(row, length)
        said = functools.partial(self._logits_before, prompt)
        compare.check_greedy(self.greedy(row, length), tokens, said, f"{label}, row {row} of {length} tokens", error)

    def _logits_before(self, prompt: list[int], tokens: list[int]) -> np.ndarray:
        return self.logits(prompt + tokens)[len(prompt) - 1 : -1]
