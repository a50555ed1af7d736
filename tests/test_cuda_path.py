"""The CUDA path without a GPU: whole steps on fake CUDA tensors, which have device, type and shape, but no values.

For every encoder, head, interaction, loss and precision this sees tensors left on the wrong device, types that autocast
gives, waits for the device, and work that is left to the CPU. Waits, copies and CPU work have to be in a list below,
and what the list names has to occur: it may only shrink. Fake CUDA tensors have no backward pass; what of that would
wait is looked for on the CPU. Out of sight are several ranks and what kernels compute: see test_cuda.py.
"""

import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_structure import ROOT
from tiny_models import CASES, SIZES, batch, make_model, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import step
from engine.data import autocast
from engine.distributed import World
from engine.step import Shares, Trainer, trade
from modules.encoders import ENCODERS
from modules.encoders.base import Conventions, frame_places
from modules.encoders.internvideo import VideoClipSizes
from modules.heads import HEADS, INTERACTIONS
from modules.losses import LOSSES
from modules.optim import BertAdam, parameter_groups
from modules.representation import as_float32, as_parts
from modules.transformer import Attention
from plugins import from_flags

PARTS = tuple(f"{ROOT}/{part}" for part in ("engine", "modules"))
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.item.default, aten.equal.default}
# The size of what they give depends on values: the host waits to know it.
SIZED = {aten.nonzero.default, aten.masked_select.default, aten.repeat_interleave.Tensor, aten._unique2.default}
SIZED |= {aten.masked_scatter_backward.default, aten.unique_consecutive.default, aten.unique_dim.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

# Place in the code -> why the host waits there, why something is copied to the device, why the CPU computes.
WAITS = {
    "engine/step.py step": "the one that reads the loss and the norm; after it fp16's GradScaler reads what it found",
    "modules/model.py similarity": "evaluation: each finished block of the matrix goes to the CPU",
}
TRANSFERS = {
    "engine/step.py move": "the batch",
    "modules/losses/cdcr.py chosen_token": "--cdcr 1: the numbers drawn, on the CPU, so that all ranks draw the same",
}
CPU_WORK = {"modules/model.py similarity aten.copy_.default": "evaluation: the matrix is put together there"}
TEMPORAL = ("meanP", "seqLSTM", "seqTransf")
CDCR = [(("meanP", kind, "2d"), n) for kind in ("no", *INTERACTIONS) for n in (1, 2, 3)]
STEPS = [
    *((case, "bf16 pieces checkpoints", {}) for case in CASES),
    *((case, "fp16", {}) for case in CASES[5:]),
    *((case, how, {}) for case in CASES[:5] for how in ("bf16", "fp16 pieces", "fp32", "half")),
    *((case, "bf16", {"cdcr": n}) for case, n in CDCR),
    *((case, "fp32", {"read_padding": True, "source_frames": 6}) for case in CASES if case[2] == "evl"),
    *((("meanP", "wti", tower), "bf16", {"mask_padding": False, "source_words": 12}) for tower in ("2d", "evl")),
]


def place() -> str:
    """The file and function of the project that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        name, code = frame.f_code.co_filename, frame.f_code.co_name
        if name.startswith(PARTS) and not code.startswith("<"):
            return f"{name.removeprefix(str(ROOT) + '/')} {code}"
        frame = frame.f_back
    return "tests"


def tensors(values) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def device_of(x: torch.Tensor) -> str:
    return x.fake_device.type if isinstance(x, FakeTensor) else x.device.type


def waits(func, args) -> bool:
    """Whether the host would wait for the device, were the tensors CUDA's."""
    indices = tensors(args[1]) if func in INDEXED else []
    return func in READS | SIZED or any(x.dtype in (torch.bool, torch.uint8) for x in indices)


class Watch(TorchDispatchMode):
    """Counts, by the place in the code, waits, copies to the device and computation on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.waits, self.transfers, self.cpu_work = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a fake tensor
            return func(*args, **kwargs)
        given = {device_of(x) for x in tensors((args, kwargs))}
        if "cuda" in given and waits(func, args):
            assert func in READS, f"{place()} waits for the size of {func}"
            self.waits[place()] += 1
            return 0.0 if args[0].is_floating_point() else 0  # a fake tensor has no value to give
        out = func(*args, **kwargs)
        made = {device_of(x) for x in tensors(out)}
        if "cuda" in given and "cpu" in made:
            self.waits[place()] += 1
        elif given == {"cpu"} and "cuda" in made:
            self.transfers[place()] += 1
        elif given == {"cpu"} and not func.is_view:
            self.cpu_work[f"{place()} {func}"] += 1
        return out


def fake_backward(loss, *_, **__) -> None:
    """Gives every leaf that the loss depends on a gradient of zeros."""
    todo, seen = [x.grad_fn for x in (loss if isinstance(loss, list) else [loss])], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)
            todo += [following for following, _ in node.next_functions]


def places_on_the_cpu(mask: torch.Tensor) -> torch.Tensor:
    """All slots but one, as fake masks have no values."""
    assert mask.device.type == "cpu", "where the real frames are has to be asked while the mask is on the CPU"
    return torch.empty(mask.numel() - 1, dtype=torch.int64)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """What asks the driver is told that there is a card; what needs values or the backward engine is stood in for."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # its LSTM asks for the driver's version
    monkeypatch.setattr(torch.Tensor, "backward", fake_backward)
    monkeypatch.setattr(torch.autograd, "backward", fake_backward)
    monkeypatch.setattr(step, "frame_places", places_on_the_cpu)
    monkeypatch.setattr(step, "random_state", lambda device: {})  # of no tensor
    monkeypatch.setattr(step, "set_random_state", lambda state, device: None)


def loaded_batch() -> SimpleNamespace:
    """As the loader gives it: on the CPU."""
    ids, words = torch.zeros(4, 9, dtype=torch.int64), torch.ones(4, 9, dtype=torch.bool)
    frames, mask = torch.zeros(4, 4, 3, 16, 16, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.bool)
    return SimpleNamespace(token_ids=ids, token_mask=words, frames=frames, frame_mask=mask, video_ids=())


def model_of(case: tuple[str, str, str], settings: dict) -> torch.nn.Module:
    """The models of tiny_models, in training mode, with any conventions."""
    sim_header, interaction, tower = case
    name, options = ("internvideo", {}) if tower == "evl" else ("clip", {"linear_patch": tower})
    shallow = replace(SIZES, vision_layers=1, text_layers=1)
    sizes = VideoClipSizes(**vars(shallow), read_after=(0,)) if tower == "evl" else shallow
    conventions = Conventions(**{k: v for k, v in settings.items() if hasattr(Conventions(), k)})
    encoder = ENCODERS[name](sizes, "quick_gelu", from_flags(ENCODERS[name].Options, options), conventions)
    return make_model(encoder, sim_header, interaction, cross_num_hidden_layers=1, **settings)


def in_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """cuDNN's LSTM takes autocast, whatever its type, for float16."""
    assert inputs[0].dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def run_on_fakes(case: tuple[str, str, str], how: str, settings: dict) -> Watch:
    """A step and an evaluation of a model on fake CUDA tensors, with what has to hold of each."""
    precision, *ways = how.split()
    with FakeTensorMode(allow_non_fake_inputs=False), Watch() as watch:
        with CUDA:
            model = model_of(case, settings)
        for module in model.modules():
            if isinstance(module, nn.LSTM):
                module.register_forward_pre_hook(in_float32)
        if precision == "half":
            model.clip.to_half()
        optimizer = BertAdam(parameter_groups(model.named_parameters(), 1e-4, 1e-3, 0.2), lr=1e-4)
        trade(model, CUDA, "checkpoints" in ways, compile_blocks=False)
        trainer = Trainer(model, optimizer, World(0, 1, CUDA), precision, 1.0, 2 if "pieces" in ways else 1)
        loaded, shares = loaded_batch(), Shares([4], 0, 9, 4)
        watch.start()  # what building takes counts for nothing
        original = trainer.backward

        def backward(*given):
            loss = original(*given)
            assert (loss.device, loss.dtype) == (CUDA, torch.float32)
            return loss

        trainer.backward = backward
        trainer.step(loaded, shares)
        updated = [p for p in model.parameters() if optimizer.state[p]]
        assert len(updated) > 20
        for p in updated:
            for name in ("next_m", "next_v"):
                assert (optimizer.state[p][name].device, optimizer.state[p][name].dtype) == (CUDA, p.dtype)
        everything = (*list(vars(loaded).values())[:4], places_on_the_cpu(loaded.frame_mask))
        ids, words, *clips = (x.to(CUDA) for x in everything)
        with torch.inference_mode(), autocast(CUDA, precision):
            text, video = as_float32(model.encode_text(ids, words)), as_float32(model.encode_video(*clips))
            assert {x.device for x in (*as_parts(text), *as_parts(video))} == {CUDA}
            found = model.similarity(text, video, memory_mb=1)
        assert (found.device.type, found.dtype) == ("cpu", torch.float32)
    return watch


def test_steps_on_fake_cuda_tensors(no_gpu_needed):
    """All models and precisions: no device error, and what waits, is copied or computed on the CPU is in the lists."""
    found = {"waits": Counter(), "transfers": Counter(), "cpu_work": Counter()}
    for case, how, settings in STEPS:
        try:
            watch = run_on_fakes(case, how, settings)
        except Exception as error:
            raise AssertionError(f"{case} in {how} with {settings}: {error}") from error
        for kind, counter in found.items():
            counter.update(getattr(watch, kind))
    places = {kind: {name for name in counter if not name.startswith("tests")} for kind, counter in found.items()}
    assert places == {"waits": set(WAITS), "transfers": set(TRANSFERS), "cpu_work": set(CPU_WORK)}


def test_every_part_is_among_the_steps():
    towers = {"internvideo" if case[2] == "evl" else "clip" for case, *_ in STEPS}
    assert set(ENCODERS) == towers
    assert set(HEADS) == {case[0] for case, *_ in STEPS}
    assert {"no", *INTERACTIONS} == {case[1] for case, *_ in STEPS}
    assert set(LOSSES) == {"cdcr" if settings.get("cdcr") else "contrastive" for *_, settings in STEPS}


class WouldWait(TorchDispatchMode):
    """Fails for what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not waits(func, args), f"{func} at {place()}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("case", "cdcr"), [*((case, 0) for case in CASES), *CDCR])
def test_nothing_waits_on_the_way_back(case, cdcr):
    """Forward and backward on the CPU, with the clips' places given."""
    model, arrays = tiny_model(*case, cdcr=cdcr).train(), batch()
    places, draws = frame_places(arrays[3]), torch.Generator().manual_seed(0)
    with WouldWait():
        model(*arrays, places, draws).backward()
    assert model.clip.visual.positional_embedding.grad.abs().sum() > 0


class Copies(TorchDispatchMode):
    """Counts the numbers that are copied to other places, and no more than that."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (
            aten.clone.default,
            aten.copy_.default,
            aten.cat.default,
            aten.stack.default,
            aten._to_copy.default,
        ):
            self.numbers += out.numel()
        return out


def test_attention_copies_the_gradients_of_queries_keys_and_values_once():
    """They come as three tensors and leave as one: 3 x 5 x 7 x 64 numbers. Splitting views costs nothing."""
    layer, x = Attention(64, 4), torch.randn(5, 7, 64, requires_grad=True)
    with Copies() as there:
        out = layer(x)
    with Copies() as back:
        out.sum().backward()
    assert there.numbers <= 0
    assert back.numbers <= 3 * x.numel()
