"""Commands of the service: `sdft serve`, `keys`, `evaluate`, `bench-serve`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdft_ray.errors import ServeError

if TYPE_CHECKING:
    from sdft_ray.serving.settings import ServeSettings

keys = typer.Typer(no_args_is_help=True, help="API keys of a service: made once, kept as hashes.")

EndpointKeyOpt = Annotated[
    str, typer.Option("--key-variable", metavar="NAME", help="Environment variable with the API key.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]
KeysOpt = Annotated[Path, typer.Option("--keys", metavar="FILE", help="Key file.")]
_KEYS = Path("keys.yaml")


def serve(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME|ADDRESS|DIRECTORY]...",
            help="A run's student (NAME), another of its models (NAME:teacher, NAME:pruned, NAME:ARM), all (NAME:all); "
            "an artifact; or a Hugging Face directory.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings YAML, in place of names.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback want keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    engine: Annotated[
        Literal["vllm", "transformers"], typer.Option(help="transformers is for where vLLM does not run.")
    ] = "vllm",
    draft: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Serve each other model once more with this one as its draft.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--keys", metavar="FILE", help="Keys that are let in; see `sdft keys`.")
    ] = None,
    allow_anonymous: Annotated[bool, typer.Option("--allow-anonymous", help="Let in everyone without a key.")] = False,
    certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", metavar="PEM", help="Speak TLS with this certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="PEM", help="Its private key.")] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Artifact store. [env SDFT_STORE; default .sdft]")
    ] = None,
) -> None:
    """Serve models over HTTP with OpenAI's API, and a page to try them side by side. Ctrl-C ends it in good order."""
    import tempfile
    import time

    from sdft_ray.cli.render import print_service
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.serving.haproxy import ListenAddress, joined_certificate
    from sdft_ray.serving.local import service

    if (certificate is None) != (tls_key is None):
        raise ServeError("--tls-certificate and --tls-key go together", "give both")
    with tempfile.TemporaryDirectory(prefix="sdft-tls-") as folder:
        pem = joined_certificate(certificate, tls_key, Path(folder)) if certificate and tls_key else None
        door = ListenAddress(host, port, pem)
        settings = _settings(sources or [], config, store, engine, draft, key_file, allow_anonymous)
        typer.echo(f"starting {', '.join(model.name for model in settings.models)} ...", err=True)
        stopping, began = threading.Event(), time.monotonic()
        with service(settings, door, Resources()):
            print_service(settings, door.url, time.monotonic() - began)
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, lambda *_: stopping.set())
            stopping.wait()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            typer.echo("finishing what is under way (Ctrl-C again: at once) ...", err=True)


def _settings(
    sources: list[str], config: Path | None, store: str | None, engine: str, draft: str | None,
    key_file: Path | None, allow_anonymous: bool,
) -> ServeSettings:  # fmt: skip
    from sdft_ray.serving.settings import Draft, ServeSettings
    from sdft_ray.serving.sources import named
    from sdft_ray.store.store import Store

    if bool(sources) == (config is not None):
        raise ServeError("say what to serve: names, or --config FILE", "try `sdft ls` for names")
    url = Store(store or os.environ.get("SDFT_STORE") or ".sdft").url
    if config is not None:
        settings = ServeSettings.load(config)
    else:
        models = [
            {"name": model.name, "source": model.source, "engine": {"kind": engine}}
            for model in named(tuple(sources), Store(url))
        ]
        settings = ServeSettings.parse({"models": models}, "the command line")
    if draft is not None:
        proposer, *others = named((draft,), Store(settings.store or url))
        if others:
            raise ServeError(f"--draft {draft} names several models", "name one, as in NAME:ARM")
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
    name: Annotated[str, typer.Argument(help="The client's name, for logs and metrics.")],
    file: KeysOpt = _KEYS,
    days: Annotated[int | None, typer.Option(min=1, help="Days until it expires. [default: never]")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it may ask; repeat. [default: all]")] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Write no file; print ID:SHA256 for $SDFT_API_KEYS.")
    ] = False,
) -> None:
    """Make a key and show it, this once. A running service takes it up within seconds."""
    from datetime import UTC, datetime, timedelta

    from sdft_ray.serving.access import add_key, make_key, new_secret

    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) if days else None
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    told = {"expires": expires, "models": tuple(model) if model else None, **limits}
    if only_print and any(value is not None for value in told.values()):
        raise ServeError(
            "$SDFT_API_KEYS holds names and hashes alone", "leave out --print, and name the file with --keys"
        )
    secret = new_secret()
    key = make_key(secret, id=name, **told)
    if only_print:
        typer.echo(f"{key.id}:{key.sha256}")
    else:
        add_key(file, key)
        typer.echo(f"wrote {name} to {file}; the key itself is shown this once:", err=True)
    typer.echo(secret)


@keys.command(name="revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="The client's name.")],
    file: KeysOpt = _KEYS,
) -> None:
    """Take a key out of the file. A running service refuses it within seconds."""
    from sdft_ray.serving.access import remove_key

    remove_key(file, name)
    typer.echo(f"revoked {name}")


@keys.command(name="list")
def keys_list(file: KeysOpt = _KEYS) -> None:
    """The names in a key file, with their limits; never a key, which the file does not hold."""
    from sdft_ray.cli.render import print_keys
    from sdft_ray.serving.access import read_keys

    print_keys(read_keys(file))


def evaluate(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="lm-eval tasks, tags or groups.")],
    endpoint: Annotated[str, typer.Option(metavar="URL", help="Server with OpenAI's API; the URL ends in /v1.")],
    model: Annotated[str, typer.Option(help="The model's name there.")],
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Directory with its tokenizer.")],
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in each prompt. [default: the task's own]")] = None,
    chat_template: Annotated[bool, typer.Option(help="Ask in the model's chat format.")] = True,
    num_concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    key_variable: EndpointKeyOpt = "SDFT_API_KEY",
    as_json: JsonOpt = False,
) -> None:
    """Score a served model with lm-eval, as a recipe's step `evaluate` scores one in process."""
    from sdft_ray.cli.render import print_scores
    from sdft_ray.evaluation.endpoint import Endpoint, evaluate_endpoint
    from sdft_ray.evaluation.harness import Asked

    key = os.environ.get(key_variable)
    place = Endpoint(endpoint.rstrip("/"), model, tokenizer, key=key, num_concurrent=num_concurrent)
    asked = Asked(tasks, include, limit, num_fewshot, apply_chat_template=chat_template)
    print_scores(evaluate_endpoint(place, asked), as_json=as_json)


def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Server with OpenAI's API; the URL ends in /v1.")],
    model: Annotated[list[str], typer.Option(help="A model there; repeat. Answers are compared with the first one's.")],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt a line, text or JSON. [default: eight of ours]")
    ] = None,
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Requests at a time; repeat. [default: 1]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 128,
    key_variable: EndpointKeyOpt = "SDFT_API_KEY",
    as_json: JsonOpt = False,
) -> None:
    """Compare served models on the same prompts: teacher, student, teacher with the student as its draft."""
    from sdft_ray.cli.render import print_comparison
    from sdft_ray.serving.compare import PROMPTS, compare, read_prompts

    asked = read_prompts(prompts) if prompts else PROMPTS
    key = os.environ.get(key_variable)
    rows = compare(url.rstrip("/"), model, asked, clients=clients or [1], max_tokens=max_tokens, key=key)
    print_comparison(rows, as_json=as_json)
