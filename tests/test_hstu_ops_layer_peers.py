"""The providers over NVIDIA's and Meta's whole HSTU layers: what they hand over, and what they say of another version.

The layers themselves are never installed here; `make run` on a GPU checks their output and gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smbench_kernels import hstu, hstu_ops_layer_peers, hstu_ops_peers
from smbench_kernels.hstu import Jagged, Shape
from smbench_kernels.op import UnsupportedPoint

BATCH = Jagged(torch.tensor([0, 5, 5, 12], dtype=torch.int32), 9, torch.tensor([2, 0, 1], dtype=torch.int32))
SHAPE = Shape(embedding=24, heads=2, head_dim=16)
"""Unequal widths, so that no weight fits in the place of another."""


def inputs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    params = hstu.parameters(SHAPE, 3, torch.device("cpu"), torch.float64)
    return torch.randn(12, SHAPE.embedding, dtype=torch.float64), params


def nvidias(**given: Any) -> torch.Tensor:
    """The definition, by the names that NVIDIA's function has for its arguments."""
    assert (given["dropout_ratio"], given["training"], given["residual"], given["causal"]) == (0.0, False, True, True)
    assert given["attn_backend"] == "TRITON" and isinstance(given["seed"], int)
    assert given["scaling_seqlen"] == given["max_seqlen"]
    assert (given["recompute_input_layernorm"], given["recompute_input_silu"]) == (True, False)
    shape = Shape(given["input"].shape[1], given["num_heads"], given["attention_dim_per_head"])
    params = {
        "norm_weight": given["input_norm_weight"],
        "norm_bias": given["input_norm_bias"],
        "uvqk_weight": given["linear_uvqk_weight"],
        "uvqk_bias": given["linear_uvqk_bias"],
        "out_norm_weight": given["output_norm_weight"],
        "out_norm_bias": given["output_norm_bias"],
        "out_weight": given["linear_proj_weight"],
    }
    batch = Jagged(given["seqlen_offsets"], given["max_seqlen"], given["num_targets"])
    assert given["alpha"] == shape.alpha and given["num_contextuals"] is None
    return hstu.layer_reference(given["input"], params, batch, shape, given["ln_eps"])


def metas_first(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm to attention, by Meta's names; u has had its SiLU when it comes back, the attention is by heads."""
    assert given["recompute_uvqk_in_backward"] and given["recompute_normed_x_in_backward"]
    shape = Shape(given["x"].shape[1], given["num_heads"], given["attn_dim"], hstu.U)
    norm = (given["norm_weight"], given["norm_bias"], given["norm_eps"])
    normed = torch.nn.functional.layer_norm(given["x"], (shape.embedding,), *norm)
    u, v, q, k = hstu.activated(normed @ given["uvqk_weight"] + given["uvqk_bias"], shape)
    batch = Jagged(given["seq_offsets"], given["max_seq_len"], given["num_targets"])
    return u, hstu.attention_reference(q, k, v, batch, given["attn_alpha"])


def metas_second(**given: Any) -> torch.Tensor:
    """LayerNorm * u to the end, by Meta's names."""
    assert (given["dropout_ratio"], given["training"], given["recompute_y_in_backward"]) == (0.0, False, True)
    width = given["num_heads"] * given["linear_dim"]
    norm = (given["norm_weight"], given["norm_bias"], given["eps"])
    gated = torch.nn.functional.layer_norm(given["attn"], (width,), *norm) * given["u"]
    return torch.as_tensor(gated @ given["output_weight"] + given["x"])


def test_nvidias_layer_gets_every_tensor_by_its_name() -> None:
    x, params = inputs()
    module = SimpleNamespace(fused_hstu_op=nvidias)
    found = hstu_ops_layer_peers.nvidia_layer(module, "TRITON", SHAPE, norm=True, silu=False)(x, params, BATCH)
    torch.testing.assert_close(found, hstu.layer_reference(x, params, BATCH, SHAPE))


def test_metas_layer_gets_every_tensor_by_its_name_and_is_of_its_definition() -> None:
    x, params = inputs()
    first = SimpleNamespace(triton_hstu_preprocess_and_attention=metas_first)
    second = SimpleNamespace(triton_hstu_compute_output=metas_second)
    found = hstu_ops_layer_peers.meta_layer(first, second, SHAPE, again=True)(x, params, BATCH)
    shape = Shape(SHAPE.embedding, SHAPE.heads, SHAPE.head_dim, hstu.U)
    torch.testing.assert_close(found, hstu.layer_reference(x, params, BATCH, shape))
    assert not torch.allclose(found, hstu.layer_reference(x, params, BATCH, SHAPE))


def test_another_version_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "ops" / "fused_hstu_op.py").write_text("import a_package_of_theirs\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ops", "ops.fused_hstu_op"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UnsupportedPoint, match=r"recsys-examples is installed, but not as .*a_package_of_theirs"):
        hstu_ops_peers.triton_module(hstu_ops_layer_peers.NVIDIA, "recsys-examples", ("fused_hstu_op",))
    with pytest.raises(UnsupportedPoint, match="recsys-examples need an NVIDIA GPU"):
        hstu_ops_peers.require(hstu_ops_layer_peers.NVIDIA, "recsys-examples", torch.zeros(1))
    for name in ("ops", "ops.fused_hstu_op"):
        sys.modules.pop(name, None)
