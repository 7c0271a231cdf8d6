"""The name map: complete, of the published shapes, and its own inverse."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen35_jax.checkpoint.names import BLOCK, block_rows, parameter_views, scale_shape, tensor_parts, vision_shapes
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model
from qwen35_jax.ops.fp8 import Fp8Weight
from qwen35_jax.sharding import Sharding, make_mesh
from tests.checkpoint.synthetic import canonical_tensors, hf_config

SHAPES = Path(__file__).parents[3] / "shared" / "spec" / "golden" / "tensor_shapes_by_size.json"


@pytest.mark.skipif(not SHAPES.exists(), reason="the reference shapes are not beside the repository")
def test_names_and_shapes_are_the_published_ones():
    for size, shapes in json.loads(SHAPES.read_text()).items():
        config = ModelConfig.preset(size.lower())
        mine = {name: list(parts[0][1].tensor_shape) for name, parts in tensor_parts(config).items()}
        mine |= {name: list(shape) for name, shape in vision_shapes(config).items()}
        assert mine == shapes, size


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_the_model_has_a_view(preset):
    config = ModelConfig.preset(preset)
    for fp8 in (False, True):
        abstract = Model(config.replace(fp8_weights=fp8), Sharding(make_mesh("1x1"))).abstract_params(stacked=False)
        leaves, _ = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=lambda x: isinstance(x, Fp8Weight))
        shapes = {tuple(getattr(k, "key", getattr(k, "idx", None)) for k in keys): leaf for keys, leaf in leaves}
        views = parameter_views(config, mtp=bool(config.mtp_num_hidden_layers))
        assert views.keys() == shapes.keys()
        for path, leaf in shapes.items():
            kept = isinstance(leaf, Fp8Weight)
            assert kept == (fp8 and views[path].fp8), path
            assert views[path].shape == (leaf.values if kept else leaf).shape, path
            assert not kept or views[path].scales().shape == leaf.scales.shape, path


@pytest.mark.parametrize("moe", [False, True])
def test_put_undoes_take(moe):
    config = hf_config(moe=moe)
    tensors = canonical_tensors(config)
    for name, parts in tensor_parts(ModelConfig.from_hf(config)).items():
        rebuilt = np.zeros_like(tensors[name])
        for _, view in parts:
            parameter = view.take(tensors[name])
            assert parameter.shape == view.shape
            view.put(rebuilt, parameter)
        np.testing.assert_array_equal(rebuilt, tensors[name])


def test_views_follow_the_mathematics():
    """The order of heads, gates and halves, against the definitions of the published layout."""
    config = hf_config(moe=True)
    c, tensors = ModelConfig.from_hf(config), canonical_tensors(config)
    views = parameter_views(c)
    x = np.random.default_rng(1).normal(size=c.hidden_size).astype(np.float32)
    base = "model.language_model.layers."

    def take(*path):
        view = views[("units", 0, "layers", *path)]
        return view.take(tensors[view.name]).astype(np.float32)

    qg = (tensors[base + "1.self_attn.q_proj.weight"].astype(np.float32) @ x).reshape(c.num_attention_heads, -1)
    query, gate = np.split(qg, 2, axis=-1)  # per head: the query, then the gate
    ours = np.einsum("d,dngh->gnh", x, take("1", "mixer", "q_gate"))
    np.testing.assert_allclose(ours, np.stack([query, gate]), rtol=1e-5, atol=1e-5)

    qkv = tensors[base + "0.linear_attn.in_proj_qkv.weight"].astype(np.float32) @ x
    width = c.linear_num_key_heads * c.linear_key_head_dim
    for part, rows in (("q", slice(0, width)), ("k", slice(width, 2 * width)), ("v", slice(2 * width, None))):
        ours = np.einsum("d,dnh->nh", x, take("0", "mixer", part)).reshape(-1)
        np.testing.assert_allclose(ours, qkv[rows], rtol=1e-5, atol=1e-5)
        conv = tensors[base + "0.linear_attn.conv1d.weight"].astype(np.float32)[rows, 0]
        np.testing.assert_array_equal(take("0", "mixer", f"conv_{part}").reshape(-1, 4), conv)

    expert = tensors[base + "0.mlp.experts.gate_up_proj"].astype(np.float32)
    halves = [np.einsum("d,edf->ef", x, take("0", "mlp", "experts", half)) for half in ("gate", "up")]
    ours = np.concatenate(halves, axis=1)
    np.testing.assert_allclose(ours, expert @ x, rtol=1e-5, atol=1e-5)  # rows of the gate first

    view = views[("mtp", "fc")]
    both = np.random.default_rng(2).normal(size=2 * c.hidden_size).astype(np.float32)  # embedding first, then hidden
    ours = np.einsum("gd,gdo->o", both.reshape(2, -1), view.take(tensors[view.name]).astype(np.float32))
    np.testing.assert_allclose(ours, tensors["mtp.fc.weight"].astype(np.float32) @ both, rtol=1e-5, atol=1e-5)


def test_blocks_of_stacked_halves():
    assert scale_shape((4, 2 * 200, 300), 2) == (4, 4, 3)
    rows = block_rows(2 * 200, 2)
    assert rows[:BLOCK].tolist() == [0] * BLOCK and rows[199] == 1 and rows[200] == 2 and rows[399] == 3


def test_heads_across_blocks_cannot_be_kept_in_fp8():
    views = parameter_views(ModelConfig.from_hf(hf_config(linear_head_dim=24)))
    with pytest.raises(UserError, match="load it dequantised"):
        views[("units", 0, "layers", "0", "mixer", "q")].scales()
