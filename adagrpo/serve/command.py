"""``adagrpo serve``: a reward over HTTP until a signal ends it."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from ..arguments import new_arguments, require_one_rank, whole_number
from ..errors import InputError, Stopped
from ..recipe.keys import Config, RewardConfig
from ..recipe.load import read_recipe
from ..rewards import BUILT_IN, build_reward, check_reward_files
from ..run.signals import handling
from ..text.redaction import ENVIRONMENT, resolved
from ..text.user_text import require_within, shown

DRAIN = 120
"""Seconds that accepted requests may take after the signal."""
CONNECTIONS = 512


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add ``serve``."""
    serve = commands.add_parser(
        "serve",
        allow_abbrev=False,
        help="serve a reward over HTTP to runs elsewhere",
        description="Serve a reward over HTTP, in the JSON protocols of Flow-Factory (POST /compute) and UniRL (POST /score). "
        "A run asks it by reward `remote`. Arguments of the reward: --kwargs.NAME VALUE.",
    )
    serve.add_argument(
        "reward", help=f"{', '.join(BUILT_IN)}, or package.module:attribute; with --recipe its name there, or number"
    )
    serve.add_argument("--recipe", help="take the reward's keys from it: one that ships, or a TOML file")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=whole_number, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--token", metavar="env:VARIABLE", help="requests must bear the token in this environment variable")
    serve.add_argument("--device", help="auto, cpu, cuda, cuda:N (default: auto)")
    serve.add_argument("--dtype", choices=("fp32", "bf16"), help="precision of its weights (default: fp32)")
    serve.add_argument("--rows", type=whole_number, help="images of a call, from several requests (default: 16)")
    serve.add_argument("--wait-ms", type=whole_number, default=5, help="that an image may wait for others (default: 5)")
    serve.add_argument("--queue", type=whole_number, default=1024, help="images that may wait; more get status 503")
    serve.add_argument("--body-mib", type=whole_number, default=64, help="largest request (default: 64)")
    serve.set_defaults(run=_serve, recipe_keys=True)


def _serve(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Serve until a signal; returns 128 plus its number."""
    require_one_rank("serve")
    entry = _entry(args, rest)
    for option, low, high in (("port", 0, 65535), ("wait-ms", 0, 10_000), ("queue", 1, 10**6), ("body-mib", 1, 4096)):
        require_within(f"--{option}", getattr(args, option.replace("-", "_")), low, high)
    require_within("--rows", rows := args.rows or entry.rows or 16, 1, 4096)
    token = _token(args.token, args.host)
    try:
        import uvicorn

        from .app import Service
    except ImportError as error:
        raise InputError(f"adagrpo serve needs {error.name}; pip install 'adagrpo[serve]'") from error
    from ..build import choose_device
    from .batching import Batcher
    from .wire import Bounds

    device, dtype = choose_device(args.device or entry.device or "auto"), args.dtype or entry.dtype
    check_reward_files(entry.name, entry.kwargs, "reward", dtype)
    with _listening(args.host, args.port) as listener:
        reward = build_reward(entry.name, entry.kwargs, "reward", dtype)
        if getattr(reward, "groupwise", False):
            raise InputError(
                f"reward = {entry.name}: compares the images of a group, which requests do not name; use it in a run"
            )
        batcher = Batcher(reward, entry.name, device, rows, args.wait_ms / 1000, args.queue)
        app = Service(batcher, entry.name, token, Bounds(args.body_mib * 2**20)).app()
        config = uvicorn.Config(
            app,
            log_level=logging.WARNING,
            access_log=False,
            lifespan="off",
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=DRAIN,
            server_header=False,
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {entry.name} at http://{host}:{listener.getsockname()[1]}", flush=True)
        others: list[int] = []

        def end(number: int, frame: FrameType | None) -> None:
            others.append(number)
            signal.raise_signal(signal.SIGTERM)  # which uvicorn knows

        try:
            with handling((signal.SIGHUP, signal.SIGUSR1), end):
                uvicorn.Server(config).run([listener])
            code = 0
        except Stopped as stopped:  # uvicorn raises the signal again once accepted requests are answered
            code = 128 + (others or [stopped.signal])[0]
        except KeyboardInterrupt:
            code = 130
        batcher.close(DRAIN)
    print(f"{batcher.scored} images scored")
    return code


def _entry(args: argparse.Namespace, rest: Sequence[str]) -> RewardConfig:
    """The reward that is meant, with its keys."""
    entry = RewardConfig(args.reward)
    if args.recipe:
        found = read_recipe(args.recipe).config.rewards
        named = [r for i, r in enumerate(found) if args.reward in (r.name, str(i))]
        if len(named) != 1:
            names = ", ".join(f"{i} ({r.name})" for i, r in enumerate(found))
            raise InputError(f"{args.recipe}: {shown(args.reward)} is not one of its rewards: {names}")
        entry = named[0]
    words = [word.replace("--kwargs.", "--rewards.0.kwargs.", 1) if word.startswith("--kwargs.") else word for word in rest]
    given, strange = new_arguments(Config(rewards=(RewardConfig(args.reward),)), words)
    if strange:
        raise InputError(f"unrecognized arguments: {' '.join(strange)}; those of the reward are --kwargs.NAME VALUE")
    kwargs: dict[str, Any] = dict(entry.kwargs)
    for name, value in given.rewards[0].kwargs.items():
        before = kwargs.get(name)
        kwargs[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return RewardConfig(entry.name, kwargs=kwargs, device=entry.device, dtype=entry.dtype, rows=entry.rows)


def _token(reference: str | None, host: str) -> str:
    """The token; empty where none is needed."""
    if reference is None:
        if not _is_loopback(host):
            raise InputError(f"--host {host}: others could reach it: ask for a token, --token env:VARIABLE, or use 127.0.0.1")
        return ""
    if not reference.startswith(ENVIRONMENT) or reference == ENVIRONMENT:
        raise InputError("--token: everybody here could read it: put it into an environment variable, and write env:VARIABLE")
    token: str = resolved({"token": reference}, "--token")["token"]
    if not token.strip() or not token.isascii() or not token.isprintable():
        raise InputError(f"--token {reference}: must be printable ASCII, and not empty")
    return token


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before the reward is loaded: another server's port is found at once.

    Raises:
        InputError: the address is taken, or not this machine's.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        remedy = "name another port, or end what listens there" if port else "name an address of this machine"
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; {remedy}") from error
    with listener:
        yield listener
