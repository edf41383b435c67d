"""A distilled decoder with random weights, in a folder, in the place of the autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune.decide.predict import Predictor
from autotune.errors import OptimizationError
from autotune.optimizations import find
from autotune.optimizations.execution import Execution
from autotune.testing.pipelines import BUILDERS, build_sd, call
from autotune.testing.state import differences, whole_state
from autotune.workload import variants
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.trace import trace
from autotune.workload.workload import Request, Workload


def saved(folder: Path, channels: int = 4) -> str:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny(latent_channels=channels).save_pretrained(folder)
    return str(folder)


def workload_of(kind: str) -> Workload:
    request = Request(64, 64, 1, 2, 5.0, "float32")
    return trace_workload(describe_pipeline(BUILDERS[kind]()), request)


def test_it_decodes_and_goes_again(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    pipe, tiny = build_sd(), find("tiny_autoencoder")
    plain, before, own = call(pipe), whole_state(pipe), pipe.vae
    undo = tiny.apply(pipe, {"weights": folder}, "cpu")
    assert tiny.is_set(pipe)
    assert not torch.equal(call(pipe), plain)
    undo()
    assert pipe.vae is own
    assert differences(before, whole_state(pipe)) == {}
    assert torch.equal(call(pipe), plain)


def test_other_latents_and_missing_weights_are_refused(tmp_path: Path) -> None:
    pipe, tiny = build_sd(), find("tiny_autoencoder")
    own = pipe.vae
    with pytest.raises(OptimizationError, match="16 channels"):
        tiny.apply(pipe, {"weights": saved(tmp_path, 16)}, "cpu")
    with pytest.raises(OptimizationError, match="latents of this"):
        tiny.apply(pipe, {"weights": ""}, "cpu")
    with pytest.raises(OptimizationError, match="cannot load"):
        tiny.apply(pipe, {"weights": str(tmp_path / "nowhere")}, "cpu")
    assert pipe.vae is own


def test_it_is_traced_as_it_runs(rtx_3080, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderTiny

    size = sum(p.numel() for p in build_sd().vae.parameters())
    monkeypatch.setattr(variants, "DISTILLED", (size,))
    workload = workload_of("sd")
    (run,) = (r for p in workload.phases for r in p.runs if r.role == "autoencoder")
    with torch.device("meta"):
        tiny = AutoencoderTiny(latent_channels=4).eval()
    side = int(workload.latent_tokens**0.5)
    latents = torch.empty(1, 4, side, side, device="meta")
    assert run.variants["tiny"] == trace(tiny, lambda: tiny.decode(latents), [latents])
    predictor = Predictor(rtx_3080, workload)
    plain, distilled = (predictor.predict(Execution(decoder=d)) for d in ("", "tiny"))
    assert distilled.phases[-1].compute_s != plain.phases[-1].compute_s
    assert distilled.phases[:-1] == plain.phases[:-1]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("sd-img2img", "encodes a picture"),
        ("sd", "latents of this"),
        ("pixart-sigma", "latents of this"),
    ],
)
def test_where_it_is_not_offered(rtx_3080, kind: str, why: str) -> None:
    workload = workload_of(kind)
    assert why in (find("tiny_autoencoder").unavailable(rtx_3080, workload) or "")
