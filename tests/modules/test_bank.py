"""Banks of side adapters and the gated ladder: values, gradients, sharing between towers, counts, copies, processes, errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bench.memory import saved_bytes
from fastadapt import SideAdapter, SideAdapterBank, SideLadder
from tests.modules.checks import randomise, round_trips, with_gradients
from tests.tolerance import EXACT, error

VISION, LANGUAGE, H, LAYERS = 8, 20, 6, 3


def norms(width: int = LANGUAGE, layers: int = LAYERS) -> list[nn.LayerNorm]:
    """Those that a text tower has in one place of every layer."""
    return [randomise(nn.LayerNorm(width, eps=1e-12)) for _ in range(layers)]


class Banks(nn.Module):
    """Both towers' banks, as a model holds them: (vision taps, text taps, vision base, text base) -> both sums."""

    def __init__(self, *sizes: int, width: int = LANGUAGE, layers: int = LAYERS) -> None:
        super().__init__()
        self.vision, self.text = SideAdapterBank.m2ist(norms(width, layers), norms(width, layers), *sizes)
        randomise(self)

    def forward(self, vision: list[Tensor], text: list[Tensor], bases: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        return self.vision(vision, bases[0]), self.text(text, bases[1])


def inputs(banks: Banks, *rows: int, dtype: torch.dtype = torch.float64, trained: bool = False) -> tuple[list, list, list]:
    """Taps of both towers, and two bases of each."""
    widths = [bank.adapters[0].down_proj.in_features for bank in (banks.vision, banks.text)]
    counts = [len(bank.adapters) for bank in (banks.vision, banks.text)]
    taps = [[torch.randn(2, n, width, dtype=dtype) for _ in range(count)] for n, width, count in zip(rows, widths, counts)]
    bases = [[torch.randn(2, n, w, dtype=dtype, requires_grad=trained) for _ in range(2)] for n, w in zip(rows, widths)]
    return *taps, bases


def plain(banks: Banks, vision: list[Tensor], text: list[Tensor], bases: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """The released expressions, adapter by adapter: torch's own modules, lists of results, and a sum of those."""

    def vea(adapter: SideAdapter, x: Tensor) -> Tensor:
        return 0.1 * adapter.up_proj(F.relu(adapter.down_proj(adapter.norm(x))))

    def text_iea(adapter: SideAdapter, x: Tensor) -> Tensor:
        r = F.relu(adapter.down_proj(x))
        return adapter.output_norm(torch.cat([adapter.up_proj(r), adapter.shared_up(r)], -1))

    v, t = banks.vision.adapters, banks.text.adapters
    return (
        sum(bases[0]) + sum(a.shared_up(F.relu(a.down_proj(m))) for a, m in zip(v[::2], vision[::2]))
        + sum(vea(a, f) for a, f in zip(v[1::2], vision[1::2])),
        sum(bases[1]) + sum(text_iea(a, m) for a, m in zip(t[::2], text[::2]))
        + sum(a.output_norm(vea(a, g)) for a, g in zip(t[1::2], text[1::2])),
    )  # fmt: skip


def all_of(outputs: tuple[Tensor, Tensor], banks: nn.Module, bases: list[list[Tensor]]) -> dict[str, Tensor]:
    """Both towers' results and every gradient of a function of both."""
    named = {f"base {i} {j}": base for i, tower in enumerate(bases) for j, base in enumerate(tower) if base.requires_grad}
    both = torch.cat([y.flatten() for y in outputs])
    return with_gradients(both, banks, **named)


@pytest.mark.parametrize(
    ("sizes", "width", "layers", "rows"), [((VISION, H), LANGUAGE, LAYERS, (5, 3)), ((256, 128), 768, 6, (20, 4))]
)
def test_both_towers_are_the_released_expressions(sizes, width, layers, rows):
    banks = Banks(*sizes, width=width, layers=layers)
    given = inputs(banks, *rows, trained=True)
    expected = all_of(plain(banks, *given), banks, given[-1])
    assert all(tensor.any() for tensor in expected.values())
    torch.testing.assert_close(all_of(banks(*given), banks, given[-1]), expected, **EXACT)


def test_a_tower_is_the_sum_of_its_adapters_own_results():
    banks = Banks(VISION, H)
    vision, text, (bases, _) = inputs(banks, 5, 3)
    for bank, taps in ((banks.vision, vision), (banks.text, text)):
        expected = sum(adapter(tap) for adapter, tap in zip(bank.adapters, taps))
        torch.testing.assert_close(with_gradients(bank(taps), bank), with_gradients(expected, bank), **EXACT)


def test_the_shared_projections_are_single_parameters_in_both_banks():
    banks = Banks(VISION, H)
    for vision, text in zip(banks.vision.adapters[::2], banks.text.adapters[::2]):
        assert vision.shared_up is text.shared_up and vision.up_proj is None
    assert [vision.shared_up for vision in banks.vision.adapters[1::2]] == [None] * LAYERS
    names = {f"{bank}.adapters.{2 * i}.shared_up.weight" for bank in ("vision", "text") for i in range(LAYERS)}
    assert names <= set(banks.state_dict()) and len(names & set(dict(banks.named_parameters()))) == LAYERS


def test_the_sum_over_towers_is_taken_in_float32_under_16_bits():
    """Each tower's part comes in the parameter's float32; in bfloat16 the sum would be rounded to 8 bits."""
    banks = Banks(VISION, H)
    given = inputs(banks, 9, 4, dtype=torch.bfloat16)
    shared = banks.vision.adapters[0].shared_up.weight
    exact = copy.deepcopy(banks)
    banks.float()
    parts = [torch.autograd.grad(y.float().sin().sum(), shared)[0] for y in banks(*given)]
    sum(y.float().sin().sum() for y in banks(*given)).backward()
    assert shared.grad.dtype == torch.float32 and torch.equal(shared.grad, parts[0] + parts[1])
    assert not torch.equal(shared.grad, shared.grad.bfloat16())
    double = [[t.double() for t in taps] for taps in given[:2]] + [[[b.double() for b in tower] for tower in given[2]]]
    sum(y.sin().sum() for y in exact(*double)).backward()
    assert error(shared.grad, exact.vision.adapters[0].shared_up.weight.grad) < 0.05


def test_parameters_are_the_released_ones_less_the_dead():
    vision, text = SideAdapterBank.m2ist([nn.LayerNorm(768)] * 6, [nn.LayerNorm(768)] * 6, device="meta")

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for p in nn.ModuleList(modules).parameters())

    vea, lea, iea = vision.adapters[1], text.adapters[1], vision.adapters[0]
    assert (count(vea), count(lea), count(iea.shared_up)) == (66_432, 199_040, 33_024)
    assert (count(vea) + 2 * 256, count(lea) + 2 * 768) == (66_944, 200_576)  # released, each with an idle LayerNorm
    assert count(vision) + count(text) - 6 * 33_024 == count(vision, text) == 2_975_232
    assert 2_975_232 + 6 * 2 * (256 + 768) + 198_274 == 3_185_794  # the last: LoRA modules that nothing calls


def test_the_towers_norms_are_frozen_and_stay_the_towers():
    attention, output = norms(), norms()
    banks = nn.ModuleList(SideAdapterBank.m2ist(attention, output, VISION, H))
    assert not any(p.requires_grad for norm in (*attention, *output) for p in norm.parameters())
    assert [adapter.output_norm for adapter in banks[1].adapters] == [n for pair in zip(attention, output) for n in pair]
    assert not any(p is q for p in banks.parameters() for norm in (*attention, *output) for q in norm.parameters())
    expert = {f"{layer}.{kind}" for layer in ("norm", "down_proj", "up_proj") for kind in ("weight", "bias")}
    assert set(banks[1].adapters[1].state_dict()) == expert == set(SideAdapter.vea().state_dict())


def test_a_tap_with_a_gradient_is_refused_and_named():
    banks = Banks(VISION, H)
    vision, _, (bases, _) = inputs(banks, 5, 3)
    vision[4].requires_grad_()
    with pytest.raises(ValueError, match=r"^adapters\[4\]\.tap: expected a tensor that requires no gradient \(detach it"):
        banks.vision(vision, bases)


def test_copies_and_state_dicts_keep_the_function():
    banks = Banks(VISION, H)
    given = inputs(banks, 5, 3)
    round_trips(banks, given, lambda banks, given: torch.cat([y.flatten() for y in banks(*given)]))
    twin = copy.deepcopy(banks)
    assert twin.vision.adapters[0].shared_up is twin.text.adapters[0].shared_up is not banks.text.adapters[0].shared_up


def test_compiled_without_a_graph_break_it_is_the_same():
    banks = Banks(VISION, H)
    given = inputs(banks, 5, 3, trained=True)
    twin = copy.deepcopy(banks)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(all_of(compiled(*given), twin, given[-1]), all_of(banks(*given), banks, given[-1]), **EXACT)


def test_autocast_runs_and_is_near():
    banks = Banks(VISION, H)
    given = inputs(banks, 5, 3)
    exact = banks(*given)
    banks.float()
    vision, text = ([t.float() for t in taps] for taps in given[:2])
    with torch.autocast("cpu", torch.bfloat16):
        found = banks(vision, text, [[b.float() for b in tower] for tower in given[2]])
    for y, want in zip(found, exact):
        assert y.dtype == torch.float32 and error(y, want) < 0.05
    sum(y.sum() for y in found).backward()
    assert all(parameter.grad.isfinite().all() for parameter in banks.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant):
    banks = Banks(VISION, H)
    given = inputs(banks, 5, 3, trained=True)

    def run(*bases: Tensor) -> tuple[Tensor, Tensor]:
        return banks(given[0], given[1], [list(bases[:2]), list(bases[2:])])

    bases = [base for tower in given[2] for base in tower]
    outputs = checkpoint(run, *bases, use_reentrant=use_reentrant)
    sum(y.square().sum() for y in outputs).backward()
    found = [p.grad for p in banks.parameters()]
    expected = torch.autograd.grad(sum(y.square().sum() for y in banks(*given)), list(banks.parameters()))
    torch.testing.assert_close(found, list(expected), **EXACT)


def test_taps_are_all_that_is_kept():
    banks = Banks(VISION, H)
    vision, text, bases = inputs(banks, 5, 3)
    constants = [*banks.parameters(), *(p for a in banks.text.adapters for p in a.output_norm.parameters())]
    assert saved_bytes(lambda: banks(vision, text, bases), exclude=constants) == sum(t.nbytes for t in (*vision, *text))


def test_bad_arguments_are_named():
    banks = Banks(VISION, H)
    vision, _, _ = inputs(banks, 5, 3)
    with pytest.raises(ValueError, match="^taps: expected 6, one for each adapter, got 5"):
        banks.vision(vision[1:])
    with pytest.raises(ValueError, match="^adapters: expected at least one SideAdapter and nothing else, got none"):
        SideAdapterBank([])
    with pytest.raises(ValueError, match="^adapters: expected at least one SideAdapter and nothing else, got Linear"):
        SideAdapterBank([SideAdapter.vea(), nn.Linear(256, 256)])
    with pytest.raises(ValueError, match="^output_norms: expected 3 LayerNorms, as attention_norms, got 2"):
        SideAdapterBank.m2ist(norms(), norms()[:2])
    with pytest.raises(ValueError, match="^output_norms: expected 1 LayerNorms, as attention_norms, got 0"):
        SideAdapterBank.m2ist([], [])


WIDTHS, WIDTH = (8, 5, 5, 3), 6


def make_ladder(widths: tuple[int, ...] = WIDTHS) -> SideLadder:
    return randomise(SideLadder(widths, WIDTH, temperature=0.7))


def ladder_taps(widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    return [torch.randn(2, 5, width, dtype=torch.float64) for width in widths]


def recurrence(ladder: SideLadder, taps: list[Tensor], state: Tensor | float) -> Tensor:
    for alpha, linear, tap in zip(ladder.gates, ladder.down_projs, taps):
        gate = torch.sigmoid(alpha / ladder.temperature)
        state = gate * state + (1 - gate) * linear(tap)
    return state


@pytest.mark.parametrize("widths", [WIDTHS, (4,), (WIDTH,) * 12], ids=len)
@pytest.mark.parametrize("with_state", [True, False])
def test_a_ladder_is_its_recurrence(with_state, widths):
    ladder, taps = make_ladder(widths), ladder_taps(widths)
    state = {"state": torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)} if with_state else {}
    expected = with_gradients(recurrence(ladder, taps, state.get("state", 0.0)), ladder, **state)
    assert all(tensor.any() for tensor in expected.values())
    torch.testing.assert_close(with_gradients(ladder(taps, **state), ladder, **state), expected, **EXACT)


def test_a_ladder_with_blocks_between_its_steps():
    ladder, taps, block = make_ladder(), ladder_taps(), nn.Linear(WIDTH, WIDTH).double()
    both = nn.ModuleList([ladder, block])
    start = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    ours = expected = start
    for i, tap in enumerate(taps):
        gate = torch.sigmoid(ladder.gates[i] / ladder.temperature)
        ours = block(ladder.step(i, tap, ours)).tanh()
        expected = block(gate * expected + (1 - gate) * ladder.down_projs[i](tap)).tanh()
    torch.testing.assert_close(
        with_gradients(ours, both, start=start), with_gradients(expected, both, start=start), **EXACT
    )


@pytest.mark.parametrize("alpha", [-40.0, 40.0])
def test_gates_that_are_shut_or_open_to_the_last_digit(alpha):
    ladder, taps = make_ladder(), ladder_taps()
    with torch.no_grad():
        ladder.gates[1:3] = alpha
    expected = with_gradients(recurrence(ladder, taps, 0.0), ladder)
    torch.testing.assert_close(with_gradients(ladder(taps), ladder), expected, **EXACT)


def test_a_new_ladder_is_half_open_and_starts_as_nn_linear_does():
    ladder = SideLadder(WIDTHS, WIDTH, device="meta").to_empty(device="cpu")
    ladder.reset_parameters()
    assert not ladder.gates.any()
    assert all(0 < linear.weight.abs().max() <= linear.in_features**-0.5 for linear in ladder.down_projs)
    assert "temperature=0.1" in repr(ladder)


def test_a_ladder_keeps_its_taps_alone():
    ladder, taps = make_ladder(), ladder_taps()
    state = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    folded = sum((p.nbytes for p in ladder.down_projs.parameters()))
    kept = saved_bytes(lambda: ladder(taps, state), exclude=ladder.parameters())
    small = 64 * len(WIDTHS) * 8  # gates and what is made of them
    assert 0 <= kept - sum(t.nbytes for t in taps) - folded - state.nbytes <= small


def test_a_ladder_compiles_and_copies():
    ladder, taps = make_ladder(), ladder_taps()
    round_trips(ladder, taps, lambda ladder, taps: ladder(taps))
    twin = copy.deepcopy(ladder)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled(taps), twin), with_gradients(ladder(taps), ladder), **EXACT)


def test_a_ladders_bad_arguments_are_named():
    ladder, taps = make_ladder(), ladder_taps()
    with pytest.raises(ValueError, match="^taps: expected 4, one for each adapter, got 3"):
        ladder(taps[1:])
    with pytest.raises(ValueError, match=re.escape("adapters[2].tap: expected a tensor that requires no gradient")):
        ladder([tap.requires_grad_(i == 2) for i, tap in enumerate(taps)])
    with pytest.raises(ValueError, match="^in_features: expected at least one width, got none"):
        SideLadder((), WIDTH)
    with pytest.raises(ValueError, match="^temperature: expected a number above 0, got 0"):
        SideLadder(WIDTHS, WIDTH, temperature=0)


WORLD = 2


def seeded() -> tuple[Banks, tuple[list, list, list]]:
    torch.manual_seed(0)
    banks = Banks(VISION, H, layers=1)
    return banks, inputs(banks, 5, 3)


def half(given: tuple[list, list, list], rank: int) -> tuple[list, list, list]:
    """One of the two samples."""
    cut = [[t[rank : rank + 1] for t in taps] for taps in given[:2]]
    return *cut, [[base[rank : rank + 1] for base in tower] for tower in given[2]]


def work(rank: int, folder: str) -> None:
    """One process: its sample, and the gradients that all agree on to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    banks, given = seeded()
    replica = DistributedDataParallel(banks)
    sum(y.square().sum() for y in replica(*half(given, rank))).backward()
    torch.save([p.grad for p in banks.parameters()], f"{folder}/{rank}.pt")
    del replica  # before the process group, which would otherwise wait for it with the GIL held
    dist.destroy_process_group()


def test_over_two_processes_gradients_are_those_of_one_on_both_samples(tmp_path: Path):
    spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    banks, given = seeded()
    (sum(y.square().sum() for y in banks(*given)) / WORLD).backward()
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, [p.grad for p in banks.parameters()], **EXACT)
