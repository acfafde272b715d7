"""Every lever on memory: on and off give the same results up to what the lever may change, and it saves something."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import tiny_model
from helpers.building import disturb, parts_of, rolled_out, rows, updated, write
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import train_dag
from dag.chain.trajectory import ChainStore
from dag.errors import RunError, UsageError
from dag.models.levers import choose_attention, compilations
from dag.recipe import Recipe, is_scored
from dag.run.determinism import deterministic
from dag.run.folder import RunFolder
from dag.training.build import Components

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The section `model` for levers that act block by block: a network of several."""
    return {"path": str(tiny_model.build(tmp_path_factory.mktemp("deep_model"), is_deep=True))}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def states(parts: Components, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs (x_t, t, text) of `predict`."""
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(count, *parts.policy.latent_shape, generator=generator)
    return x_t, parts.policy.schedule.timesteps[1].expand(count), parts.text[torch.arange(count) % len(parts.text)]


def gradients(parts: Components) -> list[Tensor]:
    """The gradients of the adapter for the sum of a prediction's squares."""
    for parameter in parts.policy.trainable():
        parameter.grad = None
    parts.policy.predict(*states(parts)).branches.float().square().sum().backward()
    parts.policy.weights.gather()
    return [p.grad.clone() for p in parts.policy.trainable() if p.grad is not None]


def saved_bytes(parts: Components) -> int:
    """Bytes of the tensors that a prediction keeps for its backward pass, each storage once, without weights."""
    seen: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in parts.policy.denoiser.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = parts.policy.predict(*states(parts))
    del kept
    return sum(seen.values())


# -- activations --------------------------------------------------------------------------------------------------


def test_checkpointing_saves_activations_and_changes_no_bit(make_recipe: MakeRecipe, deep: dict[str, str]) -> None:
    found, kept = [], []
    for kind in ("none", "selective", "full"):
        parts = parts_of(make_recipe(model=deep, memory={"checkpointing": kind}))
        disturb(parts)
        found.append(gradients(parts))
        kept.append(saved_bytes(parts))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    assert kept[0] > kept[1] > kept[2]


def test_memory_layout_changes_rounding_alone(make_recipe: MakeRecipe) -> None:
    found = []
    for channels_last in (True, False):
        parts = parts_of(make_recipe(memory={"channels_last": channels_last}))
        disturb(parts)
        weight = parts.policy.denoiser.get_parameter("conv_in.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) or not channels_last
        assert weight.is_contiguous() or channels_last
        found.append(gradients(parts))
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-5 * scale


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)],
)
def test_compiled_blocks_change_rounding_alone(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """This includes predictions without the adapter, whose switch is inside the compiled blocks.

    The graphs of both passes are traced and run; inductor's code for a CPU takes half a minute of g++.
    """
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found, pretrained = [], []
    for is_compiled in (False, True):
        parts = parts_of(make_recipe(memory={"compile": is_compiled}))
        disturb(parts)
        blocks = [m for m in parts.policy.denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
        assert all((block._compiled_call_impl is not None) == is_compiled for block in blocks)
        found.append(gradients(parts))
        with torch.no_grad():
            pretrained.append(parts.policy.predict(*states(parts), pretrained=True).branches)
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-5 * scale
    torch.testing.assert_close(*pretrained, rtol=1e-4, atol=1e-5)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile with dynamo but without generated code; dynamo's settings are restored."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield
    torch._dynamo.reset()


def call_patterns(parts: Components, most: int) -> None:
    """Call `predict` for 1 to `most` rows with all combinations that training needs."""
    for count in range(1, most + 1):
        parts.policy.predict(*states(parts, count))
        with torch.no_grad():
            parts.policy.predict(*states(parts, count))
            parts.policy.predict(*states(parts, count), pretrained=True)
            parts.policy.predict(*states(parts, count), unguided=True)


def test_every_call_pattern_is_compiled_once(
    make_recipe: MakeRecipe, deep: dict[str, str], quick_compiler: None
) -> None:
    """With dynamo's default limit of 8, further call patterns would run uncompiled, with a warning in a log only."""
    parts = parts_of(make_recipe(model=deep, memory={"compile": True}))
    call_patterns(parts, 3)
    found = compilations()
    assert found["graphs"] > 8
    assert found["graphs"] == 1 + found["recompilations"]
    assert found["graph_breaks"] == 0
    call_patterns(parts, 3)
    assert compilations() == found


def test_one_call_pattern_too_many_ends_in_one_line(make_recipe: MakeRecipe, quick_compiler: None) -> None:
    parts = parts_of(make_recipe(memory={"compile": True}))
    with (
        torch._dynamo.config.patch(recompile_limit=3),
        pytest.raises(RunError, match=r"^memory\.compile: the network was called in more than 3 ways, [^\n]*$"),
    ):
        call_patterns(parts, 3)


def test_the_whole_unet_is_compiled_at_fixed_shapes(make_recipe: MakeRecipe, quick_compiler: None) -> None:
    """With checkpoints, whose second forward pass must not be another graph."""
    memory = {"checkpointing": "full"}
    plain, compiled = (parts_of(make_recipe(memory={"compile": kind, **memory})) for kind in (False, "unet"))
    for parts in (plain, compiled):
        disturb(parts)
    inner = [module for module in compiled.policy.denoiser.modules() if module._compiled_call_impl is not None]
    assert inner == [compiled.policy.denoiser]
    for ours, theirs in zip(gradients(plain), gradients(compiled), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        for count in (2, 3):
            compiled.policy.predict(*states(compiled, count))
    assert compilations() == {"graphs": 3, "recompilations": 2, "graph_breaks": 0}


def test_a_run_counts_its_graphs(make_recipe: MakeRecipe, quick_compiler: None, tmp_path: Path) -> None:
    recipe = make_recipe(memory={"compile": True}, train={"epochs": 1}, evaluation={"every": 9})
    assert train_dag.main(["--recipe", write(recipe, tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/run.json").read_text())
    assert found["recipe"]["memory"]["compile"] is True
    assert found["compiled"].keys() == {"graphs", "recompilations", "graph_breaks"}
    assert found["compiled"]["graphs"] > 1


# -- the same bits ------------------------------------------------------------------------------------------------


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_determinism_is_switched_and_switched_back(monkeypatch: pytest.MonkeyPatch, workspace: str | None) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with deterministic(False):
        assert settings() == before
    with suppress(KeyError), deterministic(True):
        assert settings() == (True, False, False, False, False, ":4096:8")
        raise KeyError
    assert settings() == before


def test_a_deterministic_run_is_on_a_cpu_the_same_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The deterministic setting holds from before the model is loaded until the run ends, and not after it."""
    (tmp_path / "mine.py").write_text(
        "import torch\ndef show():\n"
        f"    with open({str(tmp_path / 'seen')!r}, 'a') as file:\n"
        "        print(torch.are_deterministic_algorithms_enabled(), file=file)\n"
        "def score(images, prompts):\n    show()\n    return images.mean((1, 2, 3))\n"
        "show()\n"
    )
    sections: dict[str, Any] = {"reward": {"name": "custom", "path": f"{tmp_path / 'mine.py'}:score"}}
    sections |= {"train": {"epochs": 1, "rollout": "one_pass"}, "evaluation": {"every": 9}}
    for is_on in (False, True):
        recipe = make_recipe(**sections).model_copy(update={"deterministic": is_on})
        run = tmp_path / str(is_on)
        assert train_dag.main(["--recipe", write(recipe, tmp_path / "r.yaml"), "--out", str(run)]) == 0
        assert not torch.are_deterministic_algorithms_enabled()
        seen = (tmp_path / "seen").read_text().split()
        assert len(seen) > 2
        assert set(seen) == {str(is_on)}
        (tmp_path / "seen").unlink()
    assert rows(tmp_path / "True") == rows(tmp_path / "False")


def test_xformers_needs_a_gpu(make_recipe: MakeRecipe) -> None:
    if torch.cuda.is_available():
        pytest.skip("it would run")
    with pytest.raises(UsageError, match="attention=xformers needs a GPU"):
        parts_of(make_recipe(memory={"attention": "xformers"}))
    assert parts_of(make_recipe()).policy.describe()["attention"].startswith("sdpa (auto")


TOO_NEW = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(1, 2, 1, 40) (torch.float32)
`fa2F@v2.5.7` is not supported because:
    dtype=torch.float32 (supported: {torch.bfloat16, torch.float16})
    requires device with capability <= (9, 0) but your GPU has capability (12, 0) (too new)
"""
TOLD = (
    "No operator found for `memory_efficient_attention_forward`; requires device with capability <= (9, 0) but your "
    "GPU has capability (12, 0) (too new)"
)


@pytest.fixture
def xformers(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], str]:
    """A function that lets diffusers try xformers on a pretended GPU, where the call raises the given error."""
    from diffusers.models import attention_processor

    class Operations:
        raises: Exception | None = None

        def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.raises is not None:
                raise self.raises
            return v

    unet, randn, operations = parts_of(make_recipe()).policy.denoiser, torch.randn, Operations()
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=operations))
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: randn(*shape))

    def choose(error: Exception | None) -> str:
        operations.raises = error
        return choose_attention(unet, "xformers", torch.device("cuda", 0))

    return choose


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError(TOO_NEW), TOLD),
        (ValueError("unsupported head size\nand more"), "unsupported head size"),
        (RuntimeError("CUDA error: no kernel image is available"), "CUDA error: no kernel image is available"),
        (AttributeError(), "AttributeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_xformers_that_cannot_run_is_one_line(
    xformers: Callable[[Exception | None], str], error: Exception, reason: str
) -> None:
    with pytest.raises(UsageError) as refused:
        xformers(error)
    expected = f"memory.attention=xformers does not run here ({reason}); use auto, PyTorch's own attention"
    assert str(refused.value) == expected


def test_xformers_that_runs_is_taken_and_memory_is_no_reason(xformers: Callable[[Exception | None], str]) -> None:
    assert xformers(None) == "xformers (asked for)"
    with pytest.raises(torch.OutOfMemoryError):
        xformers(torch.OutOfMemoryError("CUDA out of memory"))


def test_xformers_that_is_not_installed_is_one_line(
    xformers: Callable[[Exception | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models import attention_processor

    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: False)
    with pytest.raises(UsageError, match=r'xformers is not installed; pip install -e "\.\[xformers\]", or use auto'):
        xformers(None)


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits", "bound"), [("int8", 8, 0.02), ("nf4", 4, 0.25)])
def test_a_quantised_base_is_smaller_close_and_trains(
    make_recipe: MakeRecipe, deep: dict[str, str], run: RunFolder, kind: str, bits: int, bound: float
) -> None:
    pytest.importorskip("bitsandbytes")
    plain, small = (parts_of(make_recipe(model=deep, memory={"base": base})) for base in ("compute", kind))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    before, after = (parts.policy.denoiser.get_parameter(f"{name}.weight") for parts in (plain, small))
    assert after.nbytes * 32 == before.nbytes * bits
    with torch.no_grad():
        exact, found = (parts.policy.predict(*states(parts)).guided for parts in (plain, small))
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < bound
    trainer, trajectories = rolled_out(make_recipe(model=deep, memory={"base": kind}), run)
    assert float(updated(trainer, trajectories, 0)["grad_norm_policy"]) > 0
    assert set(trainer.components.policy.state_dict()) == set(plain.policy.state_dict()), (
        "the adapter has the same layers"
    )


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_states_for_policy_and_flow(
    make_recipe: MakeRecipe, deep: dict[str, str], run: RunFolder, kind: str
) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(
        model=deep, train={"optimizer": kind}, flow={"optimizer": kind, "channels": [64]}, adapter={"kind": "full"}
    )
    trainer, trajectories = rolled_out(recipe, run)
    updated(trainer, trajectories, 0)
    for stepper in trainer.components.learner.updates.optimizers():
        assert any(state["state1"].dtype == torch.uint8 for state in stepper.optimizer.state.values())


# -- guidance -----------------------------------------------------------------------------------------------------


def test_a_frozen_unconditional_branch_is_the_pretrained_one(make_recipe: MakeRecipe) -> None:
    trained, frozen = (parts_of(make_recipe(sampler={"uncond": kind})) for kind in ("trained", "frozen"))
    for parts in (trained, frozen):
        disturb(parts)
    with torch.no_grad():
        both = frozen.policy.predict(*states(frozen))
        pretrained = frozen.policy.predict(*states(frozen), pretrained=True)
        adapted = trained.policy.predict(*states(trained))
    torch.testing.assert_close(both.branches[:4], pretrained.branches[:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.branches[4:], adapted.branches[4:], rtol=1e-5, atol=1e-5)
    assert float((adapted.branches[:4] - both.branches[:4]).abs().max()) > 1e-3
    # The unconditional rows keep no graph.
    frozen.policy.predict(*states(frozen)).branches[:4].float().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in frozen.policy.trainable())


# -- pictures -----------------------------------------------------------------------------------------------------


def test_decode_batch_changes_rounding_alone(make_recipe: MakeRecipe) -> None:
    x_0 = torch.randn(5, 4, 8, 8)
    pictures = [parts_of(make_recipe(memory={"decode_batch": n})).policy.decode(x_0) for n in (None, 1, 3)]
    for other in pictures[1:]:
        torch.testing.assert_close(other, pictures[0], rtol=0, atol=1e-5)


def test_an_offloaded_vae_is_at_work_only_in_its_phase(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, moves = parts_of(make_recipe(memory={"offload_vae": True})), []
    monkeypatch.setattr(parts.policy.decoder.vae, "to", lambda device: moves.append(device.type))
    monkeypatch.setattr(parts.policy.decoder, "device", torch.device("cuda"))
    with parts.scoring():
        assert moves == ["cuda"]
    assert moves == ["cuda", "cpu"]


def test_previews_are_close_to_the_picture_and_cheaper_decoders_are_used(make_recipe: MakeRecipe) -> None:
    x_0 = torch.nn.functional.interpolate(torch.randn(3, 4, 4, 4), scale_factor=2, mode="bilinear")
    full, half = (
        parts_of(make_recipe(objective={"beta": {"value": 1.0}, "forward_looking": {"decoder": kind}})).policy
        for kind in ("full", "half")
    )
    assert torch.equal(full.preview(x_0), full.decode(x_0))
    assert torch.equal(half.decode(x_0), full.decode(x_0)), "the final picture is always decoded in full"
    assert half.preview(x_0).shape == full.preview(x_0).shape
    assert not torch.equal(half.preview(x_0), full.preview(x_0))


def test_stride_scores_fewer_states_and_holds_the_newest(make_recipe: MakeRecipe, run: RunFolder) -> None:
    assert [k for k in range(10) if is_scored(k, 10, 4)] == [0, 4, 7, 8, 9]
    sections = {"sampler": {"steps": 7}, "train": {"updates": 1}}
    looking = {"beta": {"value": 1.0}, "forward_looking": {"stride": 3}}
    _, every = rolled_out(make_recipe(**sections), run)
    _, third = rolled_out(make_recipe(**sections, objective=looking), run)
    assert every.x0_hat_reward is not None and third.x0_hat_reward is not None
    for k, scored in enumerate([0, 0, 0, 3, 4, 5, 6]):
        assert torch.equal(third.x0_hat_reward[:, k], every.x0_hat_reward[:, scored])
    assert not torch.equal(every.x0_hat_reward[:, 0], every.x0_hat_reward[:, 1])


# -- storage ------------------------------------------------------------------------------------------------------


def test_chains_are_stored_once_and_in_order() -> None:
    tiles = torch.randn(3, 5, 2, 4, 4).split([2, 2, 1], dim=1)
    store = ChainStore(3, 5, torch.device("cpu"), torch.device("cpu"))
    for tile in tiles:
        store.put(tile)
    assert torch.equal(store.finish(), torch.cat(tiles, dim=1))


def test_bytes_of_a_trajectory(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """A stored trajectory has T + 1 states, three float32 scalars for each step, a float32 reward and two int64 ids."""
    for chain, size in (("fp32", 4), ("fp16", 2)):
        recipe = make_recipe(sampler={"chain_dtype": chain})
        _, trajectories = rolled_out(recipe, run)
        steps, latent, fp32, int64 = recipe.sampler.steps, 4 * 8 * 8, 4, 8
        states, scalars = (steps + 1) * latent * size, 3 * steps * fp32
        assert trajectories.bytes_per_trajectory == states + scalars + fp32 + 2 * int64


@pytest.mark.parametrize("chains", ["device", "cpu"])
def test_where_chains_wait_changes_nothing(make_recipe: MakeRecipe, run: RunFolder, chains: Any) -> None:
    trainer, trajectories = rolled_out(make_recipe(memory={"chains": chains}), run)
    rows = torch.tensor([6, 1])
    assert torch.equal(trajectories.states(2, rows), trajectories.chain[2, rows])
    assert updated(trainer, trajectories, 0)["ratio_max_dev"] == 0.0


def test_the_fused_optimizer_goes_on_from_a_checkpoint() -> None:
    """A GPU runs `adamw` as fused AdamW, tested here in its form for a CPU; its step count is a tensor."""
    from dag.run import optimizer_state

    def optimizer_of(weights: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(weights, lr=0.1, fused=True)

    def step(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> None:
        for number, weight in enumerate(weights):
            weight.grad = torch.full_like(weight, number + 1.0) * weight.detach()
        optimizer.step()

    weights = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    first = optimizer_of(weights)
    step(first, weights)
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    second = optimizer_of(copies)
    tensors = {name: tensor.cpu().clone() for name, tensor in optimizer_state.tensors_of(first).items()}
    optimizer_state.restore(second, tensors, optimizer_state.numbers_of(first))
    for _ in range(3):
        step(first, weights)
        step(second, copies)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
