"""Flashzoi's attention is a rotation of complex numbers, at any window; padding is not seen; its size is published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from builders import FLASHZOI, settled_borzoi
from seqgraft.adapters import LoRA
from seqgraft.adapters.base import freeze
from seqgraft.errors import ModelError
from seqgraft.models import borzoi
from seqgraft.models.base import Head, SequenceModel, State, one_hot
from seqgraft.models.borzoi import Borzoi
from seqgraft.models.stages import rotary_frequencies, rotated
from seqgraft.sequence import PAD
from seqgraft.tracks import TrackTable

DATA = Path(__file__).parent / "data"
PARITY = np.load(DATA / "borzoi_parity.npz", allow_pickle=False)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def attention(channels: int = 40, heads: int = 4, key_heads: int = 2, turned: int = 6, seed: int = 0) -> borzoi._Rotary:
    """Of 10 numbers per head, with biases that are not zero."""
    torch.manual_seed(seed)
    made = borzoi._Rotary(channels, heads, key_heads, 10, turned, 300.0, 0.1).eval()
    for layer in (made.query, made.key):
        nn.init.normal_(layer.weight, std=0.4)
    return made


# ---- the slow, obvious reference ----


def slow_attention(block: Any, x: Tensor) -> Tensor:
    """Head by head, query by query, key by key, in complex numbers of double precision."""
    layers = {name: getattr(block, name) for name in ("query", "key", "value")}
    per_head = {"query": block.heads, "key": block.key_heads, "value": block.key_heads}
    q, k, v = (
        nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).unflatten(-1, (per_head[name], -1))
        for name, layer in layers.items()
    )
    half, size = block.turned // 2, q.shape[-1]
    frequency = [block.base ** (-2 * i / block.turned) for i in range(half)]

    def turned(numbers: Tensor, position: int) -> tuple[list[complex], list[float]]:
        planes = [complex(numbers[i], numbers[i + half]) for i in range(half)]
        angles = [position * f for f in frequency]
        return (
            [plane * complex(math.cos(a), math.sin(a)) for plane, a in zip(planes, angles, strict=True)],
            numbers[2 * half :].tolist(),
        )

    out = torch.empty(*x.shape[:2], block.heads, v.shape[-1], dtype=torch.float64)
    for b in range(len(x)):
        for head in range(block.heads):
            shared = head * block.key_heads // block.heads
            queries = [turned(q[b, i, head], i) for i in range(x.shape[1])]
            keys = [turned(k[b, j, shared], j) for j in range(x.shape[1])]
            for i, (planes, rest) in enumerate(queries):
                scores = [
                    sum((p * c.conjugate()).real for p, c in zip(planes, others, strict=True))
                    + sum(a * c for a, c in zip(rest, more, strict=True))
                    for others, more in keys
                ]
                weights = (torch.tensor(scores, dtype=torch.float64) / math.sqrt(size)).softmax(0)
                out[b, i, head] = weights @ v[b, :, shared]
    return nn.functional.linear(out.flatten(2), block.output.weight.double(), block.output.bias.double()).float()


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize(("key_heads", "turned"), [(2, 6), (4, 10), (1, 2)])
def test_attention_is_the_slow_reference_at_any_window(n: int, key_heads: int, turned: int) -> None:
    block = attention(key_heads=key_heads, turned=turned)
    x = torch.randn(2, n, 40, generator=torch.Generator().manual_seed(n))
    expected = slow_attention(block, x)
    assert difference(block(x, None, (0, n)), expected) <= 1e-5
    assert difference(block(x, None, (n // 2, n)), expected[:, n // 2 :]) <= 1e-5  # some of the queries alone
    if n > 1:  # and it does depend on the positions
        assert difference(block(x.flip(1), None, (0, n)).flip(1), expected) > 1e-3


@torch.no_grad()
def test_padding_is_not_seen_and_places_do_not_matter() -> None:
    """Only distances count: what stands before a sequence moves it and changes nothing."""
    block, n = attention(), 9
    x = torch.randn(1, n, 40, generator=torch.Generator().manual_seed(1))
    alone = block(x, None, (0, n))
    for before, after in ((0, 5), (4, 0), (3, 2)):
        padded = nn.functional.pad(x, (0, 0, before, after), value=50.0)
        inside = nn.functional.pad(torch.ones(1, n, dtype=torch.bool), (before, after))
        found = block(padded, inside, (0, before + n + after))[:, before : before + n]
        assert difference(found, alone) <= 1e-5


def test_rotations_are_in_float32_whatever_they_turn() -> None:
    frequencies = rotary_frequencies(128, 20000.0)
    assert frequencies[0] == 1
    assert float(frequencies[-1]) == pytest.approx(20000.0 ** (-126 / 128))
    angles = torch.outer(torch.arange(4096.0), frequencies)
    x = torch.randn(1, 4096, 192, generator=torch.Generator().manual_seed(0))
    turned = rotated(x, angles)
    assert torch.equal(turned[..., 128:], x[..., 128:])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    half = rotated(x.bfloat16(), angles)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotated(x.bfloat16().float(), angles).bfloat16())


# ---- the trunk ----


def slow_trunk(trunk: Borzoi, codes: Tensor) -> Tensor:
    """The network as it is drawn, with the slow attention, for a whole number of its positions."""
    x, skips, crop = one_hot(codes), {}, 0

    def norm_gelu(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            t[:, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        x = (x - mean) / (variance + 1e-3).sqrt() * weight + bias
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    for name, stage in trunk.stages.items():
        kind = name.partition("_")[0]
        if kind in ("stem", "tower"):
            skips[name] = stage.conv(x if kind == "stem" else norm_gelu(stage.norm, x))
            x = skips[name].unflatten(-1, (-1, 2)).amax(-1)
        elif kind == "transformer":
            y = x.transpose(1, 2)
            y = y + slow_attention(stage.attention, stage.attention_norm(y))
            y = y + stage.down(stage.up(stage.feedforward_norm(y)).clamp(min=0))
            x = y.transpose(1, 2)
        elif kind == "upsample":
            below = stage.below(norm_gelu(stage.norm, x))
            lateral = stage.lateral(norm_gelu(stage.lateral_norm, skips[stage.skip]))
            x = stage.pointwise(stage.depthwise(below.repeat_interleave(2, dim=-1) + lateral))
        elif kind == "crop":
            crop = stage.bins
        else:
            x = stage.conv(norm_gelu(stage.norm, x[..., crop : x.shape[-1] - crop]))
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x


def two_blocks() -> Borzoi:
    return settled_borzoi(4, **FLASHZOI | {"blocks": 2}).eval()


@torch.no_grad()
@pytest.mark.parametrize("window", [7 * 32, 20 * 32])
def test_other_windows_are_those_of_the_slow_reference(window: int) -> None:
    trunk = two_blocks()
    codes = torch.randint(0, 5, (2, window), dtype=torch.uint8, generator=torch.Generator().manual_seed(window))
    assert difference(trunk(codes).x, slow_trunk(trunk, codes)) <= 1e-5


@torch.no_grad()
def test_a_padded_sequence_gives_what_it_gives_alone() -> None:
    trunk = two_blocks()
    codes = torch.randint(0, 4, (1, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = nn.functional.pad(codes, (0, 192), value=PAD)
    found = trunk(padded, torch.tensor([320])).x[..., : 320 // 16 - 4]
    assert difference(found, trunk(codes).x) <= 1e-5


@torch.no_grad()
def test_bf16() -> None:
    trunk = two_blocks()
    codes = torch.randint(0, 4, (2, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = trunk(codes).x
    assert difference(half.float(), trunk(codes).x) < 0.05


def test_dropout_of_attention_is_for_training() -> None:
    trunk = settled_borzoi(4, **FLASHZOI | {"attention_dropout": 0.5, "dropout": 0.0, "final_dropout": 0.0})
    block = trunk.stages["transformer_0"]
    state = State(torch.randn(1, 16, 20))
    assert not torch.equal(block.train()(state).x, block(state).x)
    assert torch.equal(block.eval()(state).x, block(state).x)


def test_the_published_size() -> None:
    """The peer's count of parameters, to the last one; its attention has half as many heads of keys and values."""
    with torch.device("meta"):
        trunk = Borzoi(**borzoi.FLASHZOI, crop=5120)
        state = trunk.eval().run(State(torch.empty(1, 4, 524_288)))
    assert state.x.shape == (1, 1920, 6144)
    heads = (7611 + 2608) * (1920 + 1)
    assert sum(p.numel() for p in trunk.parameters()) + heads == int(PARITY["flashzoi/parameters"])
    attention = trunk.get_submodule("stages.transformer_0.attention")
    widths = [getattr(attention, name).out_features for name in ("query", "key", "value", "output")]
    assert widths == [1536, 768, 768, 1536]
    assert len(trunk.spec.sites["attention"]) == 4 * 8
    assert len(trunk.spec.sites["attention.key"]) == 8


def test_adapters_reach_the_parts_of_the_packed_layer() -> None:
    trunk = two_blocks()
    table = TrackTable.build([{"name": "a", "link": "softplus"}])
    freeze(trunk)
    LoRA(rank=2, where=("attention.key",)).apply(SequenceModel(trunk, {"all": Head(table, trunk.spec.channels)}, table))
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all("attention.key" in name for name in trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "linear"}, "'relative' or 'rotary'"),
        ({"key_heads": 3}, "multiple of the heads of keys"),
        ({"rotary_size": 5}, "even and fit the keys"),
        ({"rotary_size": 10}, "even and fit the keys: 10. It is at most key_size, 8"),
        ({"attention": "relative"}, "as many heads of keys as of queries"),
    ],
)
def test_networks_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        settled_borzoi(**FLASHZOI | settings)
