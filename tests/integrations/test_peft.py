"""Fused PEFT models against PEFT itself, for five transformers families: same numbers, same objects, same files."""

from __future__ import annotations

import copy
import io
import os
import pathlib

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from torch import nn

import fastadapt
from bench.twin import with_fused_masks
from fastadapt.integrations.peft import FusedLinear
from tests.integrations.families import FAMILIES, batch, outputs, peft_model, step
from tests.tolerance import DEEP, EXACT

every_family = pytest.mark.parametrize("family", FAMILIES)


def fused_copy(model: nn.Module) -> nn.Module:
    return fastadapt.fuse(copy.deepcopy(model))


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, Linear)}


@every_family
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_equal_pefts(family, dropout, use_rslora):
    model = peft_model(family, lora_dropout=dropout, use_rslora=use_rslora)
    fused = fused_copy(model)
    eager = with_fused_masks(model) if dropout else model
    assert kinds(fused) == {FusedLinear} and kinds(eager) == {Linear}
    expected = step(eager, family)
    assert min(grad.abs().max() for grad in expected[1].values() if grad is not None) > 1e-3
    torch.testing.assert_close(step(fused, family), expected, **EXACT)


@every_family
def test_single_precision_equals_pefts(family):
    model = peft_model(family, torch.float32)
    found = step(fused_copy(model), family, torch.float32)
    torch.testing.assert_close(found, step(model, family, torch.float32), **DEEP)


@every_family
def test_eval_drops_nothing(family):
    model = peft_model(family, lora_dropout=0.1).eval()
    fused = fused_copy(model)
    with torch.no_grad():
        torch.testing.assert_close(outputs(fused, family), outputs(model, family), **EXACT)


@every_family
def test_fuse_leaves_every_parameter_and_name_in_place(family):
    model = peft_model(family)
    parameters, modules = dict(model.named_parameters()), list(model.named_modules())
    state = model.state_dict(keep_vars=True)
    assert fastadapt.fuse(model) is model
    assert list(model.named_modules()) == modules
    assert list(dict(model.named_parameters())) == list(parameters) and list(model.state_dict()) == list(state)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(value is state[name] for name, value in model.state_dict(keep_vars=True).items())


@every_family
def test_unfuse_restores_every_class(family):
    model = peft_model(family)
    classes = [type(module) for module in model.modules()]
    fastadapt.fuse(fastadapt.fuse(model))
    assert FusedLinear in kinds(model)
    assert fastadapt.unfuse(model) is model
    assert [type(module) for module in model.modules()] == classes


@every_family
def test_saved_files_are_the_same_bytes_and_load(family, tmp_path):
    model = peft_model(family)
    base = FAMILIES[family].build().double()
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    model.save_pretrained(tmp_path / "peft")
    fastadapt.fuse(model).save_pretrained(tmp_path / "fused")
    files = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("peft", "fused")]
    assert files[0] == files[1]
    loaded = fastadapt.fuse(PeftModel.from_pretrained(base, tmp_path / "fused").double().train())
    torch.testing.assert_close(outputs(loaded, family), outputs(model, family), **EXACT)


@every_family
def test_merge_and_unload_gives_pefts_model(family):
    model = peft_model(family)
    fused = fused_copy(model)
    merged, expected = fused.merge_and_unload(), model.merge_and_unload()
    assert kinds(merged) == set()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in merged.state_dict().items())


@every_family
def test_disabled_and_merged_adapters(family):
    model = peft_model(family).eval()
    fused = fused_copy(model)
    with model.disable_adapter(), fused.disable_adapter():
        disabled = outputs(model, family)
        torch.testing.assert_close(outputs(fused, family), disabled, **EXACT)
    assert not torch.allclose(outputs(fused, family)[0], disabled[0])
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(model, change)()
        getattr(fused, change)()
        torch.testing.assert_close(outputs(fused, family), outputs(model, family), **EXACT)


@every_family
def test_adapters_added_switched_combined_and_deleted_after_fusing(family):
    model = peft_model(family)
    fused = fused_copy(model)
    for each in (model, fused):
        torch.manual_seed(4)
        second = LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, target_modules=list(FAMILIES[family].targets))
        each.add_adapter("second", second)
        each.double()
    seen = []
    for active in ("default", "second", ["default", "second"], "default"):
        for each in (model, fused):
            each.base_model.set_adapter(active)
        found, expected = step(fused, family), step(model, family)
        torch.testing.assert_close(found, expected, **EXACT)
        seen.append(found[0][0])
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
    assert torch.equal(seen[0], seen[3])
    for each in (model, fused):
        each.delete_adapter("default")
        each.set_adapter("second")
    torch.testing.assert_close(outputs(fused, family), outputs(model, family), **EXACT)


@every_family
def test_mixed_batches_run_as_pefts(family):
    model = peft_model(family).eval()
    fused = fused_copy(model)
    names = ["default", "__base__"]
    mixed = [each(**batch(family), adapter_names=names).to_tuple()[0] for each in (fused, model)]
    torch.testing.assert_close(*mixed, **EXACT)


@every_family
def test_scaling_changes_reach_the_next_call(family):
    model = peft_model(family)
    fused = fused_copy(model)
    for each in (model, fused):
        for layer in each.modules():
            if isinstance(layer, Linear):
                layer.scale_layer(0.5)
    torch.testing.assert_close(outputs(fused, family), outputs(model, family), **EXACT)


@every_family
def test_dora_is_left_alone_and_reported(family):
    model = peft_model(family, use_dora=True)
    with pytest.warns(UserWarning, match="left .* to PEFT: DoraLinearVariant is not plain LoRA"):
        fused = fused_copy(model)
    assert kinds(fused) == {Linear}
    assert {(row.path, row.reason) for row in fastadapt.explain(fused).rows} == {
        ("PEFT", "DoraLinearVariant is not plain LoRA")
    }
    torch.testing.assert_close(step(fused, family), step(model, family), **EXACT)


@every_family
def test_compiled_without_a_graph_break(family):
    fused = fastadapt.fuse(peft_model(family, lora_dropout=0.1))
    expected = step(fused, family)
    fused.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(fused, family), expected, **EXACT)


@every_family
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same_masks(family, use_reentrant):
    fused = fastadapt.fuse(peft_model(family, lora_dropout=0.1))
    expected = step(fused, family)
    fused.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    fused.enable_input_require_grads()
    torch.testing.assert_close(step(fused, family), expected, **EXACT)


def error(found: tuple[list, dict], exact: tuple[list, dict]) -> float:
    """Norm of the difference of all outputs and gradients."""
    pairs = zip([*found[0], *found[1].values()], [*exact[0], *exact[1].values()])
    return sum(float((a.double() - b).square().sum()) for a, b in pairs if b is not None) ** 0.5


@every_family
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 base", "autocast"])
def test_half_precision_is_as_exact_as_pefts_and_of_its_dtypes(family, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = peft_model(family, dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fused, exact = fused_copy(model), step(copy.deepcopy(model).double(), family)
    assert {row.path for row in fastadapt.explain(fused).rows} == {"fastadapt native"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = step(fused, family, dtype), step(model, family, dtype)
    for tensor, other in zip(found[0], expected[0], strict=True):  # under autocast the blocks' stream is in its dtype
        assert tensor.dtype == other.dtype or (autocast and tensor.dtype == torch.bfloat16)
    assert {grad.dtype for grad in found[1].values() if grad is not None} == {torch.float32}
    allowed = error(expected, exact)
    if autocast:  # the blocks' stream is in bfloat16, as a bfloat16 model's is
        allowed = max(allowed, error(step(copy.deepcopy(model).bfloat16(), family, torch.bfloat16), exact))
    assert error(found, exact) <= 1.5 * allowed


@every_family
def test_deepcopy_and_state_dict_keep_their_meaning(family):
    fused = fastadapt.fuse(peft_model(family))
    expected = outputs(fused, family)
    twin = copy.deepcopy(fused)
    assert kinds(twin) == {FusedLinear}
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    plain = peft_model(family, init_lora_weights=True)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (twin, plain):
        torch.testing.assert_close(outputs(each, family), expected, **EXACT)


def test_adapters_that_transformers_added_are_fused_too():
    torch.manual_seed(0)
    model = FAMILIES["vit"].build()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=list(FAMILIES["vit"].targets)))
    fused = fused_copy(model.double())
    assert kinds(fused) == {FusedLinear}
    torch.testing.assert_close(step(fused, "vit"), step(model, "vit"), **EXACT)


def gradients(model: nn.Module, examples: slice) -> dict[str, torch.Tensor]:
    """Gradients of a loss that sums over some of the batch's examples."""
    found = model(pixel_values=batch("vit")["pixel_values"][examples]).last_hidden_state
    (found * torch.linspace(-1, 1, found[0].numel(), dtype=found.dtype).view_as(found[0])).sum().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(fastadapt.fuse(peft_model("vit")))
    torch.save(gradients(model, slice(rank, rank + 1)), os.path.join(folder, f"grads{rank}.pt"))
    del model  # outliving the process group, it would end that with the GIL held, for which gloo's thread may wait
    torch.distributed.destroy_process_group()


def test_two_ddp_processes_average_the_gradients(tmp_path: pathlib.Path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    total = gradients(fastadapt.fuse(peft_model("vit")), slice(None))
    average = {name: grad / 2 for name, grad in total.items()}
    assert min(grad.abs().max() for grad in average.values()) > 1e-3
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"grads{rank}.pt", weights_only=True), average, **EXACT)
