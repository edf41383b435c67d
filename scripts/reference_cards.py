"""The table of published figures that the reference machines are made from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Fractions:
    """What part of a peak real work reaches, by kind of chip, and how that is known.

    ``attention`` is a fused kernel's at head size 64 and thousands of tokens.
    """

    matmul: float
    convolution: float
    channels_last: float
    plain: float
    memory: float
    attention: float
    why: str


GEFORCE = Fractions(
    matmul=0.75,
    convolution=0.60,
    channels_last=0.65,
    plain=0.70,
    memory=0.88,
    attention=0.55,
    why="tensor cores with float32 accumulation run at half rate on GeForce and so are easily kept "
    "busy: a whole SD 1.5 run published for the RTX 3060 (onnxruntime's stable_diffusion README, "
    "5.6 s for 50 steps of 1.6 TFLOP) comes to 0.58 of that peak, all other work included",
)
AMPERE_SERVER = Fractions(
    matmul=0.65,
    convolution=0.25,
    channels_last=0.30,
    plain=0.90,
    memory=0.88,
    attention=0.45,
    why="large cuBLAS products reach 0.7-0.8 of an A100's peak, cuDNN convolutions less; the "
    "FlashAttention-2 paper gives 0.6-0.7 for its kernel alone; whole SD 1.5 steps at batch 4 come "
    "to 0.27 of the peak in diffusers' torch2.0 benchmark (13.1 steps/s of 6.4 TFLOP)",
)
HOPPER = Fractions(
    matmul=0.60,
    convolution=0.20,
    channels_last=0.25,
    plain=0.80,
    memory=0.88,
    attention=0.36,
    why="large cuBLAS products reach 600-650 TFLOP/s within an H100's power limit; "
    "FlashAttention-2, which PyTorch ships, about 350; convolutions in proportion to an A100's",
)
T4 = Fractions(
    matmul=0.32,
    convolution=0.18,
    channels_last=0.22,
    plain=0.55,
    memory=0.80,
    attention=0.17,
    why="its 70 W do not sustain the boost clock that the peak assumes: whole SD 1.5 steps come to "
    "0.18 of it in diffusers' torch2.0 benchmark (6.9 steps/s of 1.6 TFLOP)",
)
TURING_PLAIN = Fractions(
    matmul=0.85,
    convolution=0.75,
    channels_last=0.60,
    plain=0.85,
    memory=0.88,
    attention=0.40,
    why="plain float32 units, no tensor cores",
)
DESKTOP_CPU = Fractions(
    matmul=0.60,
    convolution=0.45,
    channels_last=0.50,
    plain=0.60,
    memory=0.75,
    attention=0.30,
    why="oneDNN on all cores, whose clocks fall under vector load",
)


@dataclass(frozen=True)
class Card:
    """One row: published peaks in TFLOP/s (dense, never sparse) and GB/s, and an assumed host.

    Attributes:
        name: The file's name.
        device: As the driver calls it.
        document: Where the peaks are published.
        plain: float32 without tensor cores.
        half: float16 on tensor cores with float32 accumulation, as PyTorch runs it; ``None`` where
            float16 is of no use.
        tf32: What cuDNN uses for float32 convolutions by PyTorch's default; ``None`` before Ampere.
        bfloat16: Whether the hardware multiplies it (at the float16 rate).
        memory: Bandwidth.
        chip: Multiprocessors and the boost clock in MHz, from the same document; what the peaks
            are computed from.
        bus: Width in bits and the memory's clock in MHz, as the driver counts it: two transfers.
        total_mib: As the driver reports it.
        held_mib: What driver and desktop typically hold of it.
        module: GB/s of ``module.to()`` to the device and back.
        host: RAM in GiB and cores, assumed.
    """

    name: str
    device: str
    document: str
    fractions: Fractions
    plain: float
    half: float | None
    tf32: float | None
    memory: float
    total_mib: int
    held_mib: int
    context_mib: int
    capability: str
    chip: tuple[int, int]
    bus: tuple[int, int]
    pcie: tuple[int, int]
    watts: float
    module: tuple[float, float]
    host: tuple[int, int]
    bfloat16: bool = True
    desktop: bool = True
    findings: tuple[str, ...] = field(default=())


AMPERE_PAPER = "NVIDIA Ampere GA102 whitepaper v2, appendix A"
ADA_PAPER = "NVIDIA Ada GPU architecture whitepaper, appendix A"
BLACKWELL_PAPER = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
GA10X_RULE = (
    "with the GA10x rates per core (tensor float16 with float32 accumulation: twice float32)"
)

CARDS = (
    Card(
        name="rtx-3080-10gb",
        device="NVIDIA GeForce RTX 3080",
        document=AMPERE_PAPER,
        fractions=GEFORCE,
        plain=29.77,
        half=59.5,
        tf32=29.8,
        memory=760.3,
        total_mib=10240,
        held_mib=512,
        context_mib=350,
        capability="8.6",
        chip=(68, 1710),
        bus=(320, 9501),
        pcie=(4, 16),
        watts=320,
        module=(2.4, 1.6),
        host=(32, 8),
    ),
    Card(
        name="rtx-3060-12gb",
        device="NVIDIA GeForce RTX 3060",
        document=f"NVIDIA GeForce RTX 3060 specifications (3584 cores, 1.78 GHz) {GA10X_RULE}",
        fractions=GEFORCE,
        plain=12.74,
        half=25.5,
        tf32=12.74,
        memory=360.0,
        total_mib=12288,
        held_mib=512,
        context_mib=330,
        capability="8.6",
        chip=(28, 1777),
        bus=(192, 7501),
        pcie=(4, 16),
        watts=170,
        module=(2.4, 1.6),
        host=(32, 6),
    ),
    Card(
        name="laptop-rtx-3050-4gb",
        device="NVIDIA GeForce RTX 3050 Laptop GPU",
        document="NVIDIA GeForce RTX 3050 Laptop specifications (2048 cores, taken at 1.5 GHz of "
        f"the 1.06-1.74 GHz that 35-80 W allow) {GA10X_RULE}",
        fractions=GEFORCE,
        plain=6.14,
        half=12.3,
        tf32=6.14,
        memory=192.0,
        total_mib=4096,
        held_mib=256,
        context_mib=310,
        capability="8.6",
        chip=(16, 1500),
        bus=(128, 6001),
        pcie=(4, 8),
        watts=60,
        module=(2.0, 1.3),
        host=(16, 4),
    ),
    Card(
        name="rtx-4060-8gb",
        device="NVIDIA GeForce RTX 4060",
        document="NVIDIA GeForce RTX 4060 specifications (3072 cores, 2.46 GHz) with the Ada rates "
        "per core (tensor float16 with float32 accumulation: twice float32)",
        fractions=GEFORCE,
        plain=15.11,
        half=30.2,
        tf32=15.11,
        memory=272.0,
        total_mib=8188,
        held_mib=448,
        context_mib=400,
        capability="8.9",
        chip=(24, 2460),
        bus=(128, 8501),
        pcie=(4, 8),
        watts=115,
        module=(2.2, 1.5),
        host=(16, 6),
    ),
    Card(
        name="rtx-4090-24gb",
        device="NVIDIA GeForce RTX 4090",
        document=ADA_PAPER,
        fractions=GEFORCE,
        plain=82.58,
        half=165.2,
        tf32=82.6,
        memory=1008.0,
        total_mib=24564,
        held_mib=640,
        context_mib=420,
        capability="8.9",
        chip=(128, 2520),
        bus=(384, 10501),
        pcie=(4, 16),
        watts=450,
        module=(3.0, 2.0),
        host=(64, 16),
    ),
    Card(
        name="rtx-5090-32gb",
        device="NVIDIA GeForce RTX 5090",
        document=BLACKWELL_PAPER,
        fractions=GEFORCE,
        plain=104.8,
        half=209.5,
        tf32=104.8,
        memory=1792.0,
        total_mib=32607,
        held_mib=768,
        context_mib=500,
        capability="12.0",
        chip=(170, 2407),
        bus=(512, 14001),
        pcie=(5, 16),
        watts=575,
        module=(3.0, 2.0),
        host=(64, 16),
    ),
    Card(
        name="gtx-1660-6gb",
        device="NVIDIA GeForce GTX 1660",
        document="NVIDIA GeForce GTX 1660 specifications (TU116: 1408 cores, 1.785 GHz)",
        fractions=TURING_PLAIN,
        plain=5.03,
        half=None,
        tf32=None,
        memory=192.0,
        total_mib=6144,
        held_mib=384,
        context_mib=300,
        capability="7.5",
        chip=(22, 1785),
        bus=(192, 4001),
        pcie=(3, 16),
        watts=120,
        module=(2.0, 1.3),
        host=(16, 6),
        bfloat16=False,
        findings=(
            "float16 is left out: it has no tensor cores, and Stable Diffusion in float16 is known "
            "to give black images on GTX 16xx cards, so it runs in float32.",
        ),
    ),
    Card(
        name="t4-16gb",
        device="Tesla T4",
        document="NVIDIA T4 datasheet",
        fractions=T4,
        plain=8.1,
        half=65.0,
        tf32=None,
        memory=300.0,
        total_mib=15360,
        held_mib=300,
        context_mib=300,
        capability="7.5",
        chip=(40, 1590),
        bus=(256, 5001),
        pcie=(3, 16),
        watts=70,
        module=(1.8, 1.2),
        host=(13, 2),
        bfloat16=False,
        desktop=False,
        findings=("bfloat16 is left out: Turing emulates it.",),
    ),
    Card(
        name="a100-40gb",
        device="NVIDIA A100-SXM4-40GB",
        document="NVIDIA A100 datasheet (SXM)",
        fractions=AMPERE_SERVER,
        plain=19.5,
        half=312.0,
        tf32=156.0,
        memory=1555.0,
        total_mib=40960,
        held_mib=560,
        context_mib=430,
        capability="8.0",
        chip=(108, 1410),
        bus=(5120, 1215),
        pcie=(4, 16),
        watts=400,
        module=(3.0, 2.0),
        host=(85, 12),
        desktop=False,
    ),
    Card(
        name="a100-80gb",
        device="NVIDIA A100-SXM4-80GB",
        document="NVIDIA A100 datasheet (SXM)",
        fractions=AMPERE_SERVER,
        plain=19.5,
        half=312.0,
        tf32=156.0,
        memory=2039.0,
        total_mib=81920,
        held_mib=640,
        context_mib=430,
        capability="8.0",
        chip=(108, 1410),
        bus=(5120, 1593),
        pcie=(4, 16),
        watts=400,
        module=(3.0, 2.0),
        host=(170, 12),
        desktop=False,
    ),
    Card(
        name="h100-80gb",
        device="NVIDIA H100 80GB HBM3",
        document="NVIDIA H100 datasheet (SXM; its sparse figures halved)",
        fractions=HOPPER,
        plain=66.9,
        half=989.4,
        tf32=494.7,
        memory=3352.0,
        total_mib=81559,
        held_mib=560,
        context_mib=500,
        capability="9.0",
        chip=(132, 1980),
        bus=(5120, 2619),
        pcie=(5, 16),
        watts=700,
        module=(3.0, 2.0),
        host=(200, 26),
        desktop=False,
    ),
)

_BY_NAME = {card.name: card for card in CARDS}

PAIRS = (
    replace(
        _BY_NAME["t4-16gb"],
        name="t4-16gb-x2",
        host=(27, 4),
        findings=(
            *_BY_NAME["t4-16gb"].findings,
            "Two of them, as in Kaggle's notebooks: 4 cores and 29 GB of RAM (Kaggle Notebooks, "
            "technical specifications).",
        ),
    ),
    replace(
        _BY_NAME["rtx-4090-24gb"],
        name="rtx-4090-24gb-x2",
        findings=("Two of them; the second is assumed to be as full as the first.",),
    ),
)
"""Two of a card in one host. How they reach one another is left out: it is not published."""

CPU = Card(
    name="cpu-16-cores",
    device="AMD Ryzen 9 7950X 16-Core Processor",
    document="AMD Ryzen 9 7950X specifications (16 cores at the 4.5 GHz base clock, 32 float32 "
    "operations per core and cycle, two channels of DDR5-5200)",
    fractions=DESKTOP_CPU,
    plain=2.30,
    half=4.61,
    tf32=None,
    memory=83.2,
    total_mib=64 * 1024,
    held_mib=6 * 1024,
    context_mib=0,
    capability="",
    chip=(0, 0),
    bus=(0, 0),
    pcie=(0, 0),
    watts=0,
    module=(0, 0),
    host=(64, 16),
)
