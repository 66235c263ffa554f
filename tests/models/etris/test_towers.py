"""ETRIS's towers: transformers' and OpenAI's, whose weights they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastadapt.models.etris import CLIPResNetConfig, ETRISConfig
from fastadapt.models.etris.method import METHOD
from fastadapt.models.etris.positions import resized
from fastadapt.models.etris.resnet import CLIPResNet, conv_norm
from fastadapt.models.etris.towers import text_pieces
from tests.models import checks
from tests.tolerance import EXACT


def make(preset: str = "tiny", **changes) -> nn.Module:
    return checks.make(METHOD, preset, **changes).eval()


def through(pieces, x: Tensor) -> Tensor:
    for piece in pieces:
        x = piece(x)
    return x


@pytest.mark.parametrize("arm", ["strong", "fastadapt"])
def test_the_pieces_are_transformers_towers(arm):
    model = make(arm=arm)
    inputs, ends = checks.make_inputs(METHOD, model), (1, 2, 3)
    clip = CLIPTextModelWithProjection(model.config.text_config).double().eval()
    clip.load_state_dict(model.text.state_dict())
    expected = clip.text_model(inputs["input_ids"])
    x = through(text_pieces(model.text, ends), model.text.text_model.embeddings(inputs["input_ids"]))
    x = model.text.text_model.final_layer_norm(x)
    torch.testing.assert_close(x, expected.last_hidden_state, **EXACT)
    samples = torch.arange(2), inputs["input_ids"].argmax(-1)
    torch.testing.assert_close(x[samples], expected.pooler_output, **EXACT)
    clip = CLIPVisionModelWithProjection(model.config.vision_config).double().eval()
    clip.load_state_dict(model.vision.state_dict())
    hidden = clip.vision_model(inputs["pixel_values"]).last_hidden_state
    x = through(model.vision.pieces(ends), model.vision.start(inputs["pixel_values"]))
    torch.testing.assert_close(x, hidden, **EXACT)
    *levels, last = model.vision.maps([x, x, x])
    projected = clip.visual_projection(clip.vision_model.post_layernorm(hidden))[:, 1:]
    for found, tokens in ((levels[0], x[:, 1:]), (levels[1], x[:, 1:]), (last, projected)):
        torch.testing.assert_close(found, tokens.reshape(2, 4, 4, -1).permute(0, 3, 1, 2), **EXACT)


def test_positions_are_resized_as_transformers_resizes_them():
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=8, num_attention_heads=1, image_size=12, patch_size=4))
    embeddings = clip.vision_model.embeddings
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 26, 8), 20, 20)[0]
    torch.testing.assert_close(resized(embeddings.position_embedding.weight, (5, 5)), expected)
    assert resized(embeddings.position_embedding.weight, (3, 3)) is embeddings.position_embedding.weight


@pytest.mark.parametrize("preset", ["tiny", "tiny-resnet"])
def test_the_towers_come_from_checkpoints(preset, tmp_path):
    """A ViT's are of smaller images: their positions are resized."""
    model = make(preset)
    config = ETRISConfig.preset(preset)
    if preset == "tiny":
        config.vision_config.image_size = 32
        clip = CLIPModel(CLIPConfig(vision_config=config.vision_config, text_config=config.text_config, projection_dim=16))
        clip.save_pretrained(tmp_path / "vision"), clip.save_pretrained(tmp_path / "text")
        tower, text = clip.state_dict(), clip.state_dict()
    else:
        tower, text = CLIPResNet(config.vision_config), CLIPTextModelWithProjection(config.text_config)
        tower.save_pretrained(tmp_path / "vision"), text.save_pretrained(tmp_path / "text")
        tower, text = tower.state_dict(), text.state_dict()
    shortcut = {name: p.clone() for name, p in model.vision.named_parameters() if "connect" in name}
    model.load_towers(vision=tmp_path / "vision", text=tmp_path / "text")
    for own, loaded in ((model.vision.state_dict(), tower), (model.text.state_dict(), text)):
        for name, tensor in own.items():
            if name in shortcut:
                assert torch.equal(tensor, shortcut[name])
            elif "vision_model.embeddings.position" in name:
                torch.testing.assert_close(tensor, resized(loaded[name], (4, 4)).double(), **EXACT)
            elif "connect" not in name:  # whose statistics no checkpoint has either
                assert torch.equal(tensor, loaded[name].to(tensor)), name


class OpenAIBlock(nn.Module):
    """CLIP's block with OpenAI's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n = self.ln_1(x)
        x = x + self.attn(n, n, n, need_weights=False, attn_mask=mask)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class OpenAITransformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenAIBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


def openai_text(width: int = 32) -> nn.Module:
    clip = nn.Module()
    clip.token_embedding, clip.ln_final = nn.Embedding(64, width), nn.LayerNorm(width)
    clip.transformer = OpenAITransformer(width, 2, 3)
    clip.positional_embedding, clip.text_projection, clip.logit_scale = (
        nn.Parameter(torch.randn(shape)) for shape in ((8, width), (width, 16), ())
    )
    return clip


def openai_vit(width: int = 24) -> nn.Module:
    visual = nn.Module()
    visual.conv1 = nn.Conv2d(3, width, 16, 16, bias=False)
    visual.ln_pre, visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    visual.transformer = OpenAITransformer(width, 3, 3)
    visual.class_embedding, visual.positional_embedding, visual.proj = (
        nn.Parameter(torch.randn(shape)) for shape in ((width,), (17, width), (width, 16))
    )
    return visual


def test_a_released_vit_computes_here_what_it_does_there():
    clip = openai_text()
    clip.visual = visual = openai_vit()
    clip.double()
    model = make("tiny")
    model.load_openai(clip.state_dict())
    inputs = checks.make_inputs(METHOD, model)
    ids = inputs["input_ids"]
    x = clip.token_embedding(ids) + clip.positional_embedding[:6]
    x = clip.ln_final(clip.transformer(x, torch.full((6, 6), -torch.inf, dtype=x.dtype).triu(1)))
    sentence = x[torch.arange(2), ids.argmax(-1)] @ clip.text_projection
    own = model.text.text_model.final_layer_norm(
        through(text_pieces(model.text, (1, 2, 3)), model.text.text_model.embeddings(ids))
    )
    torch.testing.assert_close(own, x, **EXACT)
    torch.testing.assert_close(model.text.text_projection(own[torch.arange(2), ids.argmax(-1)]), sentence, **EXACT)
    x = visual.conv1(inputs["pixel_values"]).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(2, 1, -1), x], 1) + visual.positional_embedding
    x = visual.transformer(visual.ln_pre(x))
    own = through(model.vision.pieces((1, 2, 3)), model.vision.start(inputs["pixel_values"]))
    torch.testing.assert_close(own, x, **EXACT)
    found = model.vision.maps([own] * 3)[2].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, (visual.ln_post(x) @ visual.proj)[:, 1:], **EXACT)


def test_a_released_resnet_is_taken_whole():
    model = make("tiny-resnet")
    visual = make("tiny-resnet").vision.state_dict()
    released = {f"visual.{name}": tensor for name, tensor in visual.items() if "connect" not in name}
    released |= {name: tensor.double() for name, tensor in openai_text().state_dict().items()}
    own = model.vision.attnpool.connect[0].weight.clone()
    model.load_openai(released)
    assert torch.equal(model.vision.layer3[1].conv2.weight, visual["layer3.1.conv2.weight"])
    assert torch.equal(model.vision.attnpool.connect[0].weight, own)
    assert torch.equal(model.text.text_projection.weight, released["text_projection"].T)
    with pytest.raises(ValueError, match=r"vision\.bn3\.bias: expected a tensor in state_dict, got none"):
        model.load_openai({name: tensor for name, tensor in released.items() if name != "visual.bn3.bias"})
    with pytest.raises(ValueError, match=r"vision\.bn3\.bias: expected shape \(8,\), got shape \(2,\)"):
        model.load_openai({**released, "visual.bn3.bias": torch.zeros(2)})


def test_the_resnets_have_the_released_names_and_counts():
    for changes, count in (({}, 38_316_896), ({"layers": (3, 4, 23, 3), "projection_dim": 512}, 56_259_936)):
        with torch.device("meta"):
            names = dict(CLIPResNet(CLIPResNetConfig(**changes)).named_parameters())
        assert sum(p.numel() for name, p in names.items() if "connect" not in name) == count
    expected = {"conv3.weight", "bn3.bias", "layer1.0.downsample.0.weight", "layer4.2.bn2.weight", "layer2.0.downsample.1.bias"}
    assert expected | {f"attnpool.{part}_proj.bias" for part in "qkvc"} | {"attnpool.positional_embedding"} < names.keys()


@pytest.mark.parametrize("folded", [False, True])
def test_the_resnet_is_its_composition(folded):
    model = make("tiny-resnet", arm="strong" if folded else "release")
    net, x = model.vision, checks.make_inputs(METHOD, model)["pixel_values"]
    assert (net.conv_norm is conv_norm) != folded
    y = x
    for index, stride in ((1, 2), (2, 1), (3, 1)):
        conv, norm = getattr(net, f"conv{index}"), getattr(net, f"bn{index}")
        y = norm(F.conv2d(y, conv.weight, stride=stride, padding=1)).relu()
    y = F.avg_pool2d(y, 2)
    for stage in range(1, 5):
        for index, block in enumerate(getattr(net, f"layer{stage}")):
            pool = nn.AvgPool2d(2 if stage > 1 and index == 0 else 1)
            z = block.bn1(F.conv2d(y, block.conv1.weight)).relu()
            z = pool(block.bn2(F.conv2d(z, block.conv2.weight, padding=1)).relu())
            z = block.bn3(F.conv2d(z, block.conv3.weight))
            y = (z + (y if block.downsample is None else block.downsample(pool(y)))).relu()
    assert y.shape == (2, 256, 2, 2)
    pool = net.attnpool
    tokens = y.flatten(2).permute(2, 0, 1)
    grid = pool.positional_embedding[1:].reshape(3, 3, -1).permute(2, 0, 1)[None]
    tokens = tokens + F.interpolate(grid, (2, 2), mode="bicubic", align_corners=False)[0].flatten(1).T[:, None]
    biases = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    attended, _ = F.multi_head_attention_forward(
        tokens, tokens, tokens, 256, 4, None, biases, None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight, training=False,
    )  # fmt: skip
    expected = (attended.permute(1, 2, 0).reshape(2, 16, 2, 2) + pool.connect(y)).relu()
    torch.testing.assert_close(net(x), expected, **EXACT)
