#!/usr/bin/env python3
"""Install a wheel in an empty environment and use it: the read-only verbs must run without torch.

python scripts/check_wheel.py dist/diffusers_autotune-*.whl /tmp/empty-venv
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

VERBS = (("--help",), ("profile", "list"), ("machines",), ("optimizations", "--json"))
CONTENTS = (
    "autotune/_profiles/rtx-3080-10gb.json",
    "autotune/demo/model/model_index.json",
    "autotune/py.typed",
)
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def main() -> None:
    """Check contents, install, run every read-only verb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("environment", type=Path)
    arguments = parser.parse_args()
    check_contents(arguments.wheel)
    venv.create(arguments.environment, with_pip=True, clear=True)
    python = arguments.environment / "bin" / "python"
    # Most of what is installed is never imported here: compiling it takes longer than the rest.
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    install.append("--no-compile")
    constrained = [*install, "-c", str(CONSTRAINTS)]
    subprocess.run([*constrained, "torch"], check=True)
    subprocess.run([*constrained, str(arguments.wheel)], check=True)
    for verb in VERBS:
        run_without_torch(arguments.environment, verb)
    print(f"{arguments.wheel.name}: {len(VERBS)} verbs run without importing torch")


def check_contents(wheel: Path) -> None:
    """Fail unless the wheel carries the reference machines and the demo weights."""
    names = zipfile.ZipFile(wheel).namelist()
    missing = [f for f in CONTENTS if f not in names]
    if not any(
        n.startswith("autotune/demo/model/unet/") and n.endswith(".safetensors") for n in names
    ):
        missing.append("the demo UNet's weights")
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")


def run_without_torch(environment: Path, verb: tuple[str, ...]) -> None:
    """Run one verb from an empty folder and look through everything it imported."""
    folder = environment / "empty"
    folder.mkdir(exist_ok=True)
    command = [str(environment / "bin" / "python"), "-X", "importtime", "-m", "autotune", *verb]
    environ = {**os.environ, "AUTOTUNE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    if done.returncode or "torch" in imported:
        reason = "imports torch" if "torch" in imported else done.stderr[-2000:]
        sys.exit(f"autotune {' '.join(verb)}: {reason}")


if __name__ == "__main__":
    main()
