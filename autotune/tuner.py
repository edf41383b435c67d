"""The way through, once: machine → workload → plan → applied pipeline → remembered run.

Everything public starts here; each step is one stage's function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

from autotune.decide.choose import Limits, check_limits, choose
from autotune.decide.corrections import replayable
from autotune.decide.forward import ForwardModel
from autotune.decide.plan import Plan
from autotune.decide.prediction import Prediction
from autotune.errors import ModelError, RequestError
from autotune.probe import nvml
from autotune.probe.host import read_host
from autotune.probe.live import identity, profile_key, refresh
from autotune.probe.machine import Machine
from autotune.probe.software import installed_versions
from autotune.profile.profile import PhaseMeasurement, Profile, RunRecord
from autotune.profile.staleness import stale_reasons
from autotune.profile.store import load_profile, update_profile
from autotune.runtime.account import shortage, ways_out
from autotune.workload.architecture import (
    DEMO,
    Architecture,
    builtin_names,
    find_architecture,
)
from autotune.workload.cache import workload_of
from autotune.workload.live import pipeline_dtype
from autotune.workload.request import complete_request
from autotune.workload.workload import Request, Workload

log = logging.getLogger("autotune")

REPLAY_S = 3.0
"""Seconds that a new workload may spend on timing its operators; once per workload and machine."""

Progress = Callable[[str], None]


class Measured(NamedTuple):
    """This machine, and why it was measured now (empty when the profile was used)."""

    key: str
    machine: Machine
    reasons: tuple[str, ...]


class Planned(NamedTuple):
    """A plan with what it was made from."""

    architecture: Architecture
    machine: Machine
    workload: Workload
    plan: Plan


class Ask(msgspec.Struct, frozen=True):
    """What a user asks for; ``None`` means the model's own default.

    Attributes:
        height: Pixels.
        width: Pixels.
        batch: Images per call.
        steps: Denoise steps.
        guidance_scale: Above 1 doubles the denoiser's batch.
        dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        limits: Quality, memory limits, optimizations allowed.
        frames: Video frames; image models draw one.
        options: Further arguments of the pipeline that decide what runs (``strength``).
    """

    height: int | None = None
    width: int | None = None
    batch: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str = "auto"
    limits: Limits = Limits()
    frames: int | None = None
    options: dict[str, bool | int | float | str] = {}


def machine_here(
    device: str | None = None, *, remeasure: bool = False, progress: Progress | None = None
) -> Measured:
    """This machine from its profile, measured first where there is none or it is stale.

    Free memory is always read now.

    Raises:
        MachineError: there is no such device.
        ProfileError: the cache folder cannot be used.
    """
    key = identity(device)
    profile = load_profile(key)
    reasons = ("asked to",) if remeasure else _why_measure(profile)
    if profile is not None and not reasons:
        return Measured(key, refresh(profile.machine), ())
    from autotune.probe.measure import measure_machine

    machine = measure_machine(device, progress=progress)
    key = profile_key(machine)  # with several GPUs, the one with most free memory may have changed
    remember_machine(key, machine)
    return Measured(key, machine, reasons)


def _why_measure(profile: Profile | None) -> tuple[str, ...]:
    return ("no profile of this machine yet",) if profile is None else why_stale(profile)


def why_stale(profile: Profile) -> tuple[str, ...]:
    """Why this machine's profile must be measured again, compared with what is installed now."""
    gpu = nvml.gpu(profile.machine.device.uuid)
    return stale_reasons(
        profile,
        software=installed_versions(),
        driver=gpu.driver if gpu else None,
        host=read_host(),
    )


def remember_machine(key: str, machine: Machine) -> Profile:
    """Store a fresh measurement; runs remembered before stay."""

    def change(profile: Profile | None) -> Profile:
        base = profile or _new_profile(key, machine)
        return msgspec.structs.replace(base, machine=machine, updated_at=timestamp())

    return update_profile(key, change)


def _new_profile(key: str, machine: Machine) -> Profile:
    now = timestamp()
    return Profile(key=key, machine=machine, created_at=now, updated_at=now)


def replayed(measured: Measured, workload: Workload, budget_s: float) -> Measured:
    """This machine with the workload's operators timed, as far as a budget of seconds goes.

    What was timed before is in the profile; what is timed now is added to it.
    """
    machine = measured.machine
    memory = machine.device.free_bytes // 10  # never disturb what else runs here
    operators = [o for o in replayable(workload) if o.bytes <= memory]
    if all(o.key in machine.operators for o in operators):
        return measured
    import torch

    from autotune.probe.replay import replay

    model = ForwardModel(machine, workload)
    found = replay(
        operators,
        torch.device(device_name(machine)),
        known=machine.operators,
        budget_s=budget_s,
        memory_bytes=memory,
        weight=lambda o: o.count * model.rate_seconds(o),
    )

    def change(profile: Profile | None) -> Profile:
        now = timestamp()
        base = profile or _new_profile(measured.key, machine)
        known = base.machine.operators | found
        updated = msgspec.structs.replace(base.machine, operators=known)
        return msgspec.structs.replace(base, machine=updated, updated_at=now)

    known = update_profile(measured.key, change).machine.operators
    return measured._replace(machine=msgspec.structs.replace(machine, operators=known))


def make_plan(model: str | Architecture, machine: Machine, ask: Ask) -> Planned:
    """Work out what the request needs and decide how a machine, here or elsewhere, should run it.

    Raises:
        ModelError, RequestError, OptimizationError: see the stages.
    """
    architecture, workload = work_out(model, machine, ask)
    return _decided(architecture, machine, workload, ask.limits)


def plan_here(
    model: str | Architecture,
    measured: Measured,
    ask: Ask,
    progress: Progress | None = None,
    pipe: Any = None,
) -> Planned:
    """The same for this machine, whose kernels are timed on the workload's own operators first.

    Raises:
        ModelError, RequestError, OptimizationError: see the stages.
    """
    architecture, workload = work_out(model, measured.machine, ask, pipe)
    if progress is not None:
        progress("the model's operators")
    machine = replayed(measured, workload, REPLAY_S).machine
    return _decided(architecture, machine, workload, ask.limits, pipe)


def _decided(
    architecture: Architecture,
    machine: Machine,
    workload: Workload,
    limits: Limits,
    pipe: Any = None,
) -> Planned:
    """Where nothing fits, other requests of the same model are traced as ways out."""

    def rework(request: Request) -> Workload:
        return workload_of(architecture, request, pipe)

    plan = choose(machine, workload, limits, rework=rework)
    return Planned(architecture, machine, workload, plan)


def work_out(
    model: str | Architecture, machine: Machine, ask: Ask, pipe: Any = None
) -> tuple[Architecture, Workload]:
    """The model's architecture, and the traced workload of the completed request.

    Args:
        model: A name, or an architecture found before.
        machine: Decides the dtype where the user leaves it open.
        ask: What the user asks for.
        pipe: The loaded pipeline, where there is one.

    Raises:
        ModelError, RequestError: see the stages.
    """
    check_ask(ask)
    architecture = find_architecture(model) if isinstance(model, str) else model
    return architecture, workload_of(architecture, completed(architecture, machine, ask), pipe)


def completed(architecture: Architecture, machine: Machine, ask: Ask) -> Request:
    """The request with the model's own values where the user leaves them open.

    Raises:
        RequestError: the model cannot draw it.
    """
    return complete_request(
        architecture,
        machine,
        height=ask.height,
        width=ask.width,
        batch=ask.batch,
        steps=ask.steps,
        guidance_scale=ask.guidance_scale,
        dtype=ask.dtype,
        frames=ask.frames,
        options=ask.options,
    )


_SAID_OTHERWISE = {
    "height": "height",
    "width": "width",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "batch",
    "num_videos_per_prompt": "batch",
    "prompt": "prompt",
    "image": "image",
    "mask_image": "mask",
    "generator": "seed",
}
"""Arguments of pipelines that have an option of their own; guidance may have two."""


def check_ask(ask: Ask) -> None:
    """Refuse what is wrong whatever the model and the machine.

    Raises:
        RequestError: an unknown quality level, or an argument of the pipeline that has an option
            of its own or is no plain value.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    check_limits(ask.limits)
    for name, value in ask.options.items():
        if name in _SAID_OTHERWISE:
            option = _SAID_OTHERWISE[name]
            raise RequestError(
                f"the pipeline's {name} has an option of its own",
                f"use --{option}, in Python {option}=",
            )
        if not isinstance(value, (bool, int, float, str)):
            raise RequestError(
                f"{name} is a {type(value).__name__}, and a plan is made for plain values",
                "give a bool, an int, a float or a str here; pass others when you draw",
            )


def loadable(model: str | Architecture) -> Architecture:
    """The architecture of loadable weights: a built-in name stands for its hub repository.

    The repository may hold more than the built-in file (a safety checker, say), and a plan must be
    made for what is really loaded.

    Raises:
        ModelError: unknown, unreadable, or not to be had without a connection.
    """
    architecture = find_architecture(model) if isinstance(model, str) else model
    if architecture.name not in builtin_names() or architecture.name == DEMO:
        return architecture
    if architecture.weights is None:
        raise ModelError(
            f"{architecture.name} has no weights of its own: its parts are in several repositories",
            "load the pipeline in Python and give it to autotune.configure",
        )
    told = ("name", "variant", "half_dtype", "steps", "guidance_scale", "height", "width", "frames")
    return msgspec.structs.replace(
        find_architecture(architecture.weights), **{t: getattr(architecture, t) for t in told}
    )


def device_name(machine: Machine) -> str:
    """PyTorch's name of the machine's device, ``"cuda:0"`` or ``"cpu"``."""
    kind = machine.device.kind
    return kind if kind in ("cpu", "mps") else f"{kind}:{machine.device.index}"


def remember_run(
    measured: Measured, planned: Planned, phases: tuple[PhaseMeasurement, ...]
) -> None:
    """Keep predicted and measured figures of a verified run in the profile."""
    plan = planned.plan
    record = RunRecord(
        workload=planned.workload.key,
        optimizations=tuple(map(str, plan.optimizations)),
        predicted=tuple(
            PhaseMeasurement(p.name, p.seconds, p.peak_bytes) for p in plan.prediction.phases
        ),
        measured=phases,
        at=timestamp(),
    )

    def change(profile: Profile | None) -> Profile:
        now = timestamp()
        base = profile or _new_profile(measured.key, measured.machine)
        if is_far_off(plan.prediction, phases):
            log.info("far from the prediction: the operators will be timed again")
            base = msgspec.structs.replace(base, machine=_forgotten(base.machine, planned.workload))
        return msgspec.structs.replace(base, runs=(*base.runs, record), updated_at=now)

    update_profile(measured.key, change)


def is_far_off(prediction: Prediction, phases: tuple[PhaseMeasurement, ...]) -> bool:
    """Whether a run took less than half or more than twice the time predicted.

    No model is that wrong about an operator it has timed: the machine was busy, then or now.
    """
    measured = sum(p.seconds for p in phases)
    longest = prediction.seconds + prediction.once_s  # the first image waits for the compiler
    return not prediction.seconds / 2 <= measured <= longest * 2


def _forgotten(machine: Machine, workload: Workload) -> Machine:
    """The machine without the times of the workload's operators."""
    drop = {o.key for o in replayable(workload)}
    kept = {k: t for k, t in machine.operators.items() if k not in drop}
    return msgspec.structs.replace(machine, operators=kept)


def was_verified(measured: Measured, planned: Planned) -> bool:
    """Whether the profile already has memory and time of this very plan."""
    profile = load_profile(measured.key)
    chosen = tuple(map(str, planned.plan.optimizations))
    return profile is not None and any(
        run.workload == planned.workload.key
        and run.optimizations == chosen
        and all(m.peak_bytes is not None for m in run.measured)
        for run in profile.runs
    )


def timestamp() -> str:
    """Now, as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def configure_pipeline(pipe: Any, ask: Ask, device: str | None = None) -> Any:
    """Plan for a loaded pipeline and configure it in place; see ``autotune.configure``."""
    from autotune.optimizations.attention import foreign_processors
    from autotune.runtime.apply import set_by_hand
    from autotune.workload.architecture import describe_pipeline

    architecture = describe_pipeline(pipe)
    measured = machine_here(device or _device_of(pipe))
    limits = msgspec.structs.replace(ask.limits, keep=(*ask.limits.keep, *set_by_hand(pipe)))
    dtype = pipeline_dtype(pipe) if ask.dtype == "auto" else ask.dtype
    asked = msgspec.structs.replace(ask, limits=limits, dtype=dtype)
    foreign = foreign_processors(pipe)
    if foreign == ("AttnProcessor",):
        vanilla = msgspec.structs.replace(measured.machine, default_attention="vanilla")
        measured = measured._replace(machine=vanilla)
    planned = plan_loaded(architecture, measured, _keeping_attention(asked, foreign), pipe)
    return tuned(pipe, _saying_what_is_kept(planned, asked, foreign), measured)


def load_tuned(model: str, ask: Ask, device: str | None = None) -> Any:
    """Plan, then read the weights the way the plan wants; see ``autotune.load``."""
    from autotune.runtime.load import load_pipeline

    measured = machine_here(device)
    planned = plan_loaded(loadable(model), measured, ask)
    require_fit(planned.plan)
    return tuned(load_pipeline(planned.architecture, planned.plan), planned, measured)


def plan_loaded(
    model: Architecture,
    measured: Measured,
    ask: Ask,
    pipe: Any = None,
    progress: Progress | None = None,
) -> Planned:
    """Plan for this process, which may hold the pipeline or a context already."""
    from autotune.runtime.memory import with_own_memory

    machine = with_own_memory(measured.machine, device_name(measured.machine), pipe)
    return plan_here(model, measured._replace(machine=machine), ask, progress, pipe)


def tuned(pipe: Any, planned: Planned, measured: Measured) -> Any:
    """Apply the plan: the ``Tuned`` pipeline.

    Raises:
        RequestError: the plan does not fit; the pipeline is as it was.
    """
    from autotune.runtime.tuned import Tuned

    require_fit(planned.plan)
    return Tuned(pipe, planned.plan, planned.workload, device_name(measured.machine))


def require_fit(plan: Plan) -> None:
    """Refuse to load or run what would run out of memory.

    Raises:
        RequestError: with the numbers and what would help.
    """
    if not plan.fits:
        raise RequestError(shortage(plan), ways_out(plan))


def _device_of(pipe: Any) -> str | None:
    """Where the pipeline is, or is offloaded to; ``None`` while it waits in host RAM."""
    where = str(getattr(pipe, "_execution_device", "cpu"))
    return None if where.startswith(("cpu", "meta")) else where


_REPLACES_ATTENTION = ("xformers", "attention_slicing", "attention_backend", "fuse_qkv")


def _keeping_attention(ask: Ask, foreign: tuple[str, ...]) -> Ask:
    """What the user has put into the attention stays."""
    if not foreign:
        return ask
    without = (*ask.limits.without, *_REPLACES_ATTENTION)
    return msgspec.structs.replace(ask, limits=msgspec.structs.replace(ask.limits, without=without))


def _saying_what_is_kept(planned: Planned, ask: Ask, foreign: tuple[str, ...]) -> Planned:
    """It was not the user who left these out."""
    if not foreign:
        return planned
    text = f"attention set by hand ({', '.join(foreign)}) is kept"
    ours = [n for n in _REPLACES_ATTENTION if n not in ask.limits.without]
    rejected = tuple(
        msgspec.structs.replace(r, text=text) if r.optimization in ours else r
        for r in planned.plan.rejected
    )
    notes = (*planned.plan.notes, text)
    plan = msgspec.structs.replace(planned.plan, rejected=rejected, notes=notes)
    return planned._replace(plan=plan)
