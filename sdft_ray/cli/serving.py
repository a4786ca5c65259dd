"""Commands of the service: `sdft serve`, `keys`, `evaluate`, `bench-serve`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdft_ray.cli.options import JsonOpt, StoreOpt, check_extra, open_store
from sdft_ray.errors import ServeError

if TYPE_CHECKING:
    from sdft_ray.serving.settings import ServeSettings

keys = typer.Typer(no_args_is_help=True, help="Create and revoke API keys of a service. Only their hashes are stored.")

EndpointKeyOpt = Annotated[
    str, typer.Option("--key-variable", metavar="NAME", help="Environment variable that contains the API key.")
]
KeysOpt = Annotated[Path, typer.Option("--keys", metavar="FILE", help="Key file.")]
_KEYS = Path("keys.yaml")


def serve(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="NAME: the best student of a run. NAME:teacher, NAME:pruned, NAME:ARM: another model of it. NAME:all: "
            "all its models. Also: the address of an artifact, or a Hugging Face model directory.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings YAML file, instead of arguments.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one other than loopback needs API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    engine: Annotated[
        Literal["vllm", "transformers"],
        typer.Option(help="Use transformers where vLLM is not available; it is slower."),
    ] = "vllm",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Data type of all models. auto: what is faster on the hardware and no less exact than the checkpoint."
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Serve every other model also as MODEL+draft, with this draft model."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--keys", metavar="FILE", help="File of accepted API keys; see `sdft keys`.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Accept requests without an API key.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", metavar="PEM", help="Serve HTTPS with this certificate.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="PEM", help="Private key of the certificate.")
    ] = None,
    store: StoreOpt = None,
) -> None:
    """Serve models with an OpenAI-compatible API, and a web page to compare them. Ctrl-C shuts down gracefully.

    What Ray and the engines print in this process is written to logs/serve.log in the store.
    """
    import tempfile
    import time

    check_extra("serve", "fastapi")

    from sdft_ray.cli.render import print_service
    from sdft_ray.progress import libraries_to
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.serving.haproxy import ListenAddress, joined_certificate
    from sdft_ray.serving.local import service
    from sdft_ray.store.store import Store

    if (certificate is None) != (tls_key is None):
        raise ServeError("--tls-certificate and --tls-key must be given together", "give both")
    with tempfile.TemporaryDirectory(prefix="sdft-tls-") as folder:
        pem = joined_certificate(certificate, tls_key, Path(folder)) if certificate and tls_key else None
        address = ListenAddress(host, port, pem)
        settings = _settings(sources or [], config, store, engine, dtype, draft, key_file, allow_anonymous)
        typer.echo(f"starting {', '.join(model.name for model in settings.models)} ...", err=True)
        stopping, began = threading.Event(), time.monotonic()
        with service(settings, address, Resources()) as engines:
            print_service(settings, engines, address.url, time.monotonic() - began)
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, lambda *_: stopping.set())
            with libraries_to(Store(settings.store or ".sdft").log_path("serve")):
                stopping.wait()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            typer.echo("finishing the requests in flight (Ctrl-C again: stop now) ...", err=True)


def _settings(
    sources: list[str], config: Path | None, store: str | None, engine: str, dtype: str | None, draft: str | None,
    key_file: Path | None, allow_anonymous: bool,
) -> ServeSettings:  # fmt: skip
    from sdft_ray.serving.settings import Draft, ServeSettings
    from sdft_ray.serving.sources import named
    from sdft_ray.store.store import Store

    if bool(sources) == (config is not None):
        raise ServeError("give either names of models or --config FILE", "`sdft ls` lists the runs")
    url = open_store(store).url
    if config is not None:
        settings = ServeSettings.load(config)
    else:
        models = [
            {"name": model.name, "source": model.source, "engine": {"kind": engine}}
            for model in named(tuple(sources), Store(url))
        ]
        settings = ServeSettings.parse({"models": models}, "the command line")
    if dtype is not None:
        settings = settings.with_dtype(dtype)
    if draft is not None:
        proposer, *others = named((draft,), Store(settings.store or url))
        if others:
            raise ServeError(f"--draft {draft} stands for several models", "give one, such as NAME:ARM")
        drafted = [
            model.model_copy(update={"name": f"{model.name}+draft", "draft": Draft(source=proposer.source)})
            for model in settings.models
            if model.source != proposer.source
        ]
        settings = settings.model_copy(update={"models": (*settings.models, *drafted)})
    access = settings.access.model_copy(
        update={
            "keys_file": str(key_file.resolve()) if key_file else settings.access.keys_file,
            "allow_anonymous": allow_anonymous or settings.access.allow_anonymous,
        }
    )
    return settings.model_copy(update={"access": access, "store": settings.store or url})


@keys.command(name="new")
def keys_new(
    name: Annotated[str, typer.Argument(help="Name of the client in logs and metrics.")],
    file: KeysOpt = _KEYS,
    days: Annotated[int | None, typer.Option(min=1, help="Days until the key expires. Default: never.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Limit, per replica. Default: none.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Limit on prompt and answer tokens, per replica. Default: none.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model that the key may use; can be repeated. Default: all.")
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Write no file; print ID:SHA256 for $SDFT_API_KEYS instead.")
    ] = False,
) -> None:
    """Create an API key and print it, this once. A running service accepts it within seconds."""
    from datetime import UTC, datetime, timedelta

    from sdft_ray.serving.access import add_key, make_key, new_secret

    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) if days else None
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    fields = {"expires": expires, "models": tuple(model) if model else None, **limits}
    if only_print and any(value is not None for value in fields.values()):
        raise ServeError(
            "$SDFT_API_KEYS can contain only names and hashes, no limits", "leave out --print, and give --keys FILE"
        )
    secret = new_secret()
    key = make_key(secret, id=name, **fields)
    if only_print:
        typer.echo(f"{key.id}:{key.sha256}")
    else:
        add_key(file, key)
        typer.echo(f"wrote {name} to {file}; the key itself is shown only now:", err=True)
    typer.echo(secret)


@keys.command(name="revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="The client's name.")],
    file: KeysOpt = _KEYS,
) -> None:
    """Remove a key from the file. A running service rejects it within seconds."""
    from sdft_ray.serving.access import remove_key

    remove_key(file, name)
    typer.echo(f"revoked {name}")


@keys.command(name="list")
def keys_list(file: KeysOpt = _KEYS) -> None:
    """List the names in a key file with their limits. The keys themselves are not in the file."""
    from sdft_ray.cli.render import print_keys
    from sdft_ray.serving.access import read_keys

    print_keys(read_keys(file))


def evaluate(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="lm-eval tasks, tags or groups.")],
    endpoint: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible server; the URL ends in /v1.")],
    model: Annotated[str, typer.Option(help="Name of the model on the server.")],
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Directory with the model's tokenizer.")],
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with additional lm-eval task files.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the tasks' data sets as files.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only this many items of each task, the first ones. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Few-shot examples in each prompt. Default: the task's own number.")
    ] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Do not apply the model's chat template to prompts.")
    ] = False,
    num_concurrent: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 16,
    key_variable: EndpointKeyOpt = "SDFT_API_KEY",
    as_json: JsonOpt = False,
) -> None:
    """Evaluate a served model with lm-eval, with the same scoring as a recipe's `evaluate` steps."""
    from sdft_ray.cli.render import print_scores
    from sdft_ray.evaluation.endpoint import Endpoint, evaluate_endpoint
    from sdft_ray.evaluation.harness import EvalConfig
    from sdft_ray.progress import Event, open_view

    key = os.environ.get(key_variable)
    server = Endpoint(endpoint.rstrip("/"), model, tokenizer, key=key, num_concurrent=num_concurrent)
    config = EvalConfig(tasks, include, limit, num_fewshot, apply_chat_template=not no_chat_template, data=data)
    with open_view("plain" if as_json else "auto", [model]) as shown:
        shown.handle(Event("stage_started", model))
        scores = evaluate_endpoint(
            server, config, lambda done, total: shown.handle(Event("progress", model, done, total, "items"))
        )
        shown.handle(Event("stage_finished", model))
    print_scores(scores, as_json=as_json)


def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="OpenAI-compatible server; the URL ends in /v1.")],
    model: Annotated[list[str], typer.Option(help="Model on the server; can be repeated. The first is the baseline.")],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt per line, text or JSON. Default: eight built-in prompts."),
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option(min=1, help="Concurrent requests; can be repeated. Default: 1.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 128,
    key_variable: EndpointKeyOpt = "SDFT_API_KEY",
    as_json: JsonOpt = False,
) -> None:
    """Measure the speed of served models on the same prompts, and whether their answers are equal."""
    check_extra("serve", "aiohttp")
    from sdft_ray.cli.render import print_comparison
    from sdft_ray.serving.compare import PROMPTS, compare, read_prompts

    texts = read_prompts(prompts) if prompts else PROMPTS
    key = os.environ.get(key_variable)
    rows = compare(url.rstrip("/"), model, texts, clients=clients or [1], max_tokens=max_tokens, key=key)
    print_comparison(rows, as_json=as_json)
