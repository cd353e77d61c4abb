"""Models from a word on the command line or from a file, weights to and from files.

Nothing is unpickled and nothing downloaded; what a file names is checked first (`wideberth.trust`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from wideberth import checksums
from wideberth.checks import InputError, one_line
from wideberth.configuration import construct, import_object, parse_call
from wideberth.models.libraries import LibraryModel, Timm, Torchvision
from wideberth.runs import Run, write_atomically
from wideberth.trust import NotTrusted, check

FORMS = (
    "accepted are a run directory, a .safetensors file, timm/NAME, torchvision/NAME, "
    "a name of wideberth.models, or an import path such as package.module:factory(width=8)"
)
CHECKPOINTS = (".pt", ".pth", ".ckpt")
# What data parallelism, Lightning and torch.compile put in front of the names of a wrapped model.
PREFIXES = ("", "module.", "model.", "_orig_mod.", "model.module.", "module.model.", "model._orig_mod.")
# Where training scripts put the weights among the other things in a checkpoint.
ENTRIES = ("state_dict", "model_state_dict", "model", "net")


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the model's parameters and buffers as safetensors, atomically; tied tensors are stored once.

    The header holds a checksum, to which `load_weights` holds the file wherever it is copied.
    """

    def write(temporary: Path) -> None:
        save_model(model, str(temporary), dict(checksums.UNSEALED))
        checksums.seal(temporary)

    write_atomically(Path(path), write)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load parameters and buffers into the model, all of them or none.

    Takes .safetensors, and .pt, .pth and .ckpt files without unpickling objects; in these the weights may sit under
    "state_dict" or "model". Prefixes that wrappers add to names ("module.", "model.") are dropped, and with them what
    a checkpoint holds beside the model. A torchvision or timm network also takes its library's own files.

    Raises:
        InputError: when the file is missing, unreadable or not as it was written (where it has a checksum), or names
            or shapes differ; the first few are named.
    """
    state = _read(Path(path))
    if isinstance(model, LibraryModel) and _overlap(state, model.net) > _overlap(state, model):
        model = model.net
    expected = model.state_dict()
    state = _stripped(state, expected)
    # Tied tensors are stored under one of their names.
    stored = {_identity(expected[key]) for key in state if key in expected}
    missing = [k for k in expected if k not in state and _identity(expected[k]) not in stored]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(tensor.shape)} for {tuple(expected[key].shape)}"
        for key, tensor in state.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    differences = [
        f"{kind} {_first_few(keys)}"
        for kind, keys in [("missing", missing), ("unexpected", unexpected), ("mis-shaped", reshaped)]
        if keys
    ]
    if differences:
        raise InputError(f"weights {str(path)!r} do not fit {type(model).__name__}: {'; '.join(differences)}")
    model.load_state_dict(state, strict=False)


def build(spec: Mapping[str, Any], *, trust: bool = False) -> nn.Module:
    """The model that a configuration names: {"class_path": import path, "init_args": {name: value}}.

    A bare class path is a name of `wideberth.models`. An argument of the same form is built too, so that a model may
    hold another; or, where a function is wanted (`head`, `activation`), it becomes what builds it.

    Args:
        spec: the configuration.
        trust: whether it may name any class, yours among them, whose code then runs; else only those of wideberth,
            torch.nn, torchvision and timm.

    Raises:
        NotTrusted: it names anything else, and `trust` is False; nothing was imported.
        InputError: when the form is wrong, the class unknown, an argument wrong, or the result not an `nn.Module`.
    """
    return _build(spec, trust, "model")


def _build(spec: Mapping[str, Any], trust: bool, where: str) -> nn.Module:
    """`build`, with the file that holds the configuration for its messages."""
    if not trust:
        check(spec, nn.Module, where, "model")
    return _model(_construct(spec), str(spec["class_path"]))


def load_model(
    spec: str,
    *,
    weights: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    classes: int | None = None,
    trust: bool = False,
) -> nn.Module:
    """The model that `spec` names, on the CPU and in eval mode.

    Args:
        spec: a run directory; a file of weights, .safetensors or else .pt, .pth or .ckpt; "timm/NAME" or
            "torchvision/NAME"; a name of `wideberth.models` such as "WideResNet(depth=28)"; or an import path with
            literal arguments, "package.module:factory(width=8)" or "package.module.Factory(8)", installed or in the
            current directory.
        weights: a file to load into the model. Nothing is downloaded: without it, all but runs and files have random
            weights, or what the user's factory put there. For a run, used instead of its model.safetensors.
        architecture: for a file of weights, the model as `build` takes it; by default from the config.yaml beside it.
        classes: number of classes of a timm or torchvision network; the other forms say it themselves.
        trust: whether the config.yaml of a run, or the architecture, may name any class, yours among them, whose code
            then runs; else only those of wideberth, torch.nn, torchvision and timm. An import path in `spec` is never
            questioned.

    Raises:
        NotTrusted: a file names anything else, and `trust` is False; nothing was imported.
        InputError: one line that says what is wrong and, where `spec` names no model, which forms are accepted.
    """
    path = Path(spec)
    is_file = path.suffix in (".safetensors", *CHECKPOINTS)
    if architecture is not None and not is_file:
        raise InputError(f"model {spec!r}: architecture belongs to a file of weights only; {FORMS}")
    try:
        if path.is_dir():
            model = _build(_architecture(path), trust, str(path / "config.yaml"))
            weights = weights or _final_weights(path)
        elif is_file:
            if weights is not None:
                raise InputError(f"is a file of weights itself: weights={weights!r} is one too many")
            if architecture is not None:
                model = _build(architecture, trust, "architecture")
            else:
                beside = _directory_of(path)
                model = _build(_architecture(beside), trust, str(beside / "config.yaml"))
            weights = spec
        else:
            model = _by_name(spec, classes)
    except NotTrusted:  # which says where, and is long enough
        raise
    except InputError as error:
        raise InputError(f"model {spec!r}: {error}; {FORMS}") from error
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _by_name(spec: str, classes: int | None) -> nn.Module:
    library, slash, name = spec.partition("/")
    if slash and library == "timm":
        return Timm(name, classes)
    if slash and library == "torchvision":
        return Torchvision(name, classes)
    if slash:
        raise InputError("no such directory or file")
    path, args, kwargs = parse_call(spec)
    return _model(construct(_find(path), path, *args, **kwargs), path)


def _find(path: str) -> Any:
    """The class or function at an import path; a bare name is one of wideberth.models."""
    if "." in path or ":" in path:
        return import_object(path)
    from wideberth import models

    ours = {name: getattr(models, name) for name in models.__all__}
    nets = {n: c for n, c in ours.items() if isinstance(c, type) and issubclass(c, nn.Module)}
    if path not in nets:
        raise InputError(f"{path!r} is no model: wideberth.models has {', '.join(nets)}")
    return nets[path]


def _construct(spec: Mapping[str, Any], later: bool = False) -> Any:
    """The object of a spec, or, for `later`, what makes it from the arguments that the spec leaves open."""
    keys = {"class_path", "init_args", "dict_kwargs"}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str) or set(spec) - keys:
        raise InputError(f"{spec!r}: must be {{'class_path': import path, 'init_args': {{name: value}}}}")
    arguments: dict[str, Any] = {}
    for key in ("init_args", "dict_kwargs"):
        given = spec.get(key) or {}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise InputError(f"{key}={given!r}: must be a mapping from argument names to values")
        arguments |= given
    path = spec["class_path"]
    factory = _find(path)
    built: dict[str, Any] = {}
    for name, value in arguments.items():
        nested = isinstance(value, Mapping) and "class_path" in value
        built[name] = _construct(value, later=_wants_a_factory(factory, name)) if nested else value
    return partial(factory, **built) if later else construct(factory, path, **built)


def _wants_a_factory(factory: Any, name: str) -> bool:
    """Whether a parameter wants what makes an object, as `head` and `activation` of the networks do."""
    try:
        hints = get_type_hints(factory.__init__ if isinstance(factory, type) else factory)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):  # of the user's code
        return False
    hint = hints.get(name)
    return any(get_origin(kind) is Callable for kind in (hint, *get_args(hint)))


def _model(made: Any, path: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise InputError(f"{path}: must give an nn.Module, gave {type(made).__name__}")
    return made


def _architecture(directory: Path) -> Mapping[str, Any]:
    config = Run(directory).config
    if not isinstance(config.get("model"), Mapping):
        raise InputError(f"{str(directory / 'config.yaml')!r} holds no model with class_path and init_args")
    model: Mapping[str, Any] = config["model"]
    return model


def _directory_of(file: Path) -> Path:
    """The directory of the configuration that belongs to a file of weights."""
    if not file.is_file():
        raise InputError("no such file")
    # The checkpoints of a run lie one folder below its configuration.
    directory = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    if not (directory / "config.yaml").is_file():
        raise InputError("needs an architecture (class_path, init_args), or a config.yaml beside it")
    return directory


def _final_weights(directory: Path) -> str:
    run = Run(directory)
    if not run.finished:
        checkpoint = f"; its last checkpoint is {str(run.checkpoint)!r}" if run.checkpoint else ""
        raise InputError(f"holds no model.safetensors, so the run is not finished{checkpoint}")
    return str(directory / "model.safetensors")


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors in a file of weights."""
    if not path.is_file():
        raise InputError(f"weights {str(path)!r}: no such file")
    try:
        checksums.verified(path)
        if path.suffix == ".safetensors":
            if not checksums.sound(path):
                raise InputError(f"weights {str(path)!r}: damaged, it does not match the checksum in its header")
            return load_file(path)
        if path.suffix not in CHECKPOINTS:
            raise InputError(f"weights {str(path)!r}: must be .safetensors, {', '.join(CHECKPOINTS)}")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weights {str(path)!r}: holds more than tensors, and unpickling objects could run any code; "
            "save its state_dict() alone"
        ) from error
    except InputError:
        raise
    except Exception as error:  # damaged files raise all kinds
        raise InputError(f"weights {str(path)!r}: cannot be read: {one_line(error)}") from error
    entries = [loaded, *(loaded[name] for name in ENTRIES if isinstance(loaded, Mapping) and name in loaded)]
    for entry in entries:
        if isinstance(entry, Mapping) and entry and all(isinstance(v, Tensor) for v in entry.values()):
            return dict(entry)
    raise InputError(f"weights {str(path)!r}: holds no named tensors, at the top or under {', '.join(ENTRIES)}")


def _stripped(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """The state behind the prefix under which most of the expected names are found."""
    wanted = set(expected)
    views = [
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in PREFIXES
    ]
    return max(views, key=lambda view: len(wanted & view.keys()))


def _overlap(state: Mapping[str, Tensor], model: nn.Module) -> int:
    expected = model.state_dict()
    return len(expected.keys() & _stripped(state, expected).keys())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of the same memory."""
    return tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride()


def _first_few(keys: list[str], few: int = 3) -> str:
    more = f" and {len(keys) - few} more" if len(keys) > few else ""
    return ", ".join(keys[:few]) + more
