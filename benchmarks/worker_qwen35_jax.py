"""Our side of vs_transformers: one round for each line on standard input."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

import qwen35_jax


def run(lm: qwen35_jax.LanguageModel, ids: list[int], new_tokens: int) -> dict[str, float]:
    """Seconds for the prompt and its first token, and for the tokens after it."""
    lm.generate(ids, max_new_tokens=new_tokens + 1, temperature=0, ignore_eos=True)
    assert lm.timing.decode_tokens == new_tokens, lm.timing
    return {"prefill": lm.timing.prefill_seconds, "decode": lm.timing.decode_seconds}


def main() -> None:
    options = json.loads(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    lm = qwen35_jax.load(options["model"], dtype=options["dtype"])
    ids = np.random.default_rng(0).integers(0, lm.vocabulary, options["prompt_tokens"]).tolist()
    run(lm, ids, options["new_tokens"])
    print(json.dumps({"versions": f"qwen35_jax {qwen35_jax.__version__}, jax {jax.__version__}"}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run(lm, ids, options["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
