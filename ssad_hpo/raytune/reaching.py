"""Whether a cluster is there and can run a trial, asked before Ray is, which waits for minutes or ever."""

from __future__ import annotations

import os
import socket
import warnings

import ray
import torch

from ssad_hpo.address import without_password, without_password_of
from ssad_hpo.task import Cluster

LOOK_AGAIN = 60.0  # seconds without a training that runs, after which room is looked for again
_PATIENCE = 5.0  # seconds for a connection, and for an answer
# What an HTTP/2 client says first (RFC 9113, section 3.4), with empty settings: every gRPC server answers it.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def check_answers(address: str) -> None:
    """Raise ValueError if nothing at a cluster's address, HOST:PORT or "auto", answers like one."""
    if address in ("auto", "local"):
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address in ("auto", "local"):
        return  # Ray looks among this machine's processes, at once
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        shown = without_password(address)
        raise ValueError(f"address: expected 'auto' or HOST:PORT of a Ray cluster, got {shown!r:.80}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return
            connection.sendall(_GREETING)
            if not connection.recv(1):
                raise ConnectionError("it hangs up")
    except (OSError, UnicodeError) as error:
        reason = without_password_of(address, str(error) or type(error).__name__)
        raise ValueError(
            f"address: no Ray cluster at {without_password(address)!r} takes this process ({reason}); start "
            "one there by `ray start --head`, or give its HOST:PORT"
        ) from error


def check_room(cluster: Cluster) -> None:
    """Raise ValueError if no node of the cluster that this process has joined has what a trial asks for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": cluster.cpus_per_trial, "GPU": cluster.gpus_per_trial}
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        return
    for setting, name in (("gpus_per_trial", "GPU"), ("cpus_per_trial", "CPU")):
        most = max((node.get(name, 0) for node in nodes), default=0)
        if asked[name] > most:
            raise ValueError(
                f"{setting}: expected at most {most:g}, which the largest node has, got {asked[name]:g}"
            )
    raise ValueError(
        f"cpus_per_trial, gpus_per_trial: no node has {asked['CPU']:g} and {asked['GPU']:g}; ask for less"
    )


def warn_without_room(cluster: Cluster) -> None:
    """Warn if at present no node has what a trial asks for: Ray waits for one without a word."""
    try:
        check_room(cluster)
    except ValueError as error:
        warnings.warn(
            f"no training can run at present; what is left waits until a node is there that can ({error})",
            stacklevel=2,
        )


def check_here(cluster: Cluster) -> None:
    """Raise ValueError if this machine, where a Ray is to be started, has not what a trial asks for."""
    here, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if cluster.cpus_per_trial > here:
        raise ValueError(
            f"cpus_per_trial: expected at most this machine's {here}, got {cluster.cpus_per_trial}"
        )
    if cluster.gpus_per_trial > gpus:
        raise ValueError(
            f"gpus_per_trial: expected at most this machine's {gpus}, got {cluster.gpus_per_trial}"
        )
