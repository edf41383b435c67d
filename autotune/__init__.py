"""autotune: make a diffusers pipeline run as fast as this machine allows, without out-of-memory.

``import autotune`` is light: torch and diffusers are imported by the calls that need them.

>>> import autotune
>>> tuned = autotune.load("demo")                # doctest: +SKIP
>>> tuned("a handwritten seven").images[0]       # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Imported here first, since loading the subpackage later would replace the function of its name.
import autotune.probe as _probe_package  # noqa: F401
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from autotune.decide.limits import Limits
    from autotune.decide.plan import Plan
    from autotune.probe.machine import Machine
    from autotune.profile.profile import Profile
    from autotune.runtime.tuned import Tuned
    from autotune.tuner import Ask

__version__ = "0.1.0"
__all__ = ["AutotuneError", "configure", "load", "plan", "probe", "profiles"]


def configure(
    pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    quality: str = "exact",
    priority: str = "speed",
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    images: int = 1,
    vram_limit: int | str | None = None,
    ram_limit: int | str | None = None,
    reserve: int | str = 0,
    call: Mapping[str, bool | int | float | str] | None = None,
    device: str | None = None,
    verify: str = "auto",
) -> Tuned:
    """Configure a loaded diffusers pipeline in place, for this machine and this request.

    Args:
        pipe: A loaded pipeline. What was set on it by hand is recognised and kept as it is; only
            ``plan``, which has no pipeline to look at, must be told (``keep``).
        height: Pixels; the model's native size by default.
        width: Pixels; the model's native size by default.
        batch: Images (or videos) per call.
        frames: Of a video; the model's native number by default.
        steps: Denoise steps; the pipeline's default when left out.
        guidance_scale: The pipeline's default when left out.
        quality: ``"exact"``, ``"high"``, ``"balanced"`` or ``"fast"``: what may change the image;
            or names of the optimizations that may, ``"vae_tiling,tome"``.
        priority: ``"speed"``; ``"memory"``: the least device memory that at most doubles the time;
            or ``"balanced"``: the least that costs at most a quarter more time.
        only: Names of the only optimizations to consider.
        without: Names of optimizations to leave out.
        images: How many you will draw: what costs time once, such as compiling, may pay for many.
        vram_limit: Most device memory to use, in bytes or as ``"5GiB"``.
        ram_limit: Most host RAM to use, likewise.
        reserve: Device memory to leave free for others, likewise.
        call: Further arguments of the pipeline that decide what runs, such as
            ``{"strength": 0.5, "max_sequence_length": 256}``; they are passed on when you draw.
        device: ``"cuda:1"``, ``"cpu"``; by default the GPU with most free memory.
        verify: ``"auto"``: two short passes now, where this set was not verified before and they
            take no longer than a minute; ``"always"``; ``"never"``. What they measure corrects
            later predictions.

    Returns:
        The configured pipeline with ``plan``, ``explain()`` and ``undo()``; call it to draw.

    Raises:
        AutotuneError: the request is impossible, or the pipeline cannot be traced or configured;
            the pipeline is then as it was.
    """
    from autotune.tuner import configure_pipeline

    limits = _limits(quality, priority, only, without, images, vram_limit, ram_limit, reserve)
    ask = _ask(height, width, batch, frames, steps, guidance_scale, "auto", limits, call)
    return configure_pipeline(pipe, ask, device, verify)  # type: ignore[no-any-return]


def load(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    dtype: str = "auto",
    quality: str = "exact",
    priority: str = "speed",
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    images: int = 1,
    vram_limit: int | str | None = None,
    ram_limit: int | str | None = None,
    reserve: int | str = 0,
    call: Mapping[str, bool | int | float | str] | None = None,
    device: str | None = None,
    verify: str = "auto",
) -> Tuned:
    """Plan before the weights are read, then load and configure the pipeline.

    Args:
        model: A hub id, a local folder in diffusers format, or a built-in name such as ``"demo"``.
        dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    The other arguments are those of ``configure``.

    Raises:
        AutotuneError: the model cannot be read, or as for ``configure``.
    """
    from autotune.tuner import load_tuned

    limits = _limits(quality, priority, only, without, images, vram_limit, ram_limit, reserve)
    ask = _ask(height, width, batch, frames, steps, guidance_scale, dtype, limits, call)
    return load_tuned(model, ask, device, verify)  # type: ignore[no-any-return]


def plan(
    model: str,
    *,
    machine: Machine | str | Path | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    dtype: str = "auto",
    quality: str = "exact",
    priority: str = "speed",
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    keep: str | Iterable[str] = (),
    images: int = 1,
    vram_limit: int | str | None = None,
    ram_limit: int | str | None = None,
    reserve: int | str = 0,
    call: Mapping[str, bool | int | float | str] | None = None,
) -> Plan:
    """Decide for a model on this machine, or on another one that was recorded.

    Args:
        model: A hub id, a local folder, or a built-in name.
        machine: A ``Machine``, a reference machine's name, or a JSON file; this one by default.
        keep: Optimizations that you set by hand, ``("xformers", "tome:ratio=0.3")``: they are
            predicted with the rest, and neither proposed nor changed.

    The other arguments are those of ``load``.

    Raises:
        AutotuneError: the model, the machine or the request is impossible.
    """
    from autotune.tuner import machine_here, make_plan

    limits = _limits(quality, priority, only, without, images, vram_limit, ram_limit, reserve, keep)
    ask = _ask(height, width, batch, frames, steps, guidance_scale, dtype, limits, call)
    if machine is None:
        machine = machine_here().machine
    elif isinstance(machine, (str, Path)):
        from autotune.probe.reference import load_machine

        machine = load_machine(str(machine))
    return make_plan(model, machine, ask).plan


def probe(device: str | None = None) -> Machine:
    """Measure this machine now and remember it in its profile.

    Args:
        device: ``"cuda:1"``, ``"cpu"``; by default the GPU with most free memory, else the CPU.

    Raises:
        AutotuneError: there is no such device.
    """
    from autotune.tuner import machine_here

    return machine_here(device, remeasure=True).machine


def profiles() -> tuple[Profile, ...]:
    """Every readable profile of the cache folder."""
    from autotune.profile.store import list_profiles

    return tuple(s.profile for s in list_profiles() if s.profile is not None)


def _limits(
    quality: str,
    priority: str,
    only: Iterable[str],
    without: Iterable[str],
    images: int,
    vram_limit: int | str | None,
    ram_limit: int | str | None,
    reserve: int | str,
    keep: str | Iterable[str] = (),
) -> Limits:
    from autotune.decide.limits import Limits, parse_keep

    left_out = tuple(without)
    return Limits(
        quality=quality,
        priority=priority,
        only=tuple(only),
        without=left_out,
        keep=parse_keep(keep if isinstance(keep, str) else ",".join(keep), left_out),
        images=images,
        vram_limit=_bytes(vram_limit),
        ram_limit=_bytes(ram_limit),
        reserve=_bytes(reserve) or 0,
    )


def _bytes(size: int | str | None) -> int | None:
    from autotune.units import parse_bytes

    return parse_bytes(size) if isinstance(size, str) else size


def _ask(
    height: int | None,
    width: int | None,
    batch: int,
    frames: int | None,
    steps: int | None,
    guidance_scale: float | None,
    dtype: str,
    limits: Limits,
    call: Mapping[str, bool | int | float | str] | None,
) -> Ask:
    from autotune.tuner import Ask

    options = dict(call or {})
    return Ask(height, width, batch, steps, guidance_scale, dtype, limits, frames, options)
