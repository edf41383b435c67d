"""The ``Architecture``: a pipeline's classes and configurations, without its weights.

It comes from a loaded pipeline, a local folder, a hub snapshot (configuration files only) or a file
beside this one. Whatever the origin, tracing starts from the same value.
"""

from __future__ import annotations

import difflib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from autotune.demo import model_path
from autotune.errors import ModelError, first_line
from autotune.probe.machine import Value
from autotune.workload.live import (
    config_of,
    digest_of,
    dtype_of,
    modules_of,
    parts_of,
    pipeline_dtype,
)

DEMO = "demo"


class ComponentConfig(Value, frozen=True):
    """One part: the library and class that ``model_index.json`` names, and its configuration.

    ``dtype`` is empty for what runs in the request's dtype, as nearly everything does. ``weights``
    is a digest of a loaded part's parameters: adapters change them, and the configuration does not
    say so.
    """

    library: str
    class_name: str
    config: dict[str, Any]
    dtype: str = ""
    weights: str = ""


class Architecture(Value, frozen=True):
    """Everything a trace needs to know about a model.

    Attributes:
        name: What the user called it.
        pipeline: Class name in diffusers, ``"StableDiffusionXLPipeline"``.
        components: Pipeline attribute → module configuration; modules with weights only.
        schedulers: Pipeline attribute → scheduler configuration; a few pipelines have two.
        tokenizers: Pipeline attribute → the most tokens it gives to a text encoder.
        options: The constructor's other arguments, as ``model_index.json`` holds them.
        half_dtype: The 16-bit dtype its weights are published for.
        weights: Folder or hub id that holds the weights, ``None`` where there are none to load.
        variant: File variant of the 16-bit weights (``"fp16"``), where the repository has one.
        steps: The pipeline's default number of denoise steps, where it is not diffusers' own.
        guidance_scale: The same for guidance.
        height: Pixels that the model is meant for, where its configuration does not say.
        width: The same for the width.
        frames: Frames of the video that it is meant for; ``None`` for images.
        parameters: Component → published number of parameters, for the built-in files.
        stored: Component → dtype of its published safetensors files (of the variant, where there is
            one), for the built-in files and their repositories; those that are not known are left
            out.
        source: Where configuration values were read, for the built-in files.
    """

    name: str
    pipeline: str
    components: dict[str, ComponentConfig]
    schedulers: dict[str, ComponentConfig] = {}
    tokenizers: dict[str, int] = {}
    options: dict[str, Any] = {}
    half_dtype: str = "float16"
    weights: str | None = None
    variant: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    parameters: dict[str, int] = {}
    stored: dict[str, str] = {}
    source: str = ""

    def config(self, component: str) -> dict[str, Any]:
        """The component's configuration, empty when the pipeline has no such component."""
        found = self.components.get(component)
        return found.config if found else {}


def builtin_names() -> tuple[str, ...]:
    """Short names that need no download to plan for."""
    files = resources.files("autotune.workload").joinpath("architectures").iterdir()
    return (DEMO, *sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


def find_architecture(model: str, download: bool = True) -> Architecture:
    """Resolve a built-in name, a local folder in diffusers format, or a hub id.

    Args:
        model: As the user named it.
        download: Whether the hub may be asked; else only what was downloaded before is read.

    Raises:
        ModelError: it is none of these, or the folder is not a pipeline.
    """
    if model == DEMO:
        # Twenty DDIM steps are what it was judged with.
        demo = _read_folder(model_path())
        return msgspec.structs.replace(demo, name=DEMO, steps=20, guidance_scale=7.5)
    if model in builtin_names():
        return _read_builtin(model)
    path = os.path.expanduser(model)  # unlike pathlib, os.path answers for any text at all
    if os.path.isdir(path):
        return msgspec.structs.replace(_read_folder(Path(path)), name=model)
    if os.path.exists(path):
        raise ModelError(
            f"{model} is a file, not a pipeline folder",
            "give the folder that holds model_index.json",
        )
    if _looks_like_path(model):
        raise ModelError(
            f"there is no folder {model}", "check the path, or give a hub id such as owner/name"
        )
    if model.count("/") != 1:
        raise _unknown(model)
    return _read_hub(model, download)


def describe_pipeline(pipe: Any) -> Architecture:
    """Read the architecture off a loaded pipeline: one of diffusers', or the user's own."""
    components, modules = parts_of(pipe), modules_of(pipe)
    if not modules:
        raise ModelError(
            f"{type(pipe).__name__} holds no modules",
            "give a diffusers pipeline, such as DiffusionPipeline",
        )
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    index = config_of(pipe)
    usual = pipeline_dtype(pipe)
    return Architecture(
        name=name,
        pipeline=type(pipe).__name__,
        components={n: _describe_module(index.get(n), m, usual) for n, m in modules.items()},
        schedulers={
            n: ComponentConfig("diffusers", type(c).__name__, _plain(config_of(c)))
            for n, c in components.items()
            if hasattr(c, "set_timesteps")
        },
        tokenizers={
            n: _limit(c.model_max_length or UNLIMITED_TOKENS)
            for n, c in components.items()
            if hasattr(c, "model_max_length")
        },
        options=_options(index),
        weights=name,
    )


UNLIMITED_TOKENS = 1 << 20
"""Tokenizers without a limit say 10³⁰, which no JSON reader takes for an integer."""


def _limit(tokens: float) -> int:
    return int(min(tokens, UNLIMITED_TOKENS))


def _options(index: dict[str, Any]) -> dict[str, Any]:
    """What ``model_index.json`` holds besides components: flags and numbers."""
    return {
        k: v
        for k, v in index.items()
        if not k.startswith("_") and isinstance(v, (bool, int, float, str))
    }


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Configurations hold dtypes and enums here and there; a trace needs what JSON can carry."""
    try:
        values = json.loads(json.dumps(config, default=str))
    except (TypeError, ValueError, RecursionError):  # a module of the user's own holds anything
        return {}
    return {k: v for k, v in values.items() if not k.startswith("_")}


def _describe_module(entry: Any, module: Any, usual: str) -> ComponentConfig:
    """What ``save_pretrained`` would write, and what differs from it.

    Args:
        entry: Library and class as the pipeline notes them: classes such as the safety checker are
            found in their pipeline's folder only. It knows nothing of what it never registered.
        module: As it is loaded.
        usual: The dtype of the pipeline.
    """
    cls = type(module)
    library, class_name = entry if entry and entry[0] else (cls.__module__, cls.__name__)
    dtype = dtype_of(module)
    return ComponentConfig(
        library=library,
        class_name=class_name,
        config=_plain(config_of(module)),
        dtype="" if dtype == usual else dtype,
        weights=digest_of(module),
    )


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


def _unknown(model: str) -> ModelError:
    close = difflib.get_close_matches(model, builtin_names(), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return ModelError(
        f"unknown model {model!r}",
        f"{guess}give a folder, a hub id (owner/name) or a name that `autotune models` lists",
    )


def _read_builtin(name: str) -> Architecture:
    file = resources.files("autotune.workload") / "architectures" / f"{name}.json"
    return msgspec.json.decode(file.read_bytes(), type=Architecture)


_CONFIGURATIONS = [
    "model_index.json", "*/config.json", "*/scheduler_config.json", "*/tokenizer_config.json",
]  # fmt: skip
"""Files of a repository that say what it is; no weights among them."""


def _read_hub(repository: str, download: bool) -> Architecture:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, allow_patterns=_CONFIGURATIONS, local_files_only=not download
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(
            f"cannot read {repository} from the Hugging Face hub: {first_line(error)}",
            "check the id, your connection and (for a gated model) `hf auth login`; "
            "`autotune models` lists what can be planned for without a download",
        ) from error
    architecture = _read_folder(Path(folder))
    return msgspec.structs.replace(
        architecture, name=repository, weights=repository, stored=_published(repository)
    )


def _published(repository: str) -> dict[str, str]:
    """The dtypes of its files as a built-in file knows them; of the full ones, no variant's."""
    known = (_read_builtin(name) for name in builtin_names() if name != DEMO)
    return next((k.stored for k in known if k.weights == repository and not k.variant), {})


def _read_folder(folder: Path) -> Architecture:
    index = _read_json(folder / "model_index.json", folder)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelError(
            f"{folder}/model_index.json names no pipeline class", "is this a diffusers pipeline?"
        )
    components, schedulers, tokenizers = _read_parts(folder, index)
    return Architecture(
        name=str(folder),
        pipeline=pipeline,
        components=components,
        schedulers=schedulers,
        tokenizers=tokenizers,
        options=_options(index),
        weights=str(folder),
    )


def _read_parts(
    folder: Path, index: dict[str, Any]
) -> tuple[dict[str, ComponentConfig], dict[str, ComponentConfig], dict[str, int]]:
    """Modules, schedulers and tokenizers that ``model_index.json`` names, by their files."""
    components: dict[str, ComponentConfig] = {}
    schedulers: dict[str, ComponentConfig] = {}
    tokenizers: dict[str, int] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or not all(entry):
            continue
        library, class_name = map(str, entry)
        part = folder / name
        for file, found in (("config.json", components), ("scheduler_config.json", schedulers)):
            if (part / file).exists():
                config = _read_json(part / file, folder)
                found[name] = ComponentConfig(library, class_name, config)
        if (part / "tokenizer_config.json").exists():
            limit = _read_json(part / "tokenizer_config.json", folder).get("model_max_length")
            tokenizers[name] = _limit(limit or UNLIMITED_TOKENS)
    return components, schedulers, tokenizers


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} is no diffusers pipeline: it has no {path.name}",
            "give the folder that save_pretrained wrote (it holds model_index.json)",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot read {path}: {error}", "download or save the pipeline again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "download or save the pipeline again")
    return value
