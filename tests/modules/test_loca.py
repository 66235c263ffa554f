"""LoCA: values, gradients, running statistics, folding, starts, checkpoints, errors, and statistics over processes."""

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
from torch.nn.utils import fuse_conv_bn_eval

from bench.counters import counting
from bench.meta import as_on_cuda
from fastadapt import LoCA
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT

DIM, SIZES = 10, (8, 3, 4)
CONVOLUTIONS = ("point_conv", "reduce_conv", "local_conv")
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make(training: bool = True) -> LoCA:
    module = randomise(LoCA(DIM, *SIZES))
    for norm in module.norms:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module.train(training)


def tokens(batch: int = 2, patches: int = 16) -> Tensor:
    return torch.randn(batch, 1 + patches, DIM, dtype=torch.float64, requires_grad=True)


def plain(module: LoCA, n: Tensor, grid: tuple[int, int]) -> Tensor:
    """The equation by the module's own nn.Linear, nn.Conv2d and nn.BatchNorm2d."""
    h = F.relu(module.down_proj(n))
    patches = h[:, 1:].transpose(1, 2).unflatten(2, grid)
    z1 = F.relu(module.point_norm(module.point_conv(patches)))
    z2 = F.relu(module.local_norm(module.local_conv(F.relu(module.reduce_norm(module.reduce_conv(patches))))))
    z = torch.cat((z1, z2), 1).flatten(2).transpose(1, 2)
    return module.up_proj(h + torch.cat((h[:, :1], z), 1))


def run(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    return module(*inputs)


@every_mode
@pytest.mark.parametrize(
    ("batch", "grid"), [(1, (37, 37)), (2, (16, 16)), (33, (7, 7)), (2, (5, 9)), (1, (7, 7)), (2, (1, 1))], ids=str
)
def test_values_and_all_gradients_are_the_equation(batch, grid, training):
    module, n = make(training), tokens(batch, grid[0] * grid[1])
    twin = copy.deepcopy(module)
    expected = with_gradients(plain(twin, n, grid), twin, n=n)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    torch.testing.assert_close(with_gradients(module(n, grid=grid), module, n=n), expected, **EXACT)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), **EXACT)


def test_the_default_sizes():
    module, n = LoCA().double(), torch.randn(1, 1 + 37 * 37, 768, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(module)
    expected = with_gradients(plain(twin, n, (37, 37)), twin, n=n)
    torch.testing.assert_close(with_gradients(module(n), module, n=n), expected, **EXACT)
    assert sum(parameter.numel() for parameter in module.parameters()) == 527_304


@pytest.mark.parametrize("steps", [1, 3])
def test_running_statistics_after_some_steps(steps):
    module = make()
    twin = copy.deepcopy(module)
    for _ in range(steps):
        n = tokens()
        module(n), plain(twin, n, (4, 4))
    assert module.local_norm.num_batches_tracked == steps
    torch.testing.assert_close(dict(module.named_buffers()), dict(twin.named_buffers()), **EXACT)


def test_in_training_the_convolutions_biases_have_a_gradient_of_zero():
    module = make()
    module(tokens()).square().sum().backward()
    for name, parameter in module.named_parameters():
        inert = name in {f"{convolution}.bias" for convolution in CONVOLUTIONS}
        assert bool(parameter.grad.any()) is not inert, name


@every_mode
def test_the_class_token_depends_on_itself_alone(training):
    module, n = make(training), tokens()
    h = F.relu(module.down_proj(n[:, 0]))
    torch.testing.assert_close(module(n)[:, 0], module.up_proj(2 * h), **EXACT)
    (grad,) = torch.autograd.grad(module(n)[:, 0].square().sum(), n)
    assert grad[:, 0].any() and not grad[:, 1:].any()


@every_mode
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_the_sum_it_is_part_of(frozen, training):
    module, n, mlp, x = make(training), tokens().requires_grad_(not frozen), tokens(), tokens()
    twin, gamma = copy.deepcopy(module), torch.randn(DIM, dtype=torch.float64)
    inputs = {"mlp": mlp, "x": x} | ({} if frozen else {"n": n})
    expected = with_gradients(x + gamma * (mlp + 0.2 * plain(twin, n, (4, 4))), twin, **inputs)
    found = with_gradients(module(n, layer_scale=gamma, mlp=mlp, residual=x), module, **inputs)
    torch.testing.assert_close(found, expected, **EXACT)


def test_in_eval_the_batch_norms_fold_into_the_convolutions():
    module, n = make(training=False), tokens()
    expected = module(n)
    folded = copy.deepcopy(module)
    for convolution, norm in zip(CONVOLUTIONS, ("point_norm", "reduce_norm", "local_norm")):
        setattr(folded, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(folded, norm, nn.Identity())
    torch.testing.assert_close(plain(folded, n, (4, 4)), expected, **EXACT)


def test_batch_norms_in_eval_mode_freeze_the_statistics_of_a_module_that_trains():
    module, n = make(), tokens()
    expected = module.eval()(n)
    module.train()
    for norm in module.norms:
        norm.eval()
    before = copy.deepcopy(module.state_dict())
    assert torch.equal(module(n), expected)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_new_module_starts_as_the_released_one():
    module = LoCA(64, 32, 8, 16, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    for linear in (module.down_proj, module.up_proj):
        assert 0.015 < linear.weight.std() < 0.025 and linear.weight.abs().max() < 2 and not linear.bias.any()
    for convolution in (module.point_conv, module.reduce_conv, module.local_conv):
        bound = convolution.weight[0].numel() ** -0.5
        assert 0.8 * bound < convolution.weight.abs().max() <= bound and convolution.bias.any()
    for norm in module.norms:
        assert (norm.weight == 1).all() and not norm.bias.any() and (norm.eps, norm.momentum) == (1e-3, 0.1)
        assert not norm.running_mean.any() and (norm.running_var == 1).all()


def test_names_and_shapes_of_the_state_dict():
    shapes = {name: tuple(tensor.shape) for name, tensor in LoCA(device="meta").state_dict().items()}
    norms = {"point_norm": 192, "reduce_norm": 24, "local_norm": 96}
    roles = ("weight", "bias", "running_mean", "running_var")
    assert shapes == {
        **{"down_proj.weight": (288, 768), "down_proj.bias": (288,), "up_proj.weight": (768, 288), "up_proj.bias": (768,)},
        **{"point_conv.weight": (192, 288, 1, 1), "reduce_conv.weight": (24, 288, 1, 1), "local_conv.weight": (96, 24, 3, 3)},
        **{"point_conv.bias": (192,), "reduce_conv.bias": (24,), "local_conv.bias": (96,)},
        **{f"{norm}.{role}": (size,) for norm, size in norms.items() for role in roles},
        **{f"{norm}.num_batches_tracked": () for norm in norms},
    }


@every_mode
def test_copies_and_state_dicts_keep_the_function(training):
    round_trips(make(training), [tokens()], run)


@every_mode
def test_compiled_without_a_graph_break_it_is_the_same(training):
    compiles(make(training), [tokens()], run)


def test_a_compiled_step_moves_the_running_statistics():
    module, n = make(), tokens()
    twin = copy.deepcopy(module)
    torch.compile(twin, fullgraph=True, backend="aot_eager")(n)
    module(n)
    torch.testing.assert_close(twin.state_dict(), module.state_dict(), **EXACT)


@every_mode
def test_autocast_runs_and_is_near(training):
    runs_under_autocast(make(training), [tokens(4)], run)


def test_bad_arguments_are_named():
    module = make()
    module.local_norm.eval()
    with pytest.raises(ValueError, match=re.escape("norms: expected all batch norms in one mode, got [True, True, False]")):
        module(tokens())
    with pytest.raises(ValueError, match=r"^down_weight: expected shape \(any, 11\)"):
        make()(torch.ones(2, 17, 11, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "casts"), [(torch.bfloat16, 0), (torch.float32, 1)], ids=str)
def test_launches_under_autocast(dtype, casts):
    """Twelve of the operation's, two that move the running statistics; float32 n is cast, and so is its gradient."""
    module, gamma = LoCA(device="meta"), torch.empty(768, device="meta")
    n, mlp, x = (torch.empty(32, 1370, 768, dtype=kind, device="meta") for kind in (dtype, torch.bfloat16, torch.float32))
    wanted = [n.requires_grad_(), *module.parameters()]
    for training, expected in ((True, 14 + 2 * casts), (False, 2 + casts)):
        module.train(training)
        with as_on_cuda(), counting() as launches, torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            out = module(n, layer_scale=gamma, mlp=mlp, residual=x)
            if training:
                torch.autograd.grad(out, wanted, torch.empty_like(out))
        assert launches.total == expected


WORLD, BATCH = 2, 3


def synchronised() -> LoCA:
    torch.manual_seed(0)
    return nn.SyncBatchNorm.convert_sync_batchnorm(make())


def batch() -> Tensor:
    return torch.randn(WORLD * BATCH, 17, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(module: LoCA, n: Tensor) -> dict[str, Tensor]:
    """n's and the parameters' gradients of a sum over samples, and the buffers afterwards."""
    n.requires_grad_()
    with_residual = module(n, layer_scale=n.new_full((DIM,), 0.5), mlp=2 * n, residual=n)
    grads = torch.autograd.grad(with_residual.square().sum(), [n, *module.parameters()])
    return dict(zip(["n", *(name for name, _ in module.named_parameters())], grads)) | dict(module.named_buffers())


def work(rank: int, folder: str) -> None:
    """One process: its half of the batch, what came of it to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(step(synchronised(), batch()[rank * BATCH : (rank + 1) * BATCH].clone()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_synchronised_over_two_processes_it_is_one_process_on_the_whole_batch(tmp_path: Path):
    spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    torch.manual_seed(0)
    module = make()
    expected, buffers = step(module, batch()), dict(module.named_buffers())
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, want in expected.items():
        got = [one[name] for one in found]
        if name in buffers:
            for one in got:
                torch.testing.assert_close(one, want, **EXACT)
        else:
            torch.testing.assert_close(torch.cat(got) if name == "n" else sum(got), want, **EXACT)


def test_in_one_process_synchronised_batch_norms_are_ordinary_ones():
    module, n = synchronised(), tokens()
    assert not module.synchronised
    torch.manual_seed(0)
    assert torch.equal(module(n), make()(n))
