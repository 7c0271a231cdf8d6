"""The compiled steps of generation: prefill a chunk, choose the first token, decode many. Each is a `Program`: a jitted function
with the abstract arguments it is lowered on, so that it can be compiled for devices that are not there.

The session of a batch, a pytree that every step takes and (donated) returns:
    state    decoding state of `model.abstract_state`
    hidden   [S, D] last hidden state of the prompt
    token    [S] int32 the newest token, chosen but not yet read by the model
    step     [S] int32 tokens chosen so far
    seen     [S, V] uint8 tokens of prompt and answer, for the penalties
    done     [S] bool rows that have ended (dead rows from the start)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen35_jax.generate.sampling import CONTROL_DTYPES, GENERATED, mark_prompt, mark_seen, sample
from qwen35_jax.model import Model, VisionRows, abstract_state, put_slots, take_slots, take_token
from qwen35_jax.ops.segments import segment_positions
from qwen35_jax.program import Program, abstract_array, make_program

# The most tokens that one call of decode produces, and end tokens that a row can have.
MAX_STEPS = 64
MAX_END_TOKENS = 8


def _array(model: Model, axes: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return abstract_array(model.sharding, axes, shape, dtype)


def abstract_session(model: Model, slots: int, capacity: int, *, stacked: bool = True) -> dict:
    """Shapes, dtypes and shardings of a session of `slots` rows of at most `capacity` tokens."""
    config = model.config
    return {
        "state": abstract_state(config, model.sharding, slots, capacity, stacked=stacked),
        "hidden": _array(model, "S D", (slots, config.hidden_size), config.dtype),
        "token": _array(model, "S", (slots,), jnp.int32),
        "step": _array(model, "S", (slots,), jnp.int32),
        "seen": _array(model, "S V", (slots, config.vocab_size), jnp.uint8),
        "done": _array(model, "S", (slots,), jnp.bool_),
    }


def abstract_controls(model: Model, slots: int) -> dict:
    """What the host says about each row: sampling parameters, the most tokens, end tokens (padded with -1), rows to stop."""
    controls = {name: _array(model, "S", (slots,), dtype) for name, dtype in CONTROL_DTYPES.items()}
    controls["max_new_tokens"] = _array(model, "S", (slots,), jnp.int32)
    controls["end_tokens"] = _array(model, "S X", (slots, MAX_END_TOKENS), jnp.int32)
    controls["stop"] = _array(model, "S", (slots,), jnp.bool_)
    return controls


def make_empty(model: Model, slots: int, capacity: int, *, stacked: bool = True) -> Program:
    """() -> a session whose slots are all free."""
    session = abstract_session(model, slots, capacity, stacked=stacked)
    return make_program(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), session), (), session, None)


def abstract_visual(model: Model, rows: int, length: int) -> dict:
    """What a step is told about images and videos in its tokens: their rows, where these go, all tokens' M-RoPE positions, and
    what added to the index of a later token is its position."""
    return {
        "rows": _array(model, "B T D", (rows, length, model.config.hidden_size), model.config.dtype),
        "mask": _array(model, "B T", (rows, length), jnp.bool_),
        "positions": _array(model, "X B T", (3, rows, length), jnp.int32),
        "offset": _array(model, "B", (rows,), jnp.int32),
    }


def make_prefill(
    model: Model, slots: int, rows: int, length: int, capacity: int, *, stacked: bool = True, vision: bool = False
) -> Program:
    """(params, session, tokens [B, length], count [B], slot_ids [B]) -> session after the next `count` tokens of each row.

    Slot ids count within the device's own share of the slots (S and B are cut alike) and differ from each other; rows with
    count 0 leave their slot as it is. A prompt longer than `length` comes in several calls, which may cut through an image. With
    `vision` there is one more argument, see `abstract_visual`.

    With context parallelism `length` is cut over the data shards, and all prefills of a session have the same one: each begins at
    a multiple of it, and `capacity` is a multiple of it.
    """
    session = abstract_session(model, slots, capacity, stacked=stacked)
    sharding = model.sharding

    def prefill(params, session, tokens, count, slot_ids, visual=None):
        state = session["state"]
        start, offset = (take_slots(sharding, state[name], slot_ids) for name in ("length", "rotary_offset"))
        column = jnp.arange(length)[None, :]
        real = column < count[:, None]
        positions, seen = (start + offset)[:, None] + column, None
        if visual is not None:
            positions, seen = visual["positions"], VisionRows(visual["rows"], visual["mask"])
            offset = jnp.where(count > 0, visual["offset"], offset)
            state = state | {"rotary_offset": put_slots(sharding, state["rotary_offset"], slot_ids, offset)}
        inputs = model.inputs(positions, real.astype(jnp.int32), start=start, slots=slot_ids, chunk=length)
        hidden, state = model.hidden(params, tokens, inputs, state, seen)
        last = take_token(sharding, hidden, jnp.maximum(count - 1, 0))
        last = jnp.where((count > 0)[:, None], last, take_slots(sharding, session["hidden"], slot_ids))
        return session | {
            "state": state | {"length": put_slots(sharding, state["length"], slot_ids, start + count)},
            "hidden": put_slots(sharding, session["hidden"], slot_ids, last),
            "seen": mark_prompt(session["seen"], tokens, real, slot_ids, sharding),
        }

    tokens = _array(model, "B T", (rows, length), jnp.int32)
    row = _array(model, "B", (rows,), jnp.int32)
    visual = (abstract_visual(model, rows, length),) if vision else ()
    return make_program(prefill, (model.abstract_params(stacked), session, tokens, row, row, *visual), session, 1)


def make_first(model: Model, slots: int, capacity: int, vocabulary: int, *, stacked: bool = True) -> Program:
    """(params, session, controls, alive [S]) -> (session, tokens [S]): each row's first token, from its prompt's last state."""
    model = model.for_one_token()
    session = abstract_session(model, slots, capacity, stacked=stacked)
    controls = abstract_controls(model, slots)

    def first(params, session, controls, alive):
        session = session | {"done": ~alive}
        session, token = _choose(model, params, session, session["hidden"][:, None], controls, vocabulary)
        return session, token

    alive = _array(model, "S", (slots,), jnp.bool_)
    results = (session, _array(model, "S", (slots,), jnp.int32))
    return make_program(first, (model.abstract_params(stacked), session, controls, alive), results, 1)


def make_decode(model: Model, slots: int, capacity: int, vocabulary: int, *, stacked: bool = True, chunk: int = 0) -> Program:
    """(params, session, controls, steps []) -> (session, tokens [S, MAX_STEPS], -1 where a row had ended).

    A loop on the device of at most `steps` tokens; it ends early when all rows have. `controls["stop"]` ends rows first. `chunk`:
    with context parallelism, the length of the session's prefills.
    """
    model = model.for_one_token()
    session = abstract_session(model, slots, capacity, stacked=stacked)
    controls = abstract_controls(model, slots)

    def decode(params, session, controls, steps):
        session = session | {"done": session["done"] | controls["stop"]}
        tokens = jnp.full((slots, MAX_STEPS), -1, jnp.int32)

        def unfinished(carry):
            i, session, _ = carry
            return (i < jnp.minimum(steps, MAX_STEPS)) & ~jnp.all(session["done"])

        def advance(carry):
            i, session, tokens = carry
            session, token = decode_one(model, params, session, controls, vocabulary, chunk)
            return i + 1, session, jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))

        _, session, tokens = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), session, tokens))
        return session, tokens

    steps = _array(model, "", (), jnp.int32)
    results = (session, _array(model, "S X", (slots, MAX_STEPS), jnp.int32))
    return make_program(decode, (model.abstract_params(stacked), session, controls, steps), results, 1)


def decode_one(
    model: Model, params: dict, session: dict, controls: dict, vocabulary: int, chunk: int = 0
) -> tuple[dict, jax.Array]:
    """Reads each live row's newest token and chooses the next: (session, tokens [S], -1 for rows that had ended)."""
    state, alive = session["state"], ~session["done"]
    start = state["length"]
    positions = (start + state["rotary_offset"])[:, None]
    inputs = model.inputs(positions, alive[:, None].astype(jnp.int32), start=start, chunk=chunk)
    hidden, state = model.hidden(params, session["token"][:, None], inputs, state)
    state = state | {"length": start + alive}
    return _choose(model, params, session | {"state": state}, hidden, controls, vocabulary)


def _choose(model: Model, params: dict, session: dict, hidden: jax.Array, controls: dict, vocabulary: int):
    """Chooses a token for each live row from hidden [S, 1, D], and notes which rows have ended by it."""
    alive = ~session["done"]
    logits = model.logits(params, hidden)[:, 0]
    token = sample(logits, session["seen"], session["step"], controls, vocabulary, model.sharding)
    token = jnp.where(alive, token, -1)
    step = session["step"] + alive
    ended = jnp.any(token[:, None] == controls["end_tokens"], axis=1) | (step >= controls["max_new_tokens"])
    session = session | {
        "token": jnp.maximum(token, 0),
        "step": step,
        "seen": mark_seen(session["seen"], token, GENERATED),
        "done": session["done"] | ended,
    }
    return session, token


def make_logits(
    model: Model, batch: int, length: int, *, stacked: bool = True, layers: bool = False, vision: bool = False
) -> Program:
    """(params, tokens [B, T], segment_ids [B, T]) -> float32 logits [B, T, V]; with `layers` also the residual stream
    [layers + 1, B, T, D]. Positions count from 0 in each segment; with `vision` one more argument has them (see
    `abstract_visual`)."""

    def logits(params, tokens, segment_ids, visual=None):
        positions, seen = segment_positions(segment_ids), None
        if visual is not None:
            positions, seen = visual["positions"], VisionRows(visual["rows"], visual["mask"])
        inputs = model.inputs(positions, segment_ids)
        hidden, _ = model.hidden(params, tokens, inputs, None, seen)
        result = model.logits(params, hidden)
        return (result, model.layer_outputs(params, tokens, inputs, seen)) if layers else result

    ids = _array(model, "B T", (batch, length), jnp.int32)
    config = model.config
    results: Any = _array(model, "B T V", (batch, length, config.vocab_size), jnp.float32)
    if layers:
        shape = (config.num_hidden_layers + 1, batch, length, config.hidden_size)
        results = results, _array(model, "U B T D", shape, config.dtype)
    visual = (abstract_visual(model, batch, length),) if vision else ()
    return make_program(logits, (model.abstract_params(stacked), ids, ids, *visual), results, None)
