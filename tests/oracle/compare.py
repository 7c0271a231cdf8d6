"""How outputs are compared: KL per token, best tokens with near ties listed, and the layer where numbers part."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np

# The oracle's two best logits are a near tie where they differ by less than this many times the measured error.
TIE_FACTOR = 10


def log_softmax(logits) -> np.ndarray:
    """Logits [..., V] -> float64 log probabilities."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl(reference, logits) -> np.ndarray:
    """KL(reference || logits) of each token: [..., V] twice -> float64 [...]."""
    p, q = log_softmax(reference), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits against the oracle's. `wrong` and `ties` list positions whose best token differs."""

    mean_kl: float
    max_kl: float
    error: float
    wrong: list[tuple[int, ...]]
    ties: list[tuple[int, ...]]

    def __str__(self) -> str:
        return (
            f"KL mean {self.mean_kl:.2e} max {self.max_kl:.2e}, largest error {self.error:.2e}, "
            f"best token differs at {self.wrong[:8]}{' …' if len(self.wrong) > 8 else ''}, near ties {self.ties}"
        )


def compare(reference, logits) -> Comparison:
    """Compares logits [..., V] with the oracle's."""
    reference, logits = np.asarray(reference, np.float64), np.asarray(logits, np.float64)
    assert reference.shape == logits.shape, f"shapes {reference.shape} and {logits.shape}"
    divergence = kl(reference, logits)
    error = float(np.abs(reference - logits).max())
    wrong, ties = [], []
    for position in np.argwhere(reference.argmax(-1) != logits.argmax(-1)):
        index = tuple(int(i) for i in position)
        (ties if is_tie(reference[index], error) else wrong).append(index)
    return Comparison(float(divergence.mean()), float(divergence.max()), error, wrong, ties)


def is_tie(logits: np.ndarray, error: float) -> bool:
    """Whether the two best of the oracle's logits [V] are closer than the measured error can tell."""
    second, best = np.partition(logits, -2)[-2:]
    return bool(best - second < TIE_FACTOR * error)


def check(reference, logits, label: str, limit: float = 1e-5) -> Comparison:
    """Fails unless every token's KL is below `limit` and the best tokens are equal; near ties become warnings."""
    result = compare(reference, logits)
    print(f"{label}: {result}")
    assert np.isfinite(result.error), f"{label}: not finite"
    assert result.max_kl < limit, f"{label}: {result}"
    assert not result.wrong, f"{label}: {result}"
    if result.ties:
        warnings.warn(f"{label}: near ties of the oracle decided differently at {result.ties}", stacklevel=2)
    return result


def check_greedy(expected: list[int], tokens: list[int], oracle_logits, label: str, error: float) -> None:
    """Fails unless greedy `tokens` equal `expected`, the oracle's own.

    Where they part at a near tie, the rest is judged by the oracle given what was said: `oracle_logits(tokens)` returns
    its logits [len(tokens), V] before each of them. `error` is the largest logit error that was measured.
    """
    tokens, expected = list(tokens), list(expected)
    assert len(tokens) == len(expected), f"{label}: {len(tokens)} tokens, expected {len(expected)}"
    if tokens == expected:
        return
    ties = []
    for i, (token, logits) in enumerate(zip(tokens, np.asarray(oracle_logits(tokens)), strict=True)):
        if token != int(logits.argmax()):
            assert is_tie(logits, error), f"{label}: token {i} is {token}, the oracle says {int(logits.argmax())}"
            ties.append(i)
    warnings.warn(f"{label}: near ties of the oracle decided differently at tokens {ties}", stacklevel=2)


def layer_errors(reference: list, outputs) -> list[tuple[float, list[int]]]:
    """(relative error, [row, token] of the largest) of each hidden state [B, T, D]: after the embedding and after each layer."""
    errors = []
    for a, b in zip(reference, outputs, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        relative = float(np.sqrt(((a - b) ** 2).mean() / (a**2).mean()))
        worst = np.unravel_index(np.abs(a - b).max(axis=-1).argmax(), a.shape[:-1])
        errors.append((relative, [int(n) for n in worst]))
    return errors


def layer_report(errors: list[tuple[float, list[int]]], kinds: list[str], limit: float) -> str:
    """Where numbers part: each of `layer_errors` under its layer's kind, and the first that is not below `limit`."""
    names = ["embedding", *(f"layer {i} ({kind})" for i, kind in enumerate(kinds))]
    first = next((name for name, (relative, _) in zip(names, errors, strict=True) if not relative < limit), None)
    lines = [f"  {name}: relative error {e:.1e}, worst at row, token {at}" for name, (e, at) in zip(names, errors, strict=True)]
    return f"first bad: {first or 'none: look at the final norm and the head'}\n" + "\n".join(lines)
