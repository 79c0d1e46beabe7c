"""Serve models with an OpenAI-compatible API, and a web page to chat on.

Answers /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics; the page is at /.
Requests are batched continuously: they join and leave between two steps of the model. See
docs/en/serve.md.

    python scripts/serve.py                                   # the newest SFT weights in out/
    python scripts/serve.py --model small=full_sft_192 --model big=out/full_sft_512.pth
    python scripts/serve.py --lora library=full_sft_512+lora  # an adapter on a served model
    MINIMIND_API_KEY=secret python scripts/serve.py --host 0.0.0.0 --port 8080
"""

import argparse
import gc
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from model.newest import newest_weights
from model.weights import read_config
from runtime.chat_model import ChatModel, open_chat_model, open_device
from runtime.flags import check_flags, usage_error
from runtime.process import exits
from runtime.serving.access import Access, is_loopback
from runtime.serving.app import Limits, Service, make_app
from runtime.serving.engine import Engine, EngineThread
from runtime.serving.http_server import open_socket, serve
from runtime.serving.memory import check_cache, check_weights
from runtime.serving.served_model import ServedModel

PACKAGES = ("starlette", "uvicorn", "httptools")  # llguidance is asked for where it is needed
MOST_KEY = 4096  # characters
DTYPES = ("float32", "float16", "bfloat16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = usage_error
    models = parser.add_argument_group("models")
    named = "stage (its newest run), run, path or folder, with a name for requests; repeatable"
    models.add_argument("--model", action="append", metavar="NAME=WEIGHTS", help=named)
    adapter = "an adapter on a served model, as a model of its own; repeatable"
    models.add_argument("--lora", action="append", metavar="NAME=MODEL+ADAPTER", help=adapter)
    models.add_argument("--out_dir", default=str(ROOT / "out"), help="where weights are looked for")
    models.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    models.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on GPU")
    spread = "auto: a model that no device holds, over GPUs, CPU memory and disk"
    models.add_argument("--device_map", choices=("auto",), help=spread)
    most = "for --device_map, by default what is free: 0=20GiB cpu=64GiB"
    models.add_argument("--max_memory", nargs="+", metavar="DEVICE=SIZE", help=most)
    load = parser.add_argument_group("load")
    load.add_argument("--max_concurrent", type=int, default=64, help="requests at once, each model")
    load.add_argument("--max_waiting", type=int, default=256, help="requests that wait; then 429")
    load.add_argument("--context", type=int, help="tokens of a prompt with its reply")
    load.add_argument("--request_timeout", type=float, default=600, help="seconds")
    load.add_argument("--max_body", type=int, default=4 << 20, help="bytes of a request")
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine")
    access.add_argument("--port", type=int, default=8000, help="0: any that is free")
    key = "file with the key that requests must bring (or MINIMIND_API_KEY)"
    access.add_argument("--api_key_file", help=key)
    origin = "whose pages may ask, https://example.org; repeatable"
    access.add_argument("--cors_origin", action="append", metavar="ORIGIN", help=origin)
    grace = "seconds that requests have to finish after SIGTERM"
    access.add_argument("--grace", type=float, default=30, help=grace)
    args = parser.parse_args()
    check_flags(vars(args))
    if args.max_memory and not args.device_map:
        raise ValueError("--max_memory: must come with --device_map auto")
    if args.lora and args.device_map:
        raise ValueError("--lora: must not come with --device_map: merge it first")
    return args


def check_packages() -> None:
    """ValueError: an optional package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"serving needs {names}: pip install -r requirements-serve.txt")


def read_api_key(path: str | None) -> str:
    """The key that requests must bring; "": none."""
    key = os.environ.get("MINIMIND_API_KEY", "")
    if path:
        if not Path(path).is_file():
            raise ValueError(f"--api_key_file {path}: no such file")
        with open(path, encoding="utf-8", errors="replace") as file:
            key = file.read(MOST_KEY + 1).strip()
        if not 0 < len(key) <= MOST_KEY:
            fault = f"a key has 1 to {MOST_KEY} characters"
            raise ValueError(f"--api_key_file {path}: {fault}")
    if not key.isascii() or not key.isprintable() or " " in key:
        source = f"--api_key_file {path}" if path else "MINIMIND_API_KEY"
        raise ValueError(f"{source}: a key is one line of visible ASCII characters, no blanks")
    return key


def split_names(values: list[str], flag: str, form: str) -> dict[str, str]:
    """Flags of the form NAME=VALUE -> {name: value}."""
    named = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (equals and name and value and name.isprintable()):
            raise ValueError(f"{flag} {text}: must be {form}")
        if name in named:
            raise ValueError(f"{flag} {text}: the name {name} is there twice")
        named[name] = value
    return named


def find_models(args: argparse.Namespace) -> dict[str, tuple[Path, Path | None]]:
    """Name -> (weights, adapter or None) of all models; bases come before their adapters."""
    found: dict[str, tuple[Path, Path | None]] = {}
    for text in args.model or ["full_sft"]:
        name, equals, weight = text.partition("=")
        path = newest_weights(weight if equals else text, args.out_dir, "--model")
        name = name if equals else path.name if path.is_dir() else path.stem
        if not name or not name.isprintable():
            raise ValueError(f"--model {text}: must be NAME=WEIGHTS")
        if name in found:
            raise ValueError(f"--model {text}: the name {name} is there twice")
        found[name] = path, None
    bases = dict(found)
    for name, value in split_names(args.lora or [], "--lora", "NAME=MODEL+ADAPTER").items():
        base, plus, adapter = value.partition("+")
        if not plus or base not in bases:
            known = ", ".join(bases)
            raise ValueError(
                f"--lora {name}={value}: must be NAME=MODEL+ADAPTER, where MODEL is one of {known}"
            )
        if name in found:
            raise ValueError(f"--lora {name}={value}: a model has this name")
        found[name] = bases[base][0], newest_weights(adapter, args.out_dir, "--lora")
    return found


def share_weights(model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Let a model with a merged adapter use the tensors of its base that the adapter left alone."""
    own = dict(base.named_parameters())
    for name, p in model.named_parameters():
        if torch.equal(p, own[name]):
            p.data = own[name].data


def open_models(args: argparse.Namespace, device: torch.device) -> list[ServedModel]:
    """Load all models and give each an engine."""
    served, chats = [], {}
    for name, (path, adapter) in find_models(args).items():
        if not args.device_map:
            check_weights(name, read_config(path))
        chat = open_chat_model(
            path,
            device,
            dtype=args.dtype,
            lora=adapter,
            device_map=args.device_map,
            max_memory=args.max_memory,
        )
        if adapter is not None:
            share_weights(chat.model, chats[path].model)
        else:
            chats[path] = chat
        served.append(serve_model(args, name, chat))
    return served


def serve_model(args: argparse.Namespace, name: str, chat: ChatModel) -> ServedModel:
    context = args.context or chat.context
    if context > chat.context:
        raise ValueError(f"--context {context}: {name} has a context of {chat.context} tokens")
    weight = chat.model.lm_head.weight
    check_cache(chat.model.config, weight.dtype, weight.device, args.max_concurrent, context)
    engine = Engine(chat.model, args.max_concurrent, context, args.max_waiting)
    return ServedModel(name, chat, engine)


def main() -> int:
    # 1. Flags, and what can be wrong with them before anything is loaded
    args = parse_args()
    check_packages()
    key = read_api_key(args.api_key_file)
    listener = open_socket(args.host, args.port)
    host, port = listener.getsockname()[:2]

    # 2. Models
    engines = EngineThread()
    models = engines.call(open_models, args, open_device(args.device))

    # 3. Serve
    gc.freeze()  # collections that look at all modules would stop streams for a third of a second
    service = Service(models, Limits(args.request_timeout, args.max_body))
    is_local = is_loopback(host)
    page = ROOT / "scripts" / "web"
    access = Access(key, local_only=is_local and not key)
    app = make_app(service, access, args.cors_origin or [], page if page.is_dir() else None)
    if not is_local and not key:
        print("warning: no API key: whoever reaches this machine may ask", file=sys.stderr)
    names = ", ".join(service.models)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    ready = f"{address}: {names}; {args.max_concurrent} requests at once. Ctrl-C ends the server"
    serve(app, service, engines, listener, args.grace, ready)
    return 0


if __name__ == "__main__":
    exits.run(main)
