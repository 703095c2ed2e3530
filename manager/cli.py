"""The `manager` command: its subcommands by name, settings, errors and exit codes.

Imports nothing but click and `proto` until a subcommand is chosen, so that `manager --help`
answers at once. What a subcommand does stands in the module named beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

import click
from click.core import ParameterSource

from proto.errors import Error
from proto.quick_start import quick_start
from proto.settings import Setting, find_settings, read_settings_file, settings_file

# name -> (module, attribute, what `manager --help` says of it)
COMMANDS: Final[dict[str, tuple[str, str, str]]] = {
    "generate": ("manager.generate", "generate", "Continue a prompt; text streams as it comes."),
    "batch": ("manager.batch", "batch", "Run a file of prompts, many at once."),
    "serve": (
        "manager.serve.command",
        "serve",
        "Serve an OpenAI-compatible API and a page that shows the pipeline.",
    ),
    "chat": ("manager.serve.chat_command", "chat", "Talk with the model of a server."),
    "top": ("manager.serve.top_command", "top", "Show a server's workers, live."),
    "report": ("manager.report", "report", "Draw what metrics files say, beside one another."),
    "workers": ("manager.workers", "workers", "Show which worker holds what, and how it fares."),
    "adapters": (
        "manager.adapters",
        "adapters",
        "Show, add and drop the adapters that workers hold.",
    ),
    "secret": ("manager.keys_command", "secret", "Make the secret that machines share."),
    "tls": ("manager.keys_command", "tls", "Make certificates with which links are encrypted."),
    "plan": ("manager.plan", "plan", "Show how a model would be cut into sections."),
    "bench": ("manager.bench", "bench", "Measure how fast the pipeline is, against others too."),
    "replay": ("manager.replay", "replay", "Have the scheduler decide a logged run anew."),
    "finetune": (
        "manager.finetune.command",
        "finetune",
        "Fine-tune a model by LoRA, on one GPU or many.",
    ),
    "llama-server": (
        "manager.llama_server.command",
        "llama_server",
        "Run llama.cpp's llama-server with its RPC workers, here.",
    ),
    "submit": ("manager.slurm.submit", "submit", "Run it on a Slurm cluster, as a job."),
    "jobs": ("manager.slurm.jobs_command", "jobs", "Show my jobs: state, nodes, why they wait."),
    "logs": ("manager.slurm.logs_command", "logs", "Show what a job printed; -f follows it."),
    "wait": ("manager.slurm.wait_command", "wait", "Wait until a job has ended."),
    "cancel": ("manager.slurm.cancel_command", "cancel", "End a job."),
    "nodes": (
        "manager.slurm.nodes_command",
        "nodes",
        "Show what nodes have, and how many suffice.",
    ),
    "task": ("manager.tasks.command", "task", ""),  # what a job's sbatch script calls on each node
}

COMPLETION_VARIABLE: Final = "_MANAGER_COMPLETE"  # click's own name for it

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130  # as shells report a command that SIGINT ended


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the command; everything it held is released."""

    def __init__(self, exit_code: int = EXIT_INTERRUPTED) -> None:
        self.exit_code = exit_code
        super().__init__("interrupted")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called.

    Args:
        commands: name -> (module, attribute, what the group's `--help` says of it).
    """

    def __init__(
        self, *args: Any, commands: Mapping[str, tuple[str, str, str]], **values: Any
    ) -> None:
        super().__init__(*args, **values)
        self.lazy_commands: Final = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy_commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy_commands:
            return None
        module, attribute, _ = self.lazy_commands[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        command.hidden = not self.lazy_commands[cmd_name][2]
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(debug_option())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = [(name, summary) for name, (_, _, summary) in self.lazy_commands.items() if summary]
        with formatter.section("Commands"):
            formatter.write_dl(shown)


def debug_option() -> click.Option:
    """`--debug`, before or after the subcommand's name."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().meta["debug"] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an error.",
    )


def version_option() -> click.Option:
    """`--version`, read from the installed distribution."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            from importlib.metadata import PackageNotFoundError, version

            try:
                click.echo(f"comboio {version('comboio')}")
            except PackageNotFoundError:
                click.echo("comboio, from a source folder that is not installed")
            ctx.exit()

    return click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version and exit.",
    )


def load_settings(ctx: click.Context, name: str) -> None:
    """Put environment and comboio.toml behind the options of subcommand `name`."""
    file = read_settings_file(settings_file(os.environ))
    command = _command_of(ctx, name)
    own = _settings_of(ctx, command)
    known = set(own)
    if file.tables.get("manager"):  # its keys may belong to any subcommand
        known = known.union(*(_settings_of(ctx, _command_of(ctx, other)) for other in COMMANDS))
    found = find_settings("manager", known, file=file, environ=os.environ)
    settings = {key: setting for key, setting in found.items() if key in own}
    ctx.default_map = {name: _defaults(ctx, command, settings)}
    ctx.meta["origins"] = {key: setting.origin for key, setting in settings.items()}


def _command_of(ctx: click.Context, name: str) -> click.Command:
    assert isinstance(ctx.command, click.Group)
    command = ctx.command.get_command(ctx, name)
    assert command is not None
    return command


def _subcommands(ctx: click.Context, command: click.Command) -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {}
    found = {name: command.get_command(ctx, name) for name in command.list_commands(ctx)}
    return {name: it for name, it in found.items() if it is not None}


def _settings_of(ctx: click.Context, command: click.Command) -> dict[str, click.Option]:
    """The options of a command, and of all commands below it, that a setting may stand for."""
    found = {
        it.name: it
        for it in command.params
        if isinstance(it, click.Option) and it.name and it.expose_value and not _is_elsewhere(it)
    }
    for subcommand in _subcommands(ctx, command).values():
        found |= _settings_of(ctx, subcommand)
    return found


def _is_elsewhere(option: click.Option) -> bool:
    """Whether its settings are read by the command itself, from a table of their own."""
    return bool(getattr(option, "settings_table", None))


def _defaults(
    ctx: click.Context, command: click.Command, settings: Mapping[str, Setting]
) -> dict[str, Any]:
    """A default map of a command, nested as its subcommands are."""
    nested = {
        name: _defaults(ctx, subcommand, settings)
        for name, subcommand in _subcommands(ctx, command).items()
    }
    options = {it.name: it for it in command.params if isinstance(it, click.Option)}
    own = {
        key: _value(options[key], setting.value)
        for key, setting in settings.items()
        if key in options and not _is_elsewhere(options[key])
    }
    return {**nested, **own}


def _value(option: click.Option, value: object) -> object:
    """A text for an option that may be repeated is one value, not its characters."""
    return (value,) if option.multiple and isinstance(value, str) else value


def _enter(ctx: click.Context) -> None:
    if ctx.invoked_subcommand in COMMANDS:
        load_settings(ctx, ctx.invoked_subcommand)


CONTEXT_SETTINGS: Final[dict[str, Any]] = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}

manager = LazyGroup(
    name="manager",
    commands=COMMANDS,
    callback=click.pass_context(_enter),
    params=[debug_option(), version_option()],
    context_settings=CONTEXT_SETTINGS,
    help="Run a language model over the workers that hold its layers.",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: run, say what went wrong in one line, leave with its exit code."""
    if arguments is None and os.environ.get(COMPLETION_VARIABLE):
        _complete(os.environ[COMPLETION_VARIABLE])
    ctx_meta: dict[str, Any] = {}
    quick_start()
    try:
        with manager.make_context(
            "manager", list(sys.argv[1:] if arguments is None else arguments)
        ) as ctx:
            ctx_meta = ctx.meta
            manager.invoke(ctx)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as exc:  # the one place where errors become words
        _leave(exc, debug=bool(ctx_meta.get("debug")), origins=ctx_meta.get("origins", {}))
    sys.exit(EXIT_DONE)


def _complete(instruction: str) -> NoReturn:
    """What a shell asks when Tab is pressed, and the script that makes it ask."""
    from click.shell_completion import shell_complete

    sys.exit(shell_complete(manager, {}, "manager", COMPLETION_VARIABLE, instruction))


def _leave(exc: BaseException, *, debug: bool, origins: dict[str, str]) -> NoReturn:
    if isinstance(exc, click.exceptions.Exit):
        sys.exit(exc.exit_code)
    if isinstance(exc, BrokenPipeError):
        _forget_stdout()
        sys.exit(EXIT_FAILED)
    if debug:
        import traceback

        traceback.print_exception(type(exc), exc, exc.__traceback__)
    if isinstance(exc, click.exceptions.NoArgsIsHelpError):
        click.echo(exc.format_message(), err=True)
        sys.exit(exc.exit_code)
    if isinstance(exc, click.ClickException):
        say(_click_message(exc, origins))
        sys.exit(exc.exit_code)
    if isinstance(exc, Error):
        say(str(exc))
        sys.exit(exc.exit_code)
    if isinstance(exc, Interrupted):
        from manager.event_loop import leave

        say(str(exc))
        leave(exc.exit_code)
    if isinstance(exc, (KeyboardInterrupt, click.Abort)):
        say("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    say(f"{type(exc).__name__}: {exc} (a fault in Comboio; --debug shows where)")
    sys.exit(EXIT_FAILED)


def say(sentence: str) -> None:
    """One line on stderr, whatever the text was broken into."""
    try:
        click.echo("manager: " + " ".join(sentence.split()), err=True)
    except OSError:
        pass  # nobody reads stderr; the exit code still tells


def _click_message(exc: click.ClickException, origins: dict[str, str]) -> str:
    message = exc.format_message()
    if isinstance(exc, click.BadParameter) and exc.param is not None and exc.ctx is not None:
        name = exc.param.name or ""
        source = exc.ctx.get_parameter_source(name)
        # click notes the source before it converts the value, in some releases only after.
        if source in (None, ParameterSource.DEFAULT_MAP) and name in origins:
            message = f"{message.rstrip('.')} (from {origins[name]})."
    return message


def _forget_stdout() -> None:
    """Whoever read stdout is gone: keep the interpreter's last flush from complaining."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    main()
