"""The transformers side of vs_transformers: one round for each line on standard input."""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers


def build(options: dict) -> torch.nn.Module:
    """A random text model of the given shape, in the given dtype."""
    shape, moe = options["config"], bool(options["config"]["num_experts"])
    rope = shape.pop("rope")
    names = {"theta": "rope_theta"}
    kept = ("theta", "partial_rotary_factor", "mrope_section", "rope_type")
    shape["rope_parameters"] = {names.get(k, k): rope[k] for k in kept} | {"mrope_interleaved": True}
    kind = transformers.Qwen3_5MoeTextConfig if moe else transformers.Qwen3_5TextConfig
    ignored = ("vision", "dtype", "fp8_weights", "quantized_source", "fp8_activations", "mtp_num_hidden_layers", "eos_token_id")
    config = kind(**{name: value for name, value in shape.items() if name not in ignored})
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(getattr(torch, options["dtype"]))
    model = (transformers.Qwen3_5MoeForCausalLM if moe else transformers.Qwen3_5ForCausalLM)(config)
    return model.eval()


@torch.inference_mode()
def run(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds for the prompt and its first token, and for the tokens after it."""
    begin = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    prefill = time.perf_counter() - begin
    for _ in range(new_tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return {"prefill": prefill, "decode": time.perf_counter() - begin - prefill}


def main() -> None:
    options = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options["threads"])
    model = build(options)
    ids = torch.randint(0, model.config.vocab_size, (1, options["prompt_tokens"]))
    run(model, ids, options["new_tokens"])
    print(json.dumps({"versions": f"transformers {transformers.__version__}, torch {torch.__version__}"}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run(model, ids, options["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
