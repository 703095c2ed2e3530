"""`manager secret new` and `manager tls new`: files that let machines know each other."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path
from typing import Final

import click

from manager.cli import CONTEXT_SETTINGS, LazyGroup, say
from manager.new_file import write_new
from proto.errors import UsageError

SECRET_BYTES: Final = 32


@click.command("new")
@click.argument("file", type=click.Path(path_type=Path))
def new_secret(file: Path) -> None:
    """Write a new random secret to FILE, which only you can read.

    Copy it to every machine (`scp -p`), and pass it as --secret-file to each worker and manager.
    """
    text = base64.b64encode(secrets.token_bytes(SECRET_BYTES)) + b"\n"
    try:
        write_new(file, text)
    except FileExistsError as exc:
        raise UsageError(
            f"{file} is there already: remove it, or name another file; whoever has the old "
            "secret could not talk to who has the new one."
        ) from exc
    except OSError as exc:
        raise UsageError(
            f"cannot write the secret file {file}: {(exc.strerror or str(exc)).lower()}."
        ) from exc
    say(f"{file} is written; pass --secret-file {file} to every worker and manager")


@click.command("new")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--hosts",
    required=True,
    metavar="HOST,...",
    help="Every machine by the name or address that it is dialled by, the manager's included.",
)
@click.option(
    "--days", type=int, default=365, show_default=True, metavar="N", help="Valid for so long."
)
def new_certificates(folder: Path, hosts: str, days: int) -> None:
    """Make a small authority in DIR, and a certificate for each host.

    An authority that is there already signs those of more hosts. Give each machine its own HOST.pem
    and HOST.key, and ca.pem; ca.key stays here.
    """
    from manager.certificates import make_certificates, parse_hosts

    for path in make_certificates(folder, parse_hosts(hosts), days):
        click.echo(path)
    say(
        f"give each host its own HOST.pem and HOST.key, and {folder / 'ca.pem'}; "
        f"keep {folder / 'ca.key'} to yourself"
    )


secret = LazyGroup(
    name="secret",
    commands={"new": ("manager.keys_command", "new_secret", "Write a new random secret.")},
    context_settings=CONTEXT_SETTINGS,
    help="Make the secret that workers and managers share.",
)
tls = LazyGroup(
    name="tls",
    commands={"new": ("manager.keys_command", "new_certificates", "Make certificates for hosts.")},
    context_settings=CONTEXT_SETTINGS,
    help="Make certificates with which links are encrypted.",
)
