"""Gradients of the training loss, computed in fp32, against torch autograd through transformers: dense and mixture of experts.

transformers computes in float64 here, since a difference of two fp32 results says nothing about either. "dense" and "moe" of
`hf_models`, of eight layers, are not among the cases: their gradients are not determined to 1e-4 in fp32, and transformers'
own fp32 ones are farther off than that on "moe". "dense_deep" and "moe_deep" are the same layers behind a larger embedding.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import jax  # noqa: E402
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func  # noqa: E402

from qwen35_jax.checkpoint import CanonicalSource, load_params, open_source  # noqa: E402
from qwen35_jax.checkpoint.canonical import canonical_name  # noqa: E402
from qwen35_jax.checkpoint.names import parameter_views  # noqa: E402
from qwen35_jax.config import ModelConfig  # noqa: E402
from qwen35_jax.model import Model  # noqa: E402
from qwen35_jax.sharding import Sharding, make_mesh  # noqa: E402
from qwen35_jax.train.step import Loss  # noqa: E402
from qwen35_jax.train.weights import Weights, kept_params  # noqa: E402
from tests.oracle import hf_models  # noqa: E402

# The models are tiny: on a busy machine torch's threads would wait for each other for minutes.
torch.set_num_threads(1)

ROWS, TOKENS = 2, 150  # over two chunks of the delta rule
SEED = 18  # of the tokens: no router is nearer than 4e-4, in logits, to another choice of experts, which fp32 might make
MTP, BALANCE = 0.3, 0.02
# Relative error of a tensor's gradient, |ours - exact| / |exact|: what fp32 leaves.
TOLERANCE = 1e-4
CASES = ("dense_tied", "dense_ratio3", "dense_deep", "mesh_moe", "moe_deep", "moe_tied_mtp")
# The second one repeats heads, so that the gradients of the repeats are added up.
MESHES = (("mesh_moe", "2x4"), ("mesh_moe_repeat", "2x2x2"))


@functools.cache
def theirs(name: str) -> tuple[float, dict[str, np.ndarray], hf_models.Oracle, np.ndarray]:
    """transformers' loss and its gradient by canonical tensor name, in float64; the model in fp32 and the tokens."""
    case = hf_models.CASES[name]
    oracle = hf_models.build(case)
    ids = hf_models.random_tokens(case, (ROWS, TOKENS), seed=SEED)
    exact = hf_models.to_float64(oracle)
    modules = [("", exact.model)] + ([("mtp.", exact.mtp)] if exact.mtp else [])
    for _, module in modules:
        module.requires_grad_(True)
    with hf_models.double_precision():
        loss = _loss(exact, [module for _, module in modules], ids)
        loss.backward()
    gradients = {
        canonical_name(prefix + n): p.grad.numpy()
        for prefix, module in modules
        for n, p in module.named_parameters()
        if p.grad is not None
    }
    return loss.item(), gradients, oracle, ids.numpy().astype(np.int32)


def _loss(oracle: hf_models.Oracle, modules: list[torch.nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """The loss that `ours` minimises, of an oracle and its MTP layer."""
    case = oracle.case
    routed: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: routed.append(out[0]))
        for module in modules
        for n, m in module.named_modules()
        if case.experts and n.endswith("mlp.gate")
    ]
    hidden = oracle.text_model(input_ids=ids, use_cache=False).last_hidden_state
    cross = torch.nn.functional.cross_entropy
    loss = cross(oracle.model.lm_head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    groups = [tuple(routed)]
    if oracle.mtp:
        routed.clear()
        hidden = hidden[:, :-1]
        rotary = oracle.text_model.rotary_emb(hidden, torch.arange(TOKENS - 1).expand(3, ROWS, -1))
        drafted = oracle.mtp(oracle.text_model.embed_tokens(ids[:, 1:]), hidden, rotary)
        loss = loss + MTP * cross(oracle.model.lm_head(drafted[:, :-1]).flatten(0, 1), ids[:, 2:].flatten())
        groups.append(tuple(routed))
    if case.experts:
        loss = loss + BALANCE * sum(load_balancing_loss_func(g, *case.experts[:2]) for g in groups)
    for hook in hooks:
        hook.remove()
    return loss


def ours(name: str, directory, mesh: str, **options):
    """Our loss and gradients in the stacked tree."""
    _, _, oracle, ids = theirs(name)
    hf_models.save(oracle, directory)
    source = open_source(str(directory))
    config = ModelConfig.from_hf(source.config).replace(dtype="float32")
    model = Model(config, Sharding(make_mesh(mesh)))
    params = load_params(CanonicalSource(source, config), config, kept_params(model))
    rows = max(ROWS, model.sharding.batch)
    batch = {
        "tokens": np.zeros((rows, TOKENS), np.int32),
        "segment_ids": np.zeros((rows, TOKENS), np.int32),
        "loss_weights": np.zeros((rows, TOKENS), np.float32),
    }
    batch["tokens"][:ROWS], batch["segment_ids"][:ROWS], batch["loss_weights"][:ROWS, 1:] = ids, 1, 1
    loss = Loss(Weights(model), mtp=MTP, balance=BALANCE, **options)

    def total(params, batch):
        return loss.total(loss.sums(params, {}, batch), loss.totals(batch))

    value, gradients = jax.jit(jax.value_and_grad(total))(params, batch)
    return config, float(value), gradients


def check(name: str, directory, mesh: str = "1x1", **options) -> None:
    expected_loss, expected, _, _ = theirs(name)
    config, loss, gradients = ours(name, directory, mesh, **options)
    assert loss == pytest.approx(expected_loss, rel=2e-5)
    worst = {}
    for path, view in parameter_views(config, mtp=config.mtp_num_hidden_layers > 0).items():
        leaf, keys = gradients, list(path)
        unit = keys.pop(1) if keys[0] == "units" else None
        for key in keys:
            leaf = leaf[key]
        got = np.asarray(leaf if unit is None else leaf[unit], np.float64)
        want = view.take(expected[view.name]).astype(np.float64)
        worst["/".join(map(str, path))] = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12))
    name_of_worst = max(worst, key=worst.get)
    print(f"{name} {mesh} {options}: worst relative error {worst[name_of_worst]:.1e} in {name_of_worst}")
    bad = {path: f"{error:.1e}" for path, error in worst.items() if not error < TOLERANCE}
    assert not bad, bad


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, tmp_path):
    check(name, tmp_path / "model")


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_gradients_on_meshes(name, mesh, tmp_path):
    check(name, tmp_path / "model", mesh)


@pytest.mark.parametrize("options", [{"remat": "none"}, {"remat": "gated_delta"}, {"remat": "dots", "stacked": False}])
def test_gradients_of_every_form(options, tmp_path):
    check("moe_tied_mtp", tmp_path / "model", **options)
