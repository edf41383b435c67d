"""What cannot be traced as others are: it is estimated, said so, and never refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from autotune.errors import ModelError, RequestError
from autotune.probe.reference import load_machine
from autotune.testing.pipelines import BUILDERS, call
from autotune.workload.architecture import describe_pipeline, find_architecture
from autotune.workload.components import build_on_meta
from autotune.workload.estimate import estimated_call
from autotune.workload.phases import trace_workload
from autotune.workload.rehearsal import Call, rehearse
from autotune.workload.request import complete_request
from autotune.workload.stage import meta_pipeline, pipeline_class
from autotune.workload.workload import ComponentRun, Request, Workload
from tests.workload.truth import truth

RequestOf = Callable[..., Request]


def traced(pipe: Any, request: Request) -> Workload:
    return trace_workload(describe_pipeline(pipe), request, pipe)


def runs_of(workload: Workload) -> dict[str, ComponentRun]:
    return {r.component: r for p in workload.phases for r in p.runs}


def estimated(workload: Workload) -> list[str]:
    return [r.component for p in workload.phases for r in p.runs if r.is_estimated]


# ---- denoisers that ask for values --------------------------------------------------------------


class Custom(UNet2DConditionModel):
    """The UNet, and something before it."""

    before: Callable[[Tensor, Any], Tensor] = staticmethod(lambda x, _: x)  # type: ignore[assignment]

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.before(sample, timestep), timestep, *args, **kwargs)


def with_unet(pipe: Any, before: Callable[[Tensor, Any], Tensor]) -> Any:
    made = type("Custom", (Custom,), {"before": staticmethod(before)}).from_config(pipe.unet.config)
    pipe.register_modules(unet=made.eval().requires_grad_(False))
    return pipe


@torch.library.custom_op("autotune_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """Has a kernel for the CPU, and none for meta tensors."""
    return x * 2


torch.library.define("autotune_tests::nowhere", "(Tensor x) -> Tensor")  # has no kernel at all


def reads_an_activation(x: Tensor, _: Any) -> Tensor:
    return x if x.abs().max().item() < 1e3 else x.clamp(-1e3, 1e3)


def goes_through_numpy(x: Tensor, _: Any) -> Tensor:
    return torch.from_numpy(x.float().cpu().numpy().copy()).to(x.device, x.dtype)


def picks_by_value(x: Tensor, _: Any) -> Tensor:
    flat = x.flatten()
    return x + flat[torch.nonzero(flat > 0).flatten()].sum() + torch.unique(flat).numel()


def has_no_meta_kernel(x: Tensor, _: Any) -> Tensor:
    return twice(x)


ASKS = [reads_an_activation, goes_through_numpy, picks_by_value, has_no_meta_kernel]


@pytest.mark.parametrize("before", ASKS, ids=lambda f: f.__name__)
def test_what_asks_for_values_is_traced_on_zeros_and_said(
    sd_pipe: Any, request_of: RequestOf, before: Any
) -> None:
    usual = runs_of(traced(sd_pipe, request_of()))["unet"].trace
    workload = traced(with_unet(sd_pipe, before), request_of())
    assert estimated(workload) == ["unet"]
    (note,) = workload.notes
    assert note.startswith(
        "denoise: unet (Custom) does what values tell it, and was traced on zeros"
    )
    found = runs_of(workload)["unet"].trace
    assert found.flops == usual.flops  # all that comes after is traced
    assert found.activation_bytes == pytest.approx(usual.activation_bytes, rel=0.2)


def black_is_refused(x: Tensor, _: Any) -> Tensor:
    if not x.any():
        raise ValueError("all black")
    return x


def no_kernel_at_all(x: Tensor, _: Any) -> Tensor:
    return torch.ops.autotune_tests.nowhere(x)


def loops_until_it_converges(x: Tensor, _: Any) -> Tensor:
    for _ in range(3):
        if bool((x > 0).any()):
            return x
        x = x + 1
    raise RuntimeError("did not converge")


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (black_is_refused, "all black"),
        (no_kernel_at_all, "autotune_tests::nowhere"),
        (loops_until_it_converges, "did not converge"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_fails_on_zeros_is_estimated_from_its_weights(
    sd_pipe: Any, request_of: RequestOf, before: Any, says: str
) -> None:
    workload = traced(with_unet(sd_pipe, before), request_of())
    assert estimated(workload) == ["unet"]
    (note,) = workload.notes
    assert note.startswith("denoise: unet (Custom) cannot be traced: ")
    assert says in note
    assert "\n" not in note
    unet = runs_of(workload)["unet"]
    assert unet.calls == 3
    (operator,) = unet.trace.operators
    assert operator.name == "estimated"
    assert operator.bytes > workload.component("unet").weight_bytes
    # The decode after it has the shapes that it would have had.
    assert not runs_of(workload)["vae"].is_estimated
    assert runs_of(workload)["vae"].trace.flops > 0


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_an_autoencoder_that_cannot_be_traced(request_of: RequestOf, method: str) -> None:
    pipe = BUILDERS["sd-img2img"]()
    usual = traced(pipe, request_of())

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image")

    made = type("Mine", (AutoencoderKL,), {method: fails}).from_config(pipe.vae.config)
    pipe.register_modules(vae=made.eval().requires_grad_(False))
    workload = traced(pipe, request_of())
    (note,) = workload.notes
    # A picture is encoded in the phase of that name, as latents are decoded in theirs.
    assert note.startswith(f"{method}: vae (Mine) cannot be traced: no kernel image")
    found = {(r.component, r.entry): r for p in workload.phases for r in p.runs}
    before = {(r.component, r.entry): r for p in usual.phases for r in p.runs}
    assert found.keys() == before.keys()
    for key, run in found.items():
        assert run.is_estimated == (key == ("vae", method))
        assert run.calls == before[key].calls
        if not run.is_estimated:  # what comes after has the shapes that it should have
            assert run.trace == before[key].trace


@pytest.mark.parametrize("name", ["sd15", "sd3-medium", "sana"])
def test_estimates_are_of_the_right_order(name: str) -> None:
    """Of what would be traced; the margin is as large as the estimate of memory."""
    architecture = find_architecture(name)
    request = complete_request(architecture, load_machine("cpu-16-cores"))
    modules = {
        n: build_on_meta(n, component, torch.float32)
        for n, component in architecture.components.items()
    }
    compared: set[str] = set()

    def compare(call: Call) -> Any:
        trace, out, _ = call.trace()
        role = "autoencoder" if call.entry == "decode" else "denoiser"
        guess, _ = estimated_call(call, "encoder" if "text" in call.component else role)
        assert trace.flops / 5 < guess.flops < trace.flops * 5, call.component
        least, most = trace.activation_bytes / 2, trace.activation_bytes * 4
        assert least < guess.activation_bytes < most, call.component
        compared.add(call.component)
        return out

    pipe = meta_pipeline(architecture, pipeline_class(architecture), modules)
    rehearse(pipe, request, compare)
    assert compared == set(architecture.components)


def knows_the_time(x: Tensor, timestep: Any) -> Tensor:
    """What depends on the timestep, a mask or a position alone is known to a trace."""
    if timestep.item() < 1e4 and bool((torch.arange(4, device=x.device) < 4).all()):
        return x
    raise RuntimeError("not reached")


def counts_a_mask(x: Tensor, _: Any) -> Tensor:
    mask = torch.zeros(x.shape[0], 8, dtype=torch.bool, device=x.device)
    mask[:, :5] = True
    kept = int(mask.sum(dim=1).max())
    return x + x.new_ones(x.shape[0], 8)[mask].view(x.shape[0], kept).mean()


@pytest.mark.parametrize("before", [knows_the_time, counts_a_mask], ids=lambda f: f.__name__)
def test_what_is_known_is_no_estimate(sd_pipe: Any, request_of: RequestOf, before: Any) -> None:
    workload = traced(with_unet(sd_pipe, before), request_of())
    assert estimated(workload) == []
    assert workload.notes == ()


# ---- modules that their configuration does not describe -----------------------------------------


class Lora(nn.Module):
    """A linear layer with an adapter, as PEFT puts it in its place."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(pipe: Any) -> int:
    """Put adapters into all query projections; returns how many parameters they have."""
    before = sum(p.numel() for p in pipe.unet.parameters())
    for module in list(pipe.unet.modules()):
        if isinstance(getattr(module, "to_q", None), nn.Linear):
            module.to_q = Lora(module.to_q)
    return sum(p.numel() for p in pipe.unet.parameters()) - before


def test_adapters_are_traced_as_they_are(sd_pipe: Any, request_of: RequestOf) -> None:
    plain = traced(sd_pipe, request_of())
    more = adapt(sd_pipe)
    workload = traced(sd_pipe, request_of())
    assert estimated(workload) == []
    unet, before = workload.component("unet"), plain.component("unet")
    assert unet.parameters == before.parameters + more
    assert unet.weight_bytes == before.weight_bytes + 4 * more
    assert runs_of(workload)["unet"].trace.flops > runs_of(plain)["unet"].trace.flops
    (step,) = {c.peak_without_scratch_bytes for c in drawn(sd_pipe) if c.component == "unet"}
    assert runs_of(workload)["unet"].trace.activation_bytes == pytest.approx(step, rel=0.01)


def drawn(pipe: Any) -> Any:
    return truth(pipe, lambda: call(pipe, 3), rounding=512)


class Plain(nn.Module):
    """A denoiser that no library knows, whose configuration is nothing JSON could carry."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, time_cond_proj_dim=None, sample_size=16)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, t: Any, **_: Any) -> Any:
        return (self.convolution(sample) * t.float().cos(),)


def test_a_denoiser_of_ones_own(sd_pipe: Any, request_of: RequestOf) -> None:
    sd_pipe.unet = Plain().requires_grad_(False)
    architecture = describe_pipeline(sd_pipe)
    assert architecture.components["unet"].class_name == "Plain"
    assert architecture.components["unet"].config == {}
    workload = trace_workload(architecture, request_of(), sd_pipe)
    assert estimated(workload) == []
    assert workload.component("unet").parameters == 4 * 4 * 9 + 4
    (step,) = {c.peak_without_scratch_bytes for c in drawn(sd_pipe) if c.component == "unet"}
    assert runs_of(workload)["unet"].trace.activation_bytes == pytest.approx(step, rel=0.01)
    with pytest.raises(ModelError, match=r"cannot build unet \(Plain\) from its conf"):
        trace_workload(architecture, request_of())


def test_what_offloads_a_loaded_pipeline_is_left_alone(
    sd_pipe: Any, request_of: RequestOf, snapshot: Callable[[Any], Any]
) -> None:
    adapt(sd_pipe)
    plain = traced(sd_pipe, request_of())
    sd_pipe.enable_sequential_cpu_offload(device="cpu")
    before = snapshot(sd_pipe)
    workload = traced(sd_pipe, request_of())
    assert snapshot(sd_pipe) == before
    assert workload.phases == plain.phases
    assert workload.components == plain.components


# ---- dtypes -------------------------------------------------------------------------------------


def test_each_component_in_its_own_dtype(sd_pipe: Any, request_of: RequestOf) -> None:
    for name in ("unet", "vae"):
        getattr(sd_pipe, name).to(torch.bfloat16)
    architecture = describe_pipeline(sd_pipe)
    dtypes = {n: c.dtype for n, c in architecture.components.items()}
    assert dtypes == {"unet": "", "vae": "", "text_encoder": "float32"}
    for pipe in (sd_pipe, None):
        workload = trace_workload(architecture, request_of(dtype="bfloat16"), pipe)
        for component in workload.components:
            module = getattr(sd_pipe, component.name)
            tensors = (*module.parameters(), *module.buffers())
            assert component.weight_bytes == sum(t.nbytes for t in tensors)
        runs = runs_of(workload)
        assert {o.dtype for o in runs["text_encoder"].trace.operators} >= {"float32"}
        assert "float32" not in {o.dtype for o in runs["vae"].trace.operators}


def test_layers_that_were_left_wider(sd_pipe: Any, request_of: RequestOf) -> None:
    sd_pipe.to(torch.bfloat16)
    sd_pipe.unet.conv_norm_out.float()
    workload = traced(sd_pipe, request_of(dtype="bfloat16"))
    tensors = (*sd_pipe.unet.parameters(), *sd_pipe.unet.buffers())
    assert workload.component("unet").weight_bytes == sum(t.nbytes for t in tensors)


def test_weights_stored_in_eight_bits_are_counted_so(request_of: RequestOf) -> None:
    pipe = BUILDERS["flux"]()
    pipe.to(torch.bfloat16)
    plain = traced(pipe, request_of(dtype="bfloat16", guidance_scale=3.5))
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    )
    workload = traced(pipe, request_of(dtype="bfloat16", guidance_scale=3.5))
    real = sum(p.nbytes for p in pipe.transformer.parameters())
    assert workload.component("transformer").weight_bytes == real
    assert real < 0.8 * plain.component("transformer").weight_bytes
    assert workload.notes == (
        "transformer: its weights are packed; what it takes to unpack them is not counted",
    )
    # Each layer computes in 16 bits.
    traces = [runs_of(w)["transformer"].trace for w in (workload, plain)]
    assert traces[0] == traces[1]


class Packed(nn.Parameter):
    """As bitsandbytes keeps a matrix: two values in each byte, in one column."""


def test_packed_weights_are_counted_as_they_are_and_traced_as_they_compute(
    request_of: RequestOf,
) -> None:
    pipe = BUILDERS["flux"]()
    plain = traced(pipe, request_of(guidance_scale=3.5))
    spared = 0
    for module in pipe.transformer.modules():
        if isinstance(module, nn.Linear):
            size = module.weight.numel()
            module.weight = Packed(torch.zeros(size // 2, 1, dtype=torch.uint8), False)
            spared += 4 * size - size // 2
    workload = traced(pipe, request_of(guidance_scale=3.5))
    assert estimated(workload) == []
    size = workload.component("transformer").weight_bytes
    assert size == plain.component("transformer").weight_bytes - spared
    assert runs_of(workload)["transformer"].trace == runs_of(plain)["transformer"].trace


# ---- pipelines of the user's own ----------------------------------------------------------------


class Twice(StableDiffusionPipeline):
    """Keeps something on itself, and draws a second time over what it drew."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(self.rounds):
            drawn = super().__call__(*args, **kwargs)
        return drawn


def become(pipe: Any, cls: type, **attributes: Any) -> Any:
    pipe.__class__ = cls
    for name, value in attributes.items():
        setattr(pipe, name, value)
    return pipe


def test_a_pipeline_class_of_ones_own_is_rehearsed(
    sd_pipe: Any, request_of: RequestOf, snapshot: Callable[[Any], Any]
) -> None:
    become(sd_pipe, Twice, rounds=2)
    before = snapshot(sd_pipe)
    workload = traced(sd_pipe, request_of())
    assert workload.notes == ()
    # What comes between the first step and the last is of that phase: the first round's decode too.
    assert [(p.name, r.component, r.calls) for p in workload.phases for r in p.runs] == [
        ("encode", "text_encoder", 2),
        ("denoise", "unet", 6),
        ("denoise", "vae", 1),
        ("denoise", "text_encoder", 2),
        ("decode", "vae", 1),
    ]
    assert snapshot(sd_pipe) == before


def test_parts_that_were_never_registered(sd_pipe: Any, request_of: RequestOf) -> None:
    class Mine:
        """No pipeline of diffusers', but it has one's parts and is called like one."""

        def __init__(self, pipe: Any) -> None:
            self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
            self.scheduler, self.tokenizer = pipe.scheduler, pipe.tokenizer

        def __call__(self, prompt: str, num_inference_steps: int = 4) -> Any:
            ids = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
            text = self.text_encoder(ids)[0]
            x = torch.randn(1, 4, 16, 16)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                noise = self.unet(x, t, text, return_dict=False)[0]
                x = self.scheduler.step(noise, t, x).prev_sample
            return x

    pipe = Mine(sd_pipe)
    workload = traced(pipe, request_of())
    assert workload.notes == ()
    assert {n: r.calls for n, r in runs_of(workload).items()} == {"text_encoder": 1, "unet": 3}


class Diffuses(nn.Module):
    """Neither its name nor its arguments say that it denoises."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, sigma: Any) -> Tensor:
        return self.convolution(x) * sigma


class Bare:
    """A pipeline of one module, and of a picture that it is given afterwards."""

    def __init__(self) -> None:
        self.model, self.looker = Diffuses(), nn.Linear(4, 4)

    def __call__(self, num_inference_steps: int = 4, fails: bool = False) -> Any:
        x = torch.randn(1, 4, 16, 16)
        for i in range(num_inference_steps):
            x = self.model(x, i / num_inference_steps)
        if fails:
            raise OSError("no camera")
        return self.looker(x.mean((2, 3)))


@pytest.mark.parametrize("fails", [False, True])
def test_a_denoiser_that_nothing_names(request_of: RequestOf, fails: bool) -> None:
    options = {"fails": True} if fails else {}
    workload = traced(Bare(), request_of(options=options))
    denoise = next(p for p in workload.phases if p.name == "denoise")
    assert [(r.component, r.role, r.calls) for r in denoise.runs] == [("model", "denoiser", 3)]
    assert bool(workload.notes) == fails
    assert estimated(workload) == (["model"] if fails else [])


# ---- pipelines that cannot be rehearsed ---------------------------------------------------------


class OpensAFile(StableDiffusionPipeline):
    def __call__(self, prompt: Any, height: int = 64, width: int = 64, **_: Any) -> Any:
        return Path(prompt).read_text()


class NeedsAPackage(StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torchsde_of_another_name  # noqa: F401


class ReadsWhatItDraws(StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        image = super().__call__(*args, **kwargs).images
        if float(image.mean()) == 0:
            raise RuntimeError("drew nothing")


class CallsNothing(StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (OpensAFile, "[Errno 2] No such file"),
        (NeedsAPackage, "No module named 'torchsde_of_another_name'"),
        (ReadsWhatItDraws, "drew nothing"),
        (CallsNothing, "it never called a denoiser"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_the_usual_is_assumed_and_said(
    sd_pipe: Any, request_of: RequestOf, cls: type, says: str
) -> None:
    usual = traced(sd_pipe, request_of())
    workload = traced(become(sd_pipe, cls), request_of())
    (note,) = workload.notes
    assert note.startswith(f"{cls.__name__} cannot be rehearsed ({says}")
    assert "assumed: each text encoder once, and once more for guidance" in note
    assert [p.name for p in workload.phases] == ["encode", "denoise", "decode"]
    assert set(estimated(workload)) == {"text_encoder", "unet", "vae"}
    assert workload.components == usual.components
    assert workload.offload_order == usual.offload_order
    for name, run in runs_of(workload).items():
        assert run.calls == runs_of(usual)[name].calls
        # Each could be traced, and it was guessed right on what.
        assert run.trace.flops == pytest.approx(runs_of(usual)[name].trace.flops, rel=0.01)
        peak = runs_of(usual)[name].trace.activation_bytes
        assert run.trace.activation_bytes == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "wan", "svd", "ltx-video", "z-image"])
def test_any_kind_gets_an_estimate(kind: str, request_of: RequestOf) -> None:
    pipe = BUILDERS[kind]()
    frames = 9 if kind in ("wan", "svd", "ltx-video") else 1
    become(pipe, type("Broken", (type(pipe),), {"__call__": lambda self: 1 / 0}))
    workload = traced(pipe, request_of(frames=frames))
    assert workload.notes[0].startswith("Broken cannot be rehearsed (division by zero)")
    assert [p.name for p in workload.phases][-2:] == ["denoise", "decode"]
    assert all(r.is_estimated and r.trace.flops > 0 for r in runs_of(workload).values())
    assert all(r.trace.activation_bytes > 0 for r in runs_of(workload).values())


def test_a_scheduler_that_lacks_a_package(sd_pipe: Any, request_of: RequestOf) -> None:
    from diffusers import DPMSolverMultistepScheduler

    class Stochastic(DPMSolverMultistepScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise ImportError("needs torchsde")

    sd_pipe.scheduler = Stochastic()
    workload = traced(sd_pipe, request_of())
    assert workload.notes[0].startswith("StableDiffusionPipeline cannot be rehearsed (needs torch")
    assert runs_of(workload)["unet"].calls == 3


# ---- what is the request's fault is refused -----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "asked", "says"),
    [
        ("sd", {"side": 60}, "`height` and `width` have to be divisible by 8 but are 60 and 60"),
        ("flux", {"options": {"max_sequence_length": 5000}}, "`max_sequence_length` cannot be"),
        ("sd-img2img", {"options": {"strength": 2.0}}, "strength"),
        ("sd", {"options": {"wings": 2}}, "takes no argument 'wings'"),
    ],
)
def test_an_impossible_request_is_refused_in_the_pipelines_words(
    kind: str, asked: dict[str, Any], says: str, request_of: RequestOf
) -> None:
    pipe = BUILDERS[kind]()
    with pytest.raises(RequestError, match=says) as caught:
        traced(pipe, request_of(**asked))
    assert "\n" not in str(caught.value)


def test_nothing_to_trace_is_refused(sd_pipe: Any, request_of: RequestOf) -> None:
    architecture = msgspec.structs.replace(describe_pipeline(sd_pipe), components={})
    with pytest.raises(ModelError, match="has nothing like a denoiser"):
        trace_workload(architecture, request_of())
