"""trim_padding: where it cuts, where that is exact, and what it saves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from fastadapt import FusionEncoder, trim_padding
from tests.tolerance import EXACT

B, L = 3, 20


def lengths(*words: int) -> torch.Tensor:
    return torch.arange(L) >= torch.tensor(words)[:, None]


@pytest.mark.parametrize(
    ("mask", "multiple", "length"),
    [
        (lengths(3, 9, 1), 1, 9),
        (lengths(3, 9, 1), 8, 16),
        (lengths(3, 9, 1), 7, 14),
        (lengths(3, 19, 1), 8, 20),
        (lengths(0, 0, 0), 1, 1),
        (lengths(0, 0, 0), 4, 4),
        (~lengths(18, 19, 20), 1, 20),  # words at the end, as with padding on the left
    ],
)
def test_the_cut_is_after_the_last_word_of_any_row(mask, multiple, length):
    ids, states = torch.arange(B * L).view(B, L), torch.randn(B, L, 4)
    found = trim_padding(mask, ids, states, multiple=multiple)
    assert all(torch.equal(cut, whole[:, :length]) for cut, whole in zip(found, (mask, ids, states), strict=True))


def test_a_causal_text_tower_gives_the_words_the_same_states():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=49408, max_position_embeddings=L)).double().eval()
    mask = lengths(3, 9, 5)
    ids = torch.randint(1, 1000, (B, L)).masked_fill(mask, 0)
    ids[torch.arange(B), torch.tensor([2, 8, 4])] = 49407  # where sentences end, and what the tower pools
    cut_mask, cut_ids = trim_padding(mask, ids)
    whole, cut = tower(ids), tower(cut_ids)
    words = ~cut_mask
    torch.testing.assert_close(cut.last_hidden_state[words], whole.last_hidden_state[:, : words.shape[1]][words], **EXACT)
    torch.testing.assert_close(cut.pooler_output, whole.pooler_output, **EXACT)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_fusion_encoder_gives_the_other_tokens_the_same_with_the_same_gradients(pre_norm):
    """Words at the end of the sequence, as in HiVG."""
    image, width = 5, 8
    encoder = FusionEncoder(width, 2, 2, 16, 0.0, pre_norm=pre_norm, dtype=torch.float64)
    tokens = torch.randn(B, image + L, width, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(image + L, width, dtype=torch.float64)
    mask = lengths(3, 9, 5)
    results = []
    for cut_mask, cut_words in ((mask, tokens[:, image:]), trim_padding(mask, tokens[:, image:])):
        length = image + cut_mask.shape[1]
        padding = torch.cat([torch.zeros(B, image, dtype=torch.bool), cut_mask], 1)
        y = encoder(torch.cat([tokens[:, :image], cut_words], 1), positions[:length], padding)
        kept = y[:, : image + 16][~padding[:, : image + 16]]
        results.append((kept, *torch.autograd.grad(kept.square().sum(), [tokens, *encoder.parameters()])))
    assert results[0][0].shape == (B * image + 3 + 9 + 5, width)
    torch.testing.assert_close(*results, **EXACT)


def test_hivgs_towers_at_24_words_in_place_of_77():
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    with torch.device("meta"):
        tower = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=49408, attn_implementation="eager"))
        encoder = FusionEncoder(512, pre_norm=True).eval()
    flops = {}
    for words in (77, 24):
        ids = torch.empty(1, words, dtype=torch.int64, device="meta")
        tokens, positions = (torch.empty(*shape, device="meta") for shape in ((1, 198 + words, 512), (198 + words, 512)))
        for name, run in (("text", lambda: tower(ids)), ("fusion", lambda: encoder(tokens, positions))):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            flops[name, words] = round(counter.get_total_flops() / 1e9, 1)
    print(", ".join(f"{name} {words} words: {gflop} GFLOP" for (name, words), gflop in flops.items()))
    assert flops == {("text", 77): 6.0, ("fusion", 77): 11.3, ("text", 24): 1.8, ("fusion", 24): 9.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trim_padding(lengths(1), multiple=0), "multiple: expected at least 1, got 0"),
        (lambda: trim_padding(torch.zeros(B, L)), "key_padding_mask: expected None or a bool tensor"),
        (lambda: trim_padding(torch.zeros(B, dtype=torch.bool)), r"key_padding_mask: expected a bool tensor \(B, L\)"),
        (lambda: trim_padding([True]), r"key_padding_mask: expected a bool tensor \(B, L\), got list"),
        (lambda: trim_padding(lengths(1, 2, 3), torch.zeros(B, 7)), r"tensors\[0\]: expected shape \(3, 20, ...\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
