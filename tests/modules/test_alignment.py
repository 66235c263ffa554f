"""HierarchicalAlignment against a plain composition of torch's modules, with attention to one key."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.memory import saved_bytes
from fastadapt import HierarchicalAlignment
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast
from tests.tolerance import EXACT, no_worse_than

B, H, W, DS, WIDTH = 2, 6, 4, 10, 8
VIT = {"in_channels": (6, 6, 4), "strides": (1, 1, 1)}
RESNET = {"in_channels": (6, 4, 10), "strides": (2, 1, 2)}
DOUBLE = torch.float64

# the arguments, and the parameters as released (methods' table) and without the gates' dead queries and keys
BACKBONES = {
    "ViT-B/16": ({}, 9_983_488, 8_407_552),
    "ResNet-50": ({"in_channels": (512, 1024, 1024), "strides": (2, 1, 2), "sentence_dim": 1024}, 12_867_072, 11_291_136),
    "ResNet-101": ({"in_channels": (512, 1024, 512), "strides": (2, 1, 2)}, 11_556_352, 9_980_416),
}


class PlainNeck(nn.Module):
    """The neck as the paper writes it: attention with one key, coordinates appended."""

    def __init__(self, in_channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        kinds = nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d
        zipped = zip(kinds, in_channels, strides)
        self.projections = nn.ModuleList(self.block(kind(c, WIDTH, s, s, bias=False)) for kind, c, s in zipped)
        self.sentence_proj = nn.Linear(DS, WIDTH)
        self.gates = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))
        self.aggregation = self.block(nn.Conv2d(3 * WIDTH, WIDTH, 1, bias=False))
        self.coordinate_conv = self.block(nn.Conv2d(WIDTH + 2, WIDTH, 3, padding=1, bias=False))
        self.output_conv = self.block(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False))

    @staticmethod
    def block(convolution: nn.Module) -> nn.Sequential:
        return nn.Sequential(convolution, nn.BatchNorm2d(WIDTH), nn.ReLU())

    def forward(self, features: list[torch.Tensor], sentence: torch.Tensor) -> torch.Tensor:
        key, gated = self.sentence_proj(sentence)[:, None], []
        for feature, projection, attention in zip(features, self.projections, self.gates):
            level = projection(feature)
            query = level.flatten(2).transpose(1, 2)
            gated.append(level * attention(query, key, key)[0].transpose(1, 2).view_as(level))
        y = self.aggregation(torch.cat(gated, 1))
        columns = torch.tensor([[-1 + 2 * j / (W - 1) for j in range(W)] for _ in range(H)], dtype=y.dtype)
        rows = torch.tensor([[-1 + 2 * i / (H - 1)] * W for i in range(H)], dtype=y.dtype)
        place = torch.stack([columns, rows]).expand(B, 2, H, W)
        return self.output_conv(self.coordinate_conv(torch.cat([y, place], 1)))


def necks(config: dict) -> tuple[HierarchicalAlignment, PlainNeck]:
    plain = randomise(PlainNeck(**config))
    neck = HierarchicalAlignment(**config, sentence_dim=DS, width=WIDTH, dtype=DOUBLE)
    neck.load_state_dict(plain.state_dict())
    return neck, plain


def features(config: dict, dtype: torch.dtype = DOUBLE) -> list[torch.Tensor]:
    first, _, last = config["strides"]
    sizes = (H * first, W * first), (H, W), (H // last, W // last)
    shapes = [(B, c, *size) for c, size in zip(config["in_channels"], sizes)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (*shapes, (B, DS))]


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_neck_is_attention_with_one_key(config):
    neck, plain = necks(config)
    *levels, sentence = inputs = features(config)
    got, expected = neck(levels, sentence), plain(levels, sentence)
    torch.testing.assert_close(got, expected, **EXACT)
    grad = torch.randn_like(expected)
    wanted = dict(plain.named_parameters())
    expected = torch.autograd.grad(expected, [*inputs, *wanted.values()], grad)
    theirs = dict(zip(wanted, expected[len(inputs) :]))
    for i in range(3):
        for kind in ("weight", "bias"):
            query, key, value = theirs.pop(f"gates.{i}.in_proj_{kind}").chunk(3)
            assert query.abs().max() < 1e-12 and key.abs().max() < 1e-12 and value.abs().max() > 1e-3
            theirs[f"gates.{i}.v_proj.{kind}"] = value
    mine = dict(neck.named_parameters())
    got = torch.autograd.grad(got, [*inputs, *mine.values()], grad)
    torch.testing.assert_close(got[: len(inputs)], expected[: len(inputs)], **EXACT)
    torch.testing.assert_close(dict(zip(mine, got[len(inputs) :])), theirs, **EXACT)


def test_neck_normalises_like_torch_over_steps_and_in_eval():
    neck, plain = necks(VIT)
    for _ in range(3):
        *levels, sentence = features(VIT)
        for module in (neck, plain):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
            module(levels, sentence).square().mean().backward()
            optimizer.step()
            module.zero_grad()
    running = {name: buffer for name, buffer in plain.named_buffers() if "running_var" in name}
    assert len(running) == 6 and all((buffer != 1).all() for buffer in running.values())
    torch.testing.assert_close(dict(neck.named_buffers()), dict(plain.named_buffers()), **EXACT)
    neck.eval(), plain.eval()
    torch.testing.assert_close(neck(levels, sentence), plain(levels, sentence), **EXACT)


def separate(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A packed state dict with the projections apart."""
    parts = {}
    for name, value in state.items():
        prefix, packed, kind = name.rpartition("in_proj_")
        names = [f"{prefix}{which}_proj.{kind}" for which in "qkv"] if packed else [name]
        parts |= zip(names, value.chunk(3) if packed else [value])
    return parts


@pytest.mark.parametrize("form", [dict, separate])
def test_released_weights_load_strictly(form):
    _, plain = necks(VIT)
    neck, state = HierarchicalAlignment(**VIT, sentence_dim=DS, width=WIDTH, dtype=DOUBLE), form(plain.state_dict())
    before = dict(state)
    neck.load_state_dict(state)
    assert state.keys() == before.keys()
    *levels, sentence = features(VIT)
    torch.testing.assert_close(neck(levels, sentence), plain(levels, sentence), **EXACT)


def test_other_keys_and_shapes_are_still_refused():
    neck, plain = necks(VIT)
    state = plain.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gates\.0\.other_proj"):
        neck.load_state_dict(state | {"gates.0.other_proj": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for gates\.1\.v_proj\.weight"):
        neck.load_state_dict(state | {"gates.1.in_proj_weight": torch.zeros(3 * WIDTH, WIDTH + 1)})
    del state["gates.2.in_proj_bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gates\.2\.v_proj\.bias"):
        neck.load_state_dict(state)


def test_gates_start_as_attention_does():
    gate, bound = HierarchicalAlignment(width=256, device="cpu", in_channels=(1, 1, 1)).gates[0], (6 / (4 * 256)) ** 0.5
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(256, 8)
    for weight in (gate.v_proj.weight, attention.in_proj_weight):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not gate.v_proj.bias.any() and not gate.out_proj.bias.any()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_neck_has_the_parameters_of_the_methods_table(backbone):
    config, released, effective = BACKBONES[backbone]
    neck = HierarchicalAlignment(**config, device="meta")
    assert sum(parameter.numel() for parameter in neck.parameters()) == effective
    assert neck.released_parameters == released


def test_neck_keeps_fifteen_maps_at_full_size():
    neck = HierarchicalAlignment(device="meta")
    maps = [torch.empty(1, channels, 26, 26, device="meta") for channels in (768, 768, 512)]
    sentence = torch.empty(1, 512, device="meta")
    result = []
    kept = saved_bytes(
        lambda: result.append(neck(maps, sentence)), [*neck.parameters(), *neck.buffers(), *maps, sentence]
    )
    assert result[0].shape == (1, 512, 26, 26)
    # three before and after ReLU and gated, three more before and after ReLU; what the gates and the norms keep is small
    assert 15 * 512 * 26 * 26 * 4 <= kept < 15.1 * 512 * 26 * 26 * 4


def test_coordinates_are_made_once():
    neck, _ = necks(VIT)
    *levels, sentence = features(VIT)
    table, made = neck.coordinate_conv[0].coordinates, []
    make = table.make
    table.make = lambda *size: made.append(size) or make(*size)
    for _ in range(3):
        neck(levels, sentence)
    assert made == [(H, W, DOUBLE, torch.device("cpu"))]


@pytest.mark.parametrize("check", [round_trips, compiles, runs_under_autocast])
def test_it_stands_what_every_module_does(check):
    check(necks(VIT)[0], features(VIT), lambda module, inputs: module(inputs[:3], inputs[3]))


def test_neck_in_bfloat16_is_no_worse_than_attention():
    neck, plain = necks(VIT)
    *levels, sentence = features(VIT, torch.bfloat16)
    exact = plain(*([x.double() for x in levels], sentence.double()))
    results = {}
    for name, module in (("ours", neck), ("eager", plain)):
        results[name] = {"y": module.to(torch.bfloat16)(levels, sentence).detach()}
    no_worse_than(results["ours"], results["eager"], {"y": exact})


def neck(**config) -> HierarchicalAlignment:
    return HierarchicalAlignment(**VIT | config, sentence_dim=DS, width=WIDTH)


MAPS = [torch.zeros(B, channels, H, W) for channels in VIT["in_channels"]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: neck(in_channels=(1, 2)), r"in_channels: expected three positive integers, got \(1, 2\)"),
        (lambda: neck(strides=(1, 0, 1)), "strides: expected three positive integers"),
        (lambda: neck()(MAPS[:2], torch.zeros(B, DS)), "features: expected three tensors, got 2"),
        (lambda: neck()(MAPS[::-1], torch.zeros(B, DS)), r"features\[0\]: expected shape \(2, 6, any, any\)"),
        (lambda: neck()(MAPS, torch.zeros(B, DS + 1)), r"sentence: expected shape \(2, 10\), got shape \(2, 11\)"),
        (lambda: neck(strides=(2, 1, 1))(MAPS, torch.zeros(B, DS)), "features: expected three levels of one size"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
