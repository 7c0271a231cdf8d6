"""Loading: every layout, tree form, mesh and dtype gives the parameters that the name map defines, bit for bit."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from qwen35_jax.checkpoint import CanonicalSource, load_params, load_vision_params, open_source, source_has_mtp
from qwen35_jax.checkpoint import assemble as assemble_module
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.checkpoint.names import halves, parameter_views, scale_name, vision_views
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.ops.fp8 import Fp8Weight
from qwen35_jax.sharding import Sharding, make_mesh
from tests.checkpoint.synthetic import BF16, FP8, canonical_tensors, hf_config, per_expert, renamed, write


def _load(path, config: dict, mesh="1x1", stacked=False, dtype="bfloat16", mtp=True, fp8=False):
    c = ModelConfig.from_hf(config).replace(dtype=dtype, fp8_weights=fp8)
    c = c if mtp else c.replace(mtp_num_hidden_layers=0)
    abstract = Model(c, Sharding(make_mesh(mesh))).abstract_params(stacked)
    params = load_params(open_source(str(path)), c, abstract)
    assert jax.tree.all(jax.tree.map(lambda a, x: a.sharding == x.sharding and a.dtype == x.dtype, abstract, params))
    return c, params


def _leaf(params: dict, path: tuple, stacked: bool):
    unit, x = None, params
    for key in path:
        if stacked and isinstance(key, int):
            unit = key
        else:
            x = x[key]
    return x if unit is None else jax.tree.map(lambda leaf: leaf[unit], x)


def _dequantised(tensors: dict, name: str) -> np.ndarray:
    """fp8 x scale in float32, by np.repeat: the slow obvious way."""
    values, scales = tensors[name].astype(np.float32), tensors[scale_name(name)].astype(np.float32)
    parts = []
    for v, s in zip(np.split(values, halves(name), axis=-2), np.split(scales, halves(name), axis=-2), strict=True):
        s = np.repeat(np.repeat(s, 128, axis=-2), 128, axis=-1)
        parts.append(v * s[..., : v.shape[-2], : v.shape[-1]])
    return np.concatenate(parts, axis=-2)


def _check(c: ModelConfig, params: dict, tensors: dict, stacked: bool):
    views = parameter_views(c, mtp=bool(c.mtp_num_hidden_layers))
    for path, view in views.items():
        leaf = _leaf(params, path, stacked)
        if isinstance(leaf, Fp8Weight):
            scales = view.scales()
            np.testing.assert_array_equal(np.asarray(leaf.scales), scales.take(tensors[scales.name]), str(path))
            want, leaf = view.take(tensors[view.name]), leaf.values
        elif tensors[view.name].dtype == FP8:
            want = view.take(_dequantised(tensors, view.name)).astype(leaf.dtype)
        else:
            want = view.take(tensors[view.name]).astype(leaf.dtype)
        assert np.asarray(leaf).tobytes() == np.ascontiguousarray(want).tobytes(), path


LAYOUTS = [
    # moe, per expert (names that contain), prefixes, shards
    (False, None, "published", 1),
    (False, None, "text", 3),
    (True, None, "published", 2),
    (True, "", "old", 3),
    (True, "mtp.", "published", 1),
]


@pytest.mark.parametrize("moe,experts,style,shards", LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True])
def test_layouts(tmp_path, moe, experts, style, shards, stacked):
    config = hf_config(moe=moe, tied=style == "text")
    tensors = canonical_tensors(config)
    stored = tensors if experts is None else per_expert(tensors, experts)
    path = write(tmp_path / "hf", config, renamed(stored, style), shards)
    for dtype in ("bfloat16", "float32"):
        _check(*_load(path, config, "1x1", stacked, dtype), tensors, stacked)


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4", "1x8", "2x2x2"])
def test_meshes(tmp_path, mesh):
    config = hf_config(moe=True, experts=8)
    tensors = canonical_tensors(config)
    path = write(tmp_path / "hf", config, per_expert(tensors))
    for stacked in (False, True):
        _check(*_load(path, config, mesh, stacked), tensors, stacked)


def test_inner_axes_are_cut(tmp_path):
    """Experts over `data` and their width over `model`: a slice through the middle of gate and up."""
    config = hf_config(moe=True, experts=2)
    tensors = canonical_tensors(config, fp8=True)
    path = write(tmp_path / "hf", config, per_expert(tensors))
    _check(*_load(path, config, "2x4", True, "float32"), tensors, True)


@pytest.mark.parametrize("mesh", ["1x1", "2x2", "1x8"])
def test_vision_tower(tmp_path, mesh):
    """From both kinds of directory, under either prefix, in one tree with an axis of depth."""
    config = hf_config()
    tensors = canonical_tensors(config)
    path = write(tmp_path / "hf", config, renamed(tensors, "old"))
    convert(str(path), str(tmp_path / "orbax"), progress=False)
    c = ModelConfig.from_hf(config).replace(dtype="float32")
    abstract = VisionModel(c, Sharding(make_mesh(mesh))).abstract_params()
    for directory in (path, tmp_path / "orbax"):
        params = load_vision_params(open_source(str(directory)), c, abstract)
        assert jax.tree.all(jax.tree.map(lambda a, x: a.sharding == x.sharding and a.dtype == x.dtype, abstract, params))
        for place, view in vision_views(c).items():
            leaf, want = _leaf(params, place, True), view.take(tensors[view.name])
            np.testing.assert_array_equal(np.asarray(leaf), want.astype(np.float32), str(place))


def test_a_vision_tower_that_is_not_there(tmp_path):
    config = hf_config()
    path = write(tmp_path / "hf", config, canonical_tensors(config, vision=False))
    c = ModelConfig.from_hf(config)
    with pytest.raises(UserError, match="holds no vision tower"):
        load_vision_params(open_source(str(path)), c, VisionModel(c, Sharding(make_mesh("1x1"))).abstract_params())


@pytest.mark.parametrize("moe", [False, True])
def test_fp8_is_dequantised_exactly(tmp_path, moe):
    """Widths that are no multiples of the blocks, and heads that straddle them."""
    config = hf_config(moe=moe, hidden=160, ffn=200, head_dim=24, linear_head_dim=24)
    tensors = canonical_tensors(config, fp8=True)
    path = write(tmp_path / "hf", config, per_expert(tensors), shards=2)
    for dtype in ("bfloat16", "float32"):
        _check(*_load(path, config, "1x2", False, dtype), tensors, False)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
@pytest.mark.parametrize("heads", [128, 32])
def test_fp8_is_kept(tmp_path, moe, mesh, heads):
    """Heads of a block, and four that share the scale of one, parts that begin within a block included."""
    config = hf_config(moe=moe, hidden=160, ffn=256, head_dim=heads, linear_head_dim=heads)
    tensors = canonical_tensors(config, fp8=True)
    path = write(tmp_path / "hf", config, per_expert(tensors))
    for stacked in (False, True):
        _check(*_load(path, config, mesh, stacked, fp8=True), tensors, stacked)


def test_keeping_fp8_of_a_bf16_checkpoint_is_refused(tmp_path):
    config = hf_config(head_dim=128, linear_head_dim=128)
    path = write(tmp_path / "hf", config, canonical_tensors(config))
    with pytest.raises(UserError, match="is BF16, so it cannot be kept in FP8"):
        _load(path, config, fp8=True)


def test_small_blocks(tmp_path, monkeypatch):
    """Tensors larger than what is worked on at once: cut anywhere, from both kinds of directory."""
    monkeypatch.setattr(assemble_module, "BLOCK_BYTES", 1000)
    config = hf_config(moe=True)
    tensors = canonical_tensors(config, fp8=True)
    path = write(tmp_path / "hf", config, per_expert(tensors))
    convert(str(path), str(tmp_path / "orbax"), progress=False)
    for source in (path, tmp_path / "orbax"):
        _check(*_load(source, config, "1x2", True), tensors, True)


def test_without_mtp_and_vision(tmp_path):
    config = hf_config()
    tensors = canonical_tensors(config, mtp=False, vision=False)
    path = write(tmp_path / "hf", config, tensors)
    assert not source_has_mtp(CanonicalSource(open_source(str(path)), ModelConfig.from_hf(config)))
    c, params = _load(path, config, mtp=False)
    _check(c, params, tensors, False)
    with pytest.raises(UserError, match="missing: mtp.fc.weight"):
        _load(path, config)


def test_mtp_that_nobody_asks_for_is_accounted_for(tmp_path):
    config = hf_config(moe=True)
    tensors = canonical_tensors(config)
    path = write(tmp_path / "hf", config, per_expert(tensors))
    assert source_has_mtp(CanonicalSource(open_source(str(path)), ModelConfig.from_hf(config)))
    _check(*_load(path, config, mtp=False), tensors, False)
    del tensors["mtp.norm.weight"]
    path = write(tmp_path / "cut", config, tensors)
    with pytest.raises(UserError, match="1 missing: mtp.norm.weight"):
        _load(path, config, mtp=False)


def test_equal_shards_share_memory(tmp_path):
    """On CPU, what is read is the array: replicas of a weight cost nothing."""
    config = hf_config()
    path = write(tmp_path / "hf", config, canonical_tensors(config))
    _, params = _load(path, config, "8x1", True)
    for leaf in jax.tree.leaves(params):
        assert len({s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}) == 1


def _broken(tensors: dict, config: dict):
    layer = "model.language_model.layers.0."
    del tensors[layer + "mlp.experts.1.up_proj.weight"]
    del tensors[layer + "input_layernorm.weight"]
    tensors["lora_A.weight"] = np.zeros(3, BF16)
    tensors["model.visual.surplus"] = np.zeros(3, BF16)
    tensors[layer + "linear_attn.A_log"] = np.zeros(5, np.float32)
    tensors[layer + "linear_attn.dt_bias"] = np.zeros(4, np.int32)
    tensors["model.language_model.norm.weight"] = tensors["model.language_model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors[layer + "mlp.gate.weight_scale_inv"] = np.zeros((1, 1), BF16)


def test_one_error_lists_everything(tmp_path):
    config = hf_config(moe=True)
    tensors = per_expert(canonical_tensors(config))
    _broken(tensors, config)
    path = write(tmp_path / "hf", config, tensors)
    with pytest.raises(UserError) as error:
        _load(path, config)
    text = str(error.value)
    layer = "model.language_model.layers.0."
    for piece in (
        f"2 missing: {layer}mlp.experts.1.up_proj.weight, {layer}input_layernorm.weight",
        "3 unexpected: ",
        "lora_A.weight",
        "model.visual.surplus",
        f"{layer}mlp.gate.weight_scale_inv",
        "3 wrong: ",
        f"{layer}linear_attn.A_log has shape [5] instead of [4]",
        f"{layer}linear_attn.dt_bias has dtype I32 instead of BF16, F16 or F32",
        "model.language_model.norm.weight has dtype F8_E4M3 instead of BF16",
    ):
        assert piece in text
    assert "\n" not in text


def test_a_long_list_is_cut(tmp_path):
    config = hf_config(layers=16)
    path = write(tmp_path / "hf", config, {"model.language_model.norm.weight": np.zeros(48, BF16)})
    with pytest.raises(UserError, match=r"\d+ missing: .* and \d+ more") as error:
        _load(path, config, mtp=False)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("case", ["scales missing", "scales wrong", "expert differs", "both layouts", "two prefixes"])
def test_layout_mistakes(tmp_path, case):
    config = hf_config(moe=True)
    tensors = per_expert(canonical_tensors(config, fp8=True))
    name = "model.language_model.layers.0.linear_attn.out_proj.weight"
    expert = "model.language_model.layers.1.mlp.experts.2.gate_proj.weight"
    if case == "scales missing":
        del tensors[name + "_scale_inv"]
    elif case == "scales wrong":
        tensors[name + "_scale_inv"] = np.ones((3, 3), BF16)
    elif case == "expert differs":
        tensors[expert] = tensors[expert].astype(BF16)
    elif case == "both layouts":
        tensors["model.language_model.layers.1.mlp.experts.down_proj"] = np.zeros((4, 48, 72), FP8)
    else:
        tensors["language_model.model.norm.weight"] = tensors["model.language_model.norm.weight"]
    path = write(tmp_path / "hf", config, tensors)
    messages = {
        "scales missing": "1 missing: .*out_proj.weight_scale_inv",
        "scales wrong": r"out_proj.weight_scale_inv has shape \[3, 3\] instead of \[1, 1\]",
        "expert differs": "differs from the other experts",
        "both layouts": "both fused and per expert",
        "two prefixes": "twice, under different prefixes",
    }
    with pytest.raises(UserError, match=messages[case]):
        _load(path, config)
