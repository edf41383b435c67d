"""The command line as a user meets it: one process per call."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jsonschema  # type: ignore[import-untyped]
import pytest
from PIL import Image

from autotune.profile.profile import SCHEMA_VERSION
from tests.thorough import thoroughly

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
READ_ONLY = (
    ["--help"],
    ["--version"],
    ["plan", "--help"],
    ["profile", "list"],
    ["profile", "path"],
    ["machines"],
    ["models"],
    ["optimizations"],
    ["env"],
)


def autotune(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autotune", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def asked_json(*arguments: str) -> dict:
    done = autotune(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def schema(name: str) -> dict:
    return json.loads((SCHEMAS / name).read_text())


@pytest.fixture(scope="module", autouse=True)
def _one_measurement(tmp_path_factory: pytest.TempPathFactory):
    """The verbs of this file share a cache folder, so that the machine is measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("cli-cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield os.environ["AUTOTUNE_CACHE"]


@pytest.fixture(autouse=True)
def _own_cache(_one_measurement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", _one_measurement)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("arguments", READ_ONLY, ids=" ".join)
def test_read_only_verbs_never_import_torch(arguments):
    done = autotune(*arguments, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "autotune.cli.app" in imported
    assert not imported & {"torch", "diffusers", "transformers"}


def test_run_draws_and_remembers(tmp_path):
    """The main job twice: the second run measures nothing again and draws the same image."""
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    common = ("run", "--prompt", "a handwritten three", "--steps", "4", "--seed", "7")
    done = autotune(*common, "-o", str(first))
    assert done.returncode == 0, done.stderr
    for word in ("machine", "bottleneck", "chosen", "plain", "planned", "measured peak", "denoise"):
        assert word in done.stdout
    again = autotune(*common, "-o", str(second))
    assert again.returncode == 0, again.stderr
    assert "measured this machine" not in again.stderr
    assert size(first) == (128, 128)
    assert first.read_bytes() == second.read_bytes()
    shown = asked_json("profile", "show")
    runs = shown["profile"]["runs"]
    assert len(runs) == 2
    assert {m["name"] for m in runs[0]["measured"]} == {"encode", "denoise", "decode"}
    # Verified once: the second run is planned with what the first one showed.
    assert "verified" in done.stdout
    assert "held by the process besides" in " ".join(done.stdout.split())
    assert all("first_seconds" in m and "peak_bytes" in m for m in runs[0]["measured"])
    assert "memory was not measured in this run" in again.stdout


def test_run_as_json(tmp_path):
    target = tmp_path / "out.png"
    shown = asked_json(
        "run", "demo", "--steps", "2", "--batch", "2", "--seed", "1", "-o", str(target)
    )
    jsonschema.validate(shown, schema("run.json"))
    assert [Path(i).name for i in shown["images"]] == ["out-1.png", "out-2.png"]
    assert all(Path(i).exists() for i in shown["images"])
    assert {m["name"] for m in shown["measured"]} == {"encode", "denoise", "decode"}
    assert shown["fits"] is True
    checked = shown["verification"]
    assert [p["name"] for p in checked["phases"]] == ["encode", "denoise", "decode"]
    for phase, image in zip(checked["phases"], shown["measured"], strict=True):
        assert image["peak_bytes"] == phase["measured"]["peak_bytes"]


@thoroughly
def test_run_with_every_lossy_optimization_allowed(tmp_path):
    shown = asked_json(
        "run", "--steps", "2", "--quality", "fast", "--height", "256", "--width", "256",
        "--seed", "1", "-o", str(tmp_path / "out.png"),
    )  # fmt: skip
    assert size(Path(shown["images"][0])) == (256, 256)


def test_plan_json_keeps_its_contract():
    classic = "xformers,attention_slicing,model_cpu_offload,sequential_cpu_offload,tome"
    shown = asked_json("plan", "sdxl", "--machine", "rtx-3080-10gb", "--only", classic)
    jsonschema.validate(shown, schema("plan.json"))
    assert shown["machine"]["name"] == "rtx-3080-10gb"
    assert shown["machine"]["source"] == "datasheet"
    assert shown["bottleneck"]["before"] == {"resource": "vram", "phase": "decode"}
    assert [o["name"] for o in shown["optimizations"]] == ["model_cpu_offload"]
    assert all("parameters" in o for o in shown["optimizations"])
    for prediction in (shown["prediction"], shown["baseline"]):
        assert prediction["peak_bytes"] == max(p["peak_bytes"] for p in prediction["phases"])
    assert {r["optimization"] for r in shown["reasons"]} == {"model_cpu_offload"}
    assert any(r.get("rule") for r in shown["rejected"])


def test_predict_json_keeps_its_contract():
    shown = asked_json(
        "predict", "sd15", "--with", "xformers,tome:ratio=0.3",
        "--machine", "rtx-3080-10gb", "--images", "500",
    )  # fmt: skip
    assert shown["prediction"]["images"] == 500
    jsonschema.validate(shown, schema("predict.json"))
    assert shown["optimizations"][1] == {
        "name": "tome",
        "parameters": {"ratio": 0.3, "max_downsample": 1},
    }


def test_plan_for_people_fits_a_terminal():
    done = autotune(
        "plan", "sdxl", "--machine", "rtx-3080-10gb", env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_a_terminal_that_knows_ascii_only_gets_an_answer():
    done = autotune(
        "plan", "sdxl", "--machine", "rtx-3080-10gb", "--explain", "memory",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "needs the most" in done.stdout


def test_machines_and_optimizations_as_json():
    names = {m["name"] for m in asked_json("machines")["machines"]}
    assert {"rtx-3080-10gb", "t4-16gb", "a100-80gb"} <= names
    listed = {o["name"] for o in asked_json("optimizations")["optimizations"]}
    assert {"xformers", "tome", "model_cpu_offload"} <= listed


BAD = {
    "unknown model": ["plan", "sdxxl", "--machine", "t4-16gb"],
    "hub id that cannot be reached": ["plan", "nobody/nothing", "--machine", "t4-16gb"],
    "missing folder": ["plan", "./no/such/folder", "--machine", "t4-16gb"],
    "folder that is no pipeline": ["plan", str(Path(__file__).parent), "--machine", "t4-16gb"],
    "file": ["plan", __file__, "--machine", "t4-16gb"],
    "odd size": ["plan", "sdxl", "--machine", "t4-16gb", "--height", "1001"],
    "absurd size": ["plan", "sdxl", "--machine", "t4-16gb", "--width", "10000000"],
    "negative size": ["plan", "sdxl", "--machine", "t4-16gb", "--width", "-8"],
    "no batch": ["plan", "sdxl", "--machine", "t4-16gb", "--batch", "0"],
    "no steps": ["plan", "sdxl", "--machine", "t4-16gb", "--steps", "0"],
    "frames of an image, planned": ["plan", "sdxl", "--machine", "t4-16gb", "--frames", "16"],
    "argument of no pipeline": ["plan", "sd15", "--machine", "t4-16gb", "--call", "nonsense=1"],
    "argument without a value": ["plan", "sd15", "--machine", "t4-16gb", "--call", "nonsense"],
    "argument with its own option": ["plan", "sd15", "--machine", "t4-16gb", "--call", "width=8"],
    "odd size, here": ["plan", "sdxl", "--height", "1001"],
    "unknown explanation": ["plan", "sdxl", "--machine", "t4-16gb", "--explain", "time"],
    "unknown model in detail": ["models", "sdxxl"],
    "frames of an image": ["predict", "sdxl", "--machine", "t4-16gb", "--frames", "16"],
    "unknown dtype": ["plan", "sdxl", "--machine", "t4-16gb", "--dtype", "int3"],
    "unknown quality": ["plan", "sdxl", "--machine", "t4-16gb", "--quality", "best"],
    "unknown optimization": ["predict", "sdxl", "--machine", "t4-16gb", "--with", "xformer"],
    "unknown parameter": ["predict", "sdxl", "--machine", "t4-16gb", "--with", "tome:rate=1"],
    "value out of range": ["predict", "sdxl", "--machine", "t4-16gb", "--with", "tome:ratio=2"],
    "no number": ["predict", "sdxl", "--machine", "t4-16gb", "--with", "tome:ratio=nan"],
    "named twice": ["predict", "sdxl", "--machine", "t4-16gb", "--with", "tome,tome"],
    "incoherent": ["predict", "sdxl", "--machine", "t4-16gb",
                   "--with", "xformers,attention_slicing"],
    "no link": ["predict", "sdxl", "--machine", "cpu-16-cores", "--with", "model_cpu_offload"],
    "limit without a unit": ["plan", "sdxl", "--machine", "t4-16gb", "--vram-limit", "5"],
    "RAM limit without a unit": ["plan", "sdxl", "--machine", "t4-16gb", "--ram-limit", "5"],
    "bad reserve": ["run", "--reserve", "some"],
    "alone and left out": ["plan", "sdxl", "--machine", "t4-16gb",
                           "--only", "tome", "--without", "tome"],
    "kept and left out": ["plan", "sdxl", "--machine", "t4-16gb",
                          "--keep", "tome", "--without", "tome"],
    "no images": ["plan", "sdxl", "--machine", "t4-16gb", "--images", "0"],
    "unknown priority": ["plan", "sdxl", "--machine", "t4-16gb", "--priority", "colour"],
    "neither machine nor model": ["plan", "sdxl", "--compare", "t4-16gb,sdxxl"],
    "code of several": ["plan", "sdxl,sd15", "--machine", "t4-16gb", "--code"],
    "two views": ["plan", "sdxl", "--machine", "t4-16gb", "--code", "--frontier"],
    "bad limit": ["plan", "sdxl", "--machine", "t4-16gb", "--vram-limit", "lots"],
    "unknown machine": ["plan", "sdxl", "--machine", "rtx-9090"],
    "missing machine file": ["plan", "sdxl", "--machine", "./nowhere.json"],
    "machine file that is none": ["plan", "sdxl", "--machine", str(SCHEMAS / "plan.json")],
    "unknown device": ["probe", "--device", "cuda:99"],
    "output folder missing": ["run", "-o", "/no/such/folder/out.png"],
    "output that is no image": ["run", "-o", "out.txt"],
    "no prompt": ["run", "sd15"],
    "bad seed": ["run", "--seed", "-1"],
    "unknown profile": ["profile", "show", "no-such-machine"],
    "missing import": ["profile", "import", "/no/such/file.json"],
}  # fmt: skip


LARGER = ["run", "--height", "256", "--width", "256", "--vram-limit", "30MiB", "-o", "out.png"]
SHORT = {
    "too little": ["run", "--vram-limit", "4MiB", "-o", "out.png"],
    "too large": LARGER,
    "good enough": [*LARGER, "--quality", "balanced", "--steps", "2"],
    "no place to write": ["run", "-o", "/proc/out.png"],
}

ONE_AFTER_THE_OTHER = """
import contextlib, io, json, os, sys, tempfile, traceback
from autotune.cli.app import main
answers = {}
for case, arguments in json.load(sys.stdin).items():
    os.chdir(tempfile.mkdtemp())
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = ["autotune", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
    answers[case] = [code, out.getvalue(), err.getvalue(), os.listdir()]
print(json.dumps(answers))
"""
"""A process for each would import PyTorch again and again."""


class Answer(NamedTuple):
    code: int | None
    stdout: str
    stderr: str
    files: list[str]


@pytest.fixture(scope="module")
def answers(_one_measurement: str) -> dict[str, Answer]:
    """What each of ``BAD`` and ``SHORT`` gets, all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER],
        input=json.dumps({**BAD, **SHORT}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {case: Answer(*answer) for case, answer in found.items()}


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "-"))
def test_bad_input_gets_one_line_and_a_remedy(case, answers):
    answer = answers[case]
    assert answer.code not in (None, 0)
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  try: ")
    assert len(lines) == 2
    assert not answer.files


def test_what_does_not_fit_is_refused_before_weights_are_read(answers):
    """The line says what is short of what, and a quality level is offered only if it would fit."""
    done = answers["too little"]
    assert done.code == 1
    assert "does not fit: decode needs" in done.stderr
    assert "quality" not in done.stderr
    assert not done.files
    offered = answers["too large"]
    assert "quality balanced (" in offered.stderr
    assert "vae_tiling" in offered.stderr
    drawn = answers["good enough"]
    assert drawn.code == 0, drawn.stderr
    assert drawn.files == ["out.png"]


def test_a_folder_that_cannot_be_written_is_found_out_first(answers):
    done = answers["no place to write"]
    assert done.code == 1
    assert "cannot write to /proc" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_ends_as_its_verb_does(tmp_path):
    done = autotune("plan", "sdxxl", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


@thoroughly
def test_broken_profile_is_set_aside_and_measured_again(tmp_path):
    cache = tmp_path / "cache"
    env = {**os.environ, "AUTOTUNE_CACHE": str(cache)}
    where = autotune("profile", "path", "--json", env=env)
    file = Path(json.loads(where.stdout)["path"])
    cache.mkdir()
    file.write_text('{"schema_version": 1, "mach')
    done = autotune("plan", "demo", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert "set aside" in done.stderr
    assert "measured this machine" in done.stderr
    assert json.loads(file.read_text())["schema_version"] == SCHEMA_VERSION


def test_interrupt_leaves_nothing_half_written(tmp_path):
    """Ctrl-C during the steps: one line, no image, no stray file."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "autotune",
            "run",
            "--steps",
            "900",
            "--batch",
            "8",
            "-o",
            "out.png",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that put the tests in its background has had this ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(5)
    for _ in range(12):  # libraries swallow it while they are imported, on a busy machine
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=10)
            break
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
