"""The ``Workload``: what one generation asks of a machine, as pure data.

A generation has phases (encode, denoise, decode); a phase runs components; a component's forward is
a list of operators. Nothing here imports torch: a workload can be stored and planned for anywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from autotune.probe.machine import Value


class Request(Value, frozen=True):
    """The image or video asked for.

    ``height`` and ``width`` are pixels, ``batch`` is images (or videos) per call, ``dtype`` is what
    is computed in. A ``guidance_scale`` above 1 doubles the denoiser's work where the model guides
    itself. ``frames`` is 1 for images. ``options`` are further arguments of the pipeline that
    decide what runs, such as ``strength`` or ``max_sequence_length``.
    """

    height: int
    width: int
    batch: int
    steps: int
    guidance_scale: float
    dtype: str
    frames: int = 1
    options: dict[str, bool | int | float | str] = {}


class AttentionShape(Value, frozen=True):
    """One attention call, kept symbolic so that any implementation can be put in."""

    batch: int
    heads: int
    q_tokens: int
    kv_tokens: int
    head_dim: int

    @property
    def flops(self) -> float:
        """Multiply-adds counted twice: two matrix products over the score matrix."""
        return 4.0 * self.batch * self.heads * self.q_tokens * self.kv_tokens * self.head_dim

    @property
    def scores(self) -> int:
        """Elements of the full score matrix, which only vanilla attention writes out."""
        return self.batch * self.heads * self.q_tokens * self.kv_tokens


NHWC, NCHW = "nhwc", "nchw"
"""In a signature: how an image lies on a CPU, where that is otherwise than its strides say."""


GROUP_NORM = "aten.native_group_norm.default"


def channels_last_strides(shape: Sequence[int]) -> list[int]:
    """Of a tensor (batch, channels, height, width) in NHWC layout, in elements."""
    _, channels, height, width = shape
    return [channels * height * width, 1, channels * width, channels]


Region = Literal["", "block", "attention"]
"""Where in a network an operator is: in one of its repeated blocks, or in such a block's attention,
projections included; empty for the rest."""


class Operator(Value, frozen=True):
    """All calls of one operator with the same shapes, dtypes and layout.

    Attributes:
        name: PyTorch's name, ``"aten.convolution.default"``; ``"attention"`` for the symbolic one.
        kind: ``"matmul"``, ``"convolution"``, ``"attention"`` or ``"memory"`` (bound by bytes).
        signature: Everything needed to run it again on random data, as compact JSON.
        dtype: Of its output.
        count: Calls per forward.
        flops: Floating-point operations per call.
        bytes: Bytes read plus written per call.
        live_bytes: The most activation bytes alive while it runs, its inputs and output included:
            with a workspace on top of it, this operator can become the peak.
        in_bytes: Bytes of its inputs, weights excluded.
        out_bytes: Bytes of its outputs.
        attention: Its shape, for attention.
        block_tokens: Tokens of the transformer block whose self-attention it belongs to, or 0.
            Token merging shortens exactly these operators.
        region: Where in the network it is.
        fused_calls: Of its calls, those that are still kernels of their own when a compiler fuses
            chains of elementwise operators.
        fused_bytes: Bytes that all its calls together then read and write.
    """

    name: str
    kind: str
    signature: str
    dtype: str
    count: int
    flops: float
    bytes: int
    live_bytes: int
    in_bytes: int
    out_bytes: int
    attention: AttentionShape | None = None
    block_tokens: int = 0
    region: Region = ""
    fused_calls: int = 0
    fused_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one call reads."""
        return max(0, self.bytes - self.in_bytes - self.out_bytes)

    @property
    def is_over_images(self) -> bool:
        """Whether it is a convolution over height and width, and not over frames besides."""
        if self.kind != "convolution":
            return False
        image = msgspec.json.decode(self.signature)[1][0]
        return len(image["s"]) == 4

    @property
    def is_channels_last_on_cpu(self) -> bool:
        """Whether it is a convolution of images that lie channels last where a CPU computes it."""
        image = msgspec.json.decode(self.signature)[1][0] if self.is_over_images else {}
        if "l" in image:
            return bool(image["l"] == NHWC)
        strides = image.get("st") or (0, 0)
        return bool(strides[1] == 1 and strides[0] >= math.prod(image["s"][1:]))

    @property
    def depends_on_layout(self) -> bool:
        """Whether it takes another time for images that lie channels last: a convolution or a norm.

        On a CPU a norm over groups of channels takes twice as long then; CUDA's is given a copy.
        """
        if self.name != GROUP_NORM:
            return self.is_over_images
        return len(msgspec.json.decode(self.signature)[1][0]["s"]) == 4

    def in_channels_last(self) -> Operator:
        """The same operator on images, they and a convolution's filters laid out channels last."""
        name, arguments, keywords = msgspec.json.decode(self.signature)
        for tensor in (a for a in arguments if isinstance(a, dict) and len(a.get("s", ())) == 4):
            tensor.pop("l", None)
            tensor["st"] = channels_last_strides(tensor["s"])
        signature = msgspec.json.encode([name, arguments, keywords]).decode()
        return msgspec.structs.replace(self, signature=signature)

    @property
    def key(self) -> str:
        """Names the signature in a machine's replayed operators."""
        return hashlib.blake2b(self.signature.encode(), digest_size=8).hexdigest()


class Trace(Value, frozen=True):
    """One forward of one component.

    Attributes:
        operators: Distinct operators, in order of first appearance.
        activation_bytes: Peak of the activations alive at once, weights excluded, inputs included,
            attention counted as a memory-efficient kernel.
        dispatches: Operators launched per forward, views not counted.
        timeline: Requests to an allocator, in order: a positive number allocates so many bytes, a
            negative one frees the allocation of that number, counted from 1; 0 is a call of an
            operator that may take memory of its own meanwhile (convolution, attention). Empty where
            the forward is not traced.
        timed: Index in ``operators`` of each 0 of the timeline.
        adjacent_layers: The parameters of two layers of which one comes right after the other, over
            those of the largest layer: at most 2; 0 where the forward is not traced.
    """

    operators: tuple[Operator, ...]
    activation_bytes: int
    dispatches: int
    timeline: tuple[int, ...] = ()
    timed: tuple[int, ...] = ()
    adjacent_layers: float = 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole forward."""
        return sum(o.flops * o.count for o in self.operators)


Ability = Literal["repeated_blocks", "attention_backend", "step_caches", "tied_layers"]
"""repeated_blocks: names those of its blocks that can be compiled once for all. attention_backend:
takes attention kernels by name. tied_layers: two of its layers have the same weights
and are no copies of one another."""


class Component(Value, frozen=True):
    """One module of the pipeline and its weights.

    ``leaf_count`` and ``largest_leaf_bytes`` describe the modules that own parameters themselves:
    what sequential offload moves, one at a time. ``unmoved_bytes`` are the buffers that it leaves
    on the device. ``tensor_count`` is the number of parameters, ``tensor_bytes`` the sizes of
    parameters and buffers in the order in which they are moved. ``block_bytes`` are the groups that
    block-level offload moves; the rest of the weights is one more. ``casting_saves_bytes`` is what
    layerwise casting to eight bits takes off the weights. ``linear_bytes`` are the weights of
    linear layers, which quantization shrinks. ``fusable_bytes`` is what fusing the projections of
    queries, keys and values adds, and ``fusable_products`` how many matrix products it saves per
    call. ``abilities`` name diffusers' own switches that its class has.
    """

    name: str
    class_name: str
    parameters: int
    weight_bytes: int
    largest_leaf_bytes: int
    leaf_count: int
    tensor_count: int
    tensor_bytes: tuple[int, ...] = ()
    block_bytes: tuple[int, ...] = ()
    casting_saves_bytes: int = 0
    linear_bytes: int = 0
    fusable_bytes: int = 0
    fusable_products: int = 0
    abilities: tuple[Ability, ...] = ()
    unmoved_bytes: int = 0


Role = Literal["encoder", "denoiser", "autoencoder"]
"""encoder: of prompts and images (its library brings its own attention). denoiser: what runs at
every step, ControlNets included. autoencoder: between pixels and latents."""


class ComponentRun(Value, frozen=True):
    """A phase's use of a component: all its calls on inputs of the same shapes.

    Attributes:
        component: Its name in the pipeline.
        role: What it is for.
        calls: Calls per generation.
        trace: One call.
        entry: The method called, ``"forward"`` or an autoencoder's ``"encode"`` or ``"decode"``.
        variants: The same call with its code path switched (``"sliced"``, ``"tiled:512"``), each
            really traced; absent where switching changes nothing.
        refused: Other switches that were tried, and why they must not be set.
        upcast_bytes: Extra weight bytes while it runs in a wider dtype than it is stored in
            (SDXL's fp16 VAE decodes in float32).
        is_estimated: The trace is a guess from the weights: the module could not be traced.
    """

    component: str
    role: Role
    calls: int
    trace: Trace
    entry: str = "forward"
    variants: dict[str, Trace] = {}
    refused: dict[str, str] = {}
    upcast_bytes: int = 0
    is_estimated: bool = False

    def switched(self, variant: str) -> Trace:
        """The call with switches set, as far as they change it (one image cannot be sliced)."""
        names = (variant, *reversed(variant.split("+")))
        return next((self.variants[n] for n in names if n in self.variants), self.trace)


class Repeat(Value, frozen=True):
    """Calls that follow one another, so many times over.

    ``runs`` are indices into the phase's: (0, 1) fifty times for a ControlNet and its UNet.
    """

    times: int
    runs: tuple[int, ...]


class Phase(Value, frozen=True):
    """One part of a generation.

    Attributes:
        name: ``"encode"``, ``"denoise"`` or ``"decode"``.
        runs: In the order of their first call.
        order: All calls in their order; where it is not known, all of one run, then of the next.
    """

    name: str
    runs: tuple[ComponentRun, ...]
    order: tuple[Repeat, ...] = ()

    @property
    def sequence(self) -> tuple[Repeat, ...]:
        """The order, known or not."""
        return self.order or tuple(Repeat(r.calls, (i,)) for i, r in enumerate(self.runs))


class Workload(Value, frozen=True):
    """One generation of one model at one size.

    Attributes:
        model: The name the user gave: a built-in name, a folder or a hub id.
        pipeline: Class name of the diffusers pipeline.
        request: The image asked for.
        components: Every module of the pipeline with weights.
        phases: In order of execution.
        offload_order: Components that model offload moves in a chain, in the pipeline's own order:
            each that is called sends the one before it in this order back to the host.
        offload_apart: Components that model offload moves to the device when they are called and
            back only at the end (a ControlNet); those in neither tuple stay on the device.
        latent_tokens: Height times width of the latent: what token merging compares a block with.
        notes: What is estimated rather than traced, one sentence each.
        is_loaded: Its weights were read before it was planned for.
        mapped: Components whose files hold the dtype that they run in: they are mapped when they
            are read, and take no RAM of the process before they are moved or changed.
        mappable: Components that would be mapped in the dtype of their files, whichever that is. Of
            what is loaded: denoisers whose linear layers are left in their files, be they packed.
    """

    model: str
    pipeline: str
    request: Request
    components: tuple[Component, ...]
    phases: tuple[Phase, ...]
    offload_order: tuple[str, ...]
    latent_tokens: int
    offload_apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_loaded: bool = False
    mapped: tuple[str, ...] = ()
    mappable: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Weights of all components together."""
        return sum(c.weight_bytes for c in self.components)

    @property
    def runs(self) -> tuple[ComponentRun, ...]:
        """Of every phase, in order."""
        return tuple(run for phase in self.phases for run in phase.runs)

    def runs_as(self, role: Role) -> tuple[ComponentRun, ...]:
        """Those of components in that role."""
        return tuple(run for run in self.runs if run.role == role)

    def components_as(self, role: Role) -> tuple[Component, ...]:
        """What runs in that role, in the order in which it first does."""
        named = {c.name: c for c in self.components}
        return tuple(named[n] for n in dict.fromkeys(r.component for r in self.runs_as(role)))

    @property
    def guided_passes(self) -> int:
        """Calls of the denoiser in one step: two where guidance is a pass of its own."""
        calls = sum(r.calls for r in self.runs_as("denoiser"))
        return max(1, round(calls / self.request.steps))

    @property
    def key(self) -> str:
        """What was asked, in one line: names this workload in profiles."""
        r = self.request
        return self._named(f" steps {r.steps} guidance {r.guidance_scale:g}")

    @property
    def memory_key(self) -> str:
        """What was asked as far as memory goes: neither steps nor how strong guidance is."""
        return self._named(" guided" if self.request.guidance_scale > 1 else "")

    def _named(self, pace: str) -> str:
        r = self.request
        frames = f" frames {r.frames}" if r.frames > 1 else ""
        options = "".join(f" {k}={v}" for k, v in sorted(r.options.items()))
        return f"{self.model} {r.width}x{r.height}{frames} batch {r.batch}{pace} {r.dtype}{options}"

    def component(self, name: str) -> Component:
        """The component of that name (``KeyError`` when there is none)."""
        return {c.name: c for c in self.components}[name]
