"""SentenceCache: what the tower would return, once for each sentence, and never something stale or random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from fastadapt import PhiloxDropout, SentenceCache
from tests.tolerance import EXACT, SINGLE


class Tower(nn.Module):
    """Counts the sentences that it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, dtype=torch.float64)
        self.register_buffer("offset", torch.zeros(4, dtype=torch.float64))
        self.encoded = 0
        self.requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.encoded += len(ids)
        features = self.table(ids).cumsum(1) + self.offset
        return features if mask is None else features * mask[..., None]


def sentences(*rows: int) -> Tensor:
    """Row r is always the same sentence."""
    return torch.stack([torch.arange(3) * (row + 1) % 50 for row in rows])


def test_rows_are_the_towers_and_each_sentence_is_encoded_once():
    tower = Tower()
    cache = SentenceCache(tower)
    for rows, encoded in (((0, 1, 0), 2), ((1, 2), 1), ((2, 0, 1), 0)):
        before = tower.encoded
        found = cache(sentences(*rows))
        assert tower.encoded - before == encoded
        torch.testing.assert_close(found, tower.forward(sentences(*rows)), **EXACT)
    assert (cache.hits, cache.misses, len(cache)) == (5, 3, 3)


def test_every_argument_its_dtype_and_its_length_are_part_of_the_key():
    tower = Tower()
    cache, ids, mask = SentenceCache(tower), sentences(1, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    for arguments in ((ids,), (ids, mask), (ids, 1 - mask), (ids, mask.bool()), (ids[:, :2],), (ids.int(),)):
        torch.testing.assert_close(cache(*arguments), Tower.forward(tower, *arguments), **EXACT)
    assert cache.misses == 12 and cache.hits == 0


def test_a_tuple_of_features_comes_back_as_one():
    tower = Tower()
    cache = SentenceCache(tower, lambda ids: (tower(ids), tower(ids).sum(-1)))
    for _ in range(2):
        torch.testing.assert_close(cache(sentences(3, 4)), cache.encode(sentences(3, 4)), **EXACT)
    assert cache.hits == 2


def test_the_least_recently_used_sentence_goes_first():
    tower = Tower()
    cache = SentenceCache(tower, capacity=2)
    cache(sentences(0, 1)), cache(sentences(0)), cache(sentences(2))
    before = tower.encoded
    cache(sentences(0, 2))
    assert len(cache) == 2 and tower.encoded == before
    assert cache(sentences(0, 1, 2, 3)).shape == (4, 3, 4) and len(cache) == 2


def test_a_kept_row_does_not_keep_its_batch_nor_change_with_what_was_returned():
    cache = SentenceCache(Tower())
    expected = cache(sentences(0, 1)).clone()
    cache(sentences(0, 1)).zero_()
    assert torch.equal(cache(sentences(0, 1)), expected)
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in cache.rows.values())


CHANGES = {
    "in place": lambda tower: tower.table.weight.mul_(2),
    "replaced": lambda tower: setattr(tower, "table", nn.Embedding(50, 4, dtype=torch.float64).requires_grad_(False)),
    "a buffer": lambda tower: tower.offset.add_(1),
    "cast": lambda tower: tower.float(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_of_the_tower_drops_what_was_kept(how):
    tower = Tower()
    cache = SentenceCache(tower)
    old = cache(sentences(0, 1))
    with torch.no_grad():
        CHANGES[how](tower)
    new = cache(sentences(0, 1))
    assert torch.equal(new, tower(sentences(0, 1))) and not (new.dtype is old.dtype and torch.equal(new, old))


def test_autocast_dtypes_are_kept_apart():
    tower = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 4)).requires_grad_(False)
    cache = SentenceCache(tower)
    assert cache(sentences(0)).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cache(sentences(0)).dtype is torch.bfloat16
    assert cache(sentences(0)).dtype is torch.float32 and cache.misses == 2


@pytest.mark.parametrize("dropout", [nn.Dropout(0.1), PhiloxDropout(0.1), nn.MultiheadAttention(4, 2, 0.1)])
def test_active_dropout_is_refused_and_inactive_is_not(dropout):
    tower = nn.Sequential(Tower(), dropout.requires_grad_(False))
    cache = SentenceCache(tower, lambda ids: tower[0](ids))
    with pytest.raises(ValueError, match="tower: expected no active dropout: .* got dropout in 1 in training mode"):
        cache(sentences(0))
    tower.eval()
    assert cache(sentences(0)).shape == (1, 3, 4)


def test_berts_dropout_is_seen_and_clips_tower_may_stay_in_training_mode():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    bert = BertModel(BertConfig(**sizes)).requires_grad_(False)
    cache = SentenceCache(bert, lambda ids: bert(ids).last_hidden_state)
    with pytest.raises(ValueError, match="active dropout"):
        cache(sentences(0))
    clip = CLIPTextModel(CLIPTextConfig(**sizes)).requires_grad_(False).train()
    cache = SentenceCache(clip, lambda ids: clip(ids).last_hidden_state)
    cache(sentences(2))
    torch.testing.assert_close(cache(sentences(1, 2)), clip(sentences(1, 2)).last_hidden_state, **SINGLE)


def test_no_graph_reaches_the_features_and_they_serve_a_graph():
    cache = SentenceCache(Tower())
    found, weight = cache(sentences(0)), torch.ones(4, dtype=torch.float64, requires_grad=True)
    assert not found.requires_grad
    (found * weight).sum().backward()
    assert torch.equal(weight.grad, found.sum((0, 1)))
    with torch.inference_mode():
        cache(sentences(1))
    (cache(sentences(1)) * weight).sum().backward()


def test_hivgs_text_tower_costs_6_gigaflops_a_sentence_or_nothing():
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = CLIPTextConfig(**sizes, vocab_size=49408, attn_implementation="eager")
    with torch.device("meta"):
        tower = CLIPTextModel(config).requires_grad_(False)
    cache = SentenceCache(tower, lambda ids: tower(ids).last_hidden_state)
    ids, flops = torch.arange(77)[None], []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            cache(ids)
        flops.append(counter.get_total_flops())
    print(f"a sentence: {flops[0] / 1e9:.2f} GFLOP, found again: {flops[1]}")
    assert round(flops[0] / 1e9, 2) == 5.96 and flops[1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SentenceCache(Tower(), capacity=0), "capacity: expected at least 1, got 0"),
        (lambda: SentenceCache(Tower().requires_grad_())(sentences(0)), "tower: expected a frozen module, got one whose table"),
        (lambda: SentenceCache(Tower())(), "arguments: expected tensors"),
        (lambda: SentenceCache(Tower())([1, 2]), "arguments: expected tensors .* got .*list"),
        (lambda: SentenceCache(Tower())(sentences(0)[:0]), "arguments: expected .* at least 1, got .0."),
        (lambda: SentenceCache(Tower())(sentences(0), torch.ones(2, 3)), "arguments: .* same number of rows"),
        (lambda: SentenceCache(Tower(), lambda ids: [ids])(sentences(0)), r"encode: expected a tensor \(1, ...\)"),
        (lambda: SentenceCache(Tower(), lambda ids: ids[0, 0])(sentences(0)), r"encode: expected a tensor \(1, ...\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
