"""The command line of check-parity: parse, call, print."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource
from click_option_group import optgroup

from oss_model import hub
from oss_model.buckets import path_of
from oss_model.errors import Incomplete, InputError, file_faults, nothing_at, place_faults, raise_all, system_error
from oss_model.exits import run_click
from oss_model.terminal import columns, shown

if TYPE_CHECKING:
    from parity.recording import Recording
    from parity.reports.report import Report

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_REPORT = click.Path(path_type=Path, dir_okay=False, exists=True)


class _Command(click.Command):
    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run, and exit with the code that this ends with."""
        sys.exit(run_click(self, "check-parity", args))


@click.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="[SRC]", required=False, type=click.Path(path_type=Path))
@click.argument("checkpoint", metavar="[DST]", required=False, type=click.Path(path_type=Path))
@optgroup.group("What is compared")
@optgroup.option("--layers", is_flag=True, help="Also compare every component of every layer, each fed the reference's input.")
@optgroup.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 adds the precision arm to --layers: the bfloat16 error over PyTorch's own. Semantics are always in float32.",
)
@optgroup.option("--decode", is_flag=True, help="Also decode the prompt one token at a time on the key-value cache.")
@optgroup.option("--gradients", is_flag=True, help="Also compare every parameter's gradient; the model must fit in memory.")
@optgroup.option(
    "--forms",
    type=click.Choice(["default", "all", "none"]),
    help="Which ways to run the whole model are compared: jit, meshes, caches, generate, ... [default: default with --layers]",
)
@optgroup.option("--long", is_flag=True, help="Also run a row of 4,096 tokens through a small replica of the model.")
@optgroup.option(
    "--expect-changed",
    multiple=True,
    metavar="REGEX",
    help="Parameters that were trained, by whole name. They are listed, not failed; all others must be exact. May be repeated.",
)
@optgroup.option(
    "--read-with-orbax", is_flag=True, help="Read all of DST with plain Orbax, not only one chunk of each parameter."
)
@optgroup.option(
    "--self-test",
    is_flag=True,
    help="Test the tool itself: put every known mistake into a right port, one at a time. Takes an hour of CPU time, shared "
    "among the cores.",
)
@optgroup.group("The prompt")
@optgroup.option(
    "--tokens", type=click.IntRange(min=1), metavar="N", help="Length of the random prompt. [default: 2.5 windows]"
)
@optgroup.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    metavar="F",
    help="Read prompts from F: a JSON list of token ids, or of such lists; or text, if SRC has a tokenizer.json.",
)
@optgroup.option(
    "--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Seed of the random prompt."
)
@optgroup.group("With what, and where")
@optgroup.option("--record", type=_DIRECTORY, metavar="F", help="Write what the reference says to F, a new directory.")
@optgroup.option(
    "--golden", type=_DIRECTORY, metavar="F", help="Compare DST with a recording by --record; needs no SRC and no PyTorch."
)
@optgroup.option(
    "--device",
    type=click.Choice(["cpu", "gpu", "tpu"]),
    help="Where to compute DST; SRC stays on the CPU. [default: where JAX computes]",
)
@optgroup.option(
    "--max-memory", metavar="SIZE", help="Refuse, before the long part, a run that takes more resident memory than this."
)
@optgroup.group("For a repository of the Hugging Face hub")
@optgroup.option("--revision", metavar="REV", help="A branch, tag or commit. [default: main]")
@optgroup.option("--subfolder", metavar="DIR", help="A directory in the repository, such as original.")
@optgroup.group("Reports; - is standard output")
@optgroup.option("--json", type=_FILE, metavar="F", help="Write all that was measured to F.")
@optgroup.option("--junit", type=_FILE, metavar="F", help="Write JUnit XML to F, with one test case for each tap.")
@optgroup.option("--card", type=_FILE, metavar="F", help="Write a verification card to F, in Markdown, for a hub repository.")
@optgroup.option("--html", type=_FILE, metavar="F", help="Write a page to F that a browser opens from disk.")
@click.version_option(package_name="convert-oss", message="%(prog)s %(version)s")
@click.pass_context
def main(
    context: click.Context,
    source: Path | None,
    checkpoint: Path | None,
    prompt_file: Path | None,
    golden: Path | None,
    self_test: bool,
    revision: str | None,
    subfolder: str | None,
    **options,
) -> int:
    """Prove that DST, an Orbax checkpoint made by convert-oss, is the model in SRC.

    SRC is the directory of safetensors that DST was made from, or a repository of the Hugging Face hub, OWNER/NAME. DST may
    be safetensors too, which our model then reads; of two Orbax checkpoints only the bytes are compared. The reference is
    PyTorch: transformers reads SRC, decodes it and computes it, in float32. Every weight is compared bit by bit, and so are
    the whole model's logits; with --layers, every component of every layer is compared as well.

    With DST alone, SRC is where DST says it came from. With neither, a small checkpoint is made, converted and
    compared, which runs the whole tool on any machine.

    \b
    Examples:
        check-parity --layers
        check-parity gpt-oss-20b gpt-oss-20b-orbax --layers
        check-parity gpt-oss-20b-orbax --html report.html

    \b
    Exit status:
        0 pass, 1 diverged, 2 bad input, 3 incomplete,
        4 self-test failed, 70 a bug, 130 interrupted
    """
    from oss_model.memory import parse_size
    from oss_model.params import is_orbax
    from oss_model.shards import Checkpoint
    from parity.stored import arranged

    options["forms"] = options["forms"] or ("default" if options["layers"] else "none")
    outputs = {form: options.pop(form) for form in ("json", "junit", "html", "card")}
    files = {form: file for form, file in outputs.items() if file is not None}
    faults = [*_two_prompts(context), *_misplaced(files, options["record"])]
    if options["max_memory"] is not None:
        options["max_memory"] = parse_size(options["max_memory"], "--max-memory")
    with tempfile.TemporaryDirectory() as scratch:
        if self_test:
            raise_all([*faults, *_not_for_self_test(context)])
            return _self_test(Path(scratch), files)
        try:
            raise_all(faults if source is not None and hub.is_id(str(source)) else [])  # before it is downloaded
            source = None if source is None else hub.local(source, revision, subfolder)
            checkpoint = None if checkpoint is None else path_of(checkpoint)
            pair = _pair(source, checkpoint, Path(scratch)) if golden is None else _golden(source, checkpoint, golden)
            reference = arranged(pair[0], pair[1])[0] if isinstance(pair[0], Path) else None
            if reference is not None and not is_orbax(reference):  # only to name what is wrong with it
                Checkpoint(reference, _ignored(pair[1])).shards.close()
        except InputError as e:
            raise InputError(*faults, *e.faults) from None
        raise_all(faults)
        report = _compare(*pair, prompt_file, options)
    _print(report.table, files)
    _write(report, files, _typed(context))
    return report.exit_code


def _pair(source: Path | None, checkpoint: Path | None, scratch: Path) -> tuple[Path, Path]:
    """Both directories: as given, or from DST's manifest, or made small and fresh."""
    if source is not None and checkpoint is not None:
        return source, checkpoint
    if source is not None:
        from oss_model.files import parse_json

        manifest = source / "conversion.json"
        if not source.is_dir():
            raise InputError(f"{source}: expected a checkpoint, found {nothing_at(source)}")
        try:
            said = parse_json(manifest.read_text(encoding="utf-8"))["source"]
            there, made_from = path_of(said["path"]), said.get("hub")
            if made_from and not there.is_dir():  # no longer in the cache
                there = hub.local(made_from["repository"], made_from["commit"], made_from.get("subfolder"))
            elif not there.is_dir():
                raise InputError(f"{manifest}: says that it was made from {there}, where there is none now; give SRC and DST")
            return there, source
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{manifest}: expected a manifest of convert-oss, found none ({e}); give SRC and DST") from None
    from converter import convert
    from oss_model.config import ModelConfig
    from oss_model.synthetic import write_checkpoint

    click.echo("no SRC and DST: making a small MXFP4 checkpoint and converting it", err=True)
    source = write_checkpoint(scratch / "source", ModelConfig.tiny())
    convert(source, scratch / "checkpoint")
    return source, scratch / "checkpoint"


def _ignored(checkpoint: Path) -> list[str]:
    """Keys of SRC's config.json that DST was converted without."""
    from oss_model.files import parse_json

    try:
        return list(parse_json((checkpoint / "conversion.json").read_bytes())["form"]["ignored_config_keys"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _golden(source: Path | None, checkpoint: Path | None, golden: Path) -> "tuple[Recording, Path]":
    from parity.recording import Recording

    given = [path for path in (source, checkpoint) if path is not None]
    if len(given) != 1:
        raise InputError(f"--golden {golden}: expected DST alone beside it, found {len(given)} directories")
    return Recording(golden), given[0]


def _not_for_self_test(context: click.Context) -> list[str]:
    given = [p for p in context.command.params if context.get_parameter_source(p.name or "") == ParameterSource.COMMANDLINE]
    spelt = {p.name: p.opts[0] if isinstance(p, click.Option) else p.human_readable_name.strip("[]") for p in given}
    others = [word for name, word in spelt.items() if name not in ("self_test", "json")]
    return [f"--self-test: makes everything by itself, found {word}; leave it out" for word in others]


def _two_prompts(context: click.Context) -> list[str]:
    """--prompt-file is the prompt; what makes a random one contradicts it."""
    given = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    others = given & {"tokens", "seed"} if "prompt_file" in given else set()
    return [
        f"--prompt-file: expected no --{name} beside it, which is for a random prompt; leave one out" for name in sorted(others)
    ]


def _self_test(scratch: Path, files: dict[str, Path]) -> int:
    _need_torch()
    from converter import convert
    from parity.injection.processes import in_processes, processes_here
    from parity.injection.runs import EQUIVALENT_RUNS, RUN_INJECTIONS
    from parity.progress import progress_bar

    names = (*RUN_INJECTIONS, *EQUIVALENT_RUNS)
    with progress_bar() as progress:
        result = in_processes(processes_here(), scratch, convert, running=names, progress=progress)
    _print(lambda width: result.table(), files)
    _write_each({form: (file, lambda: result.to_json() + "\n") for form, file in files.items()})
    return result.exit_code


# As in README.md: left to the dependencies of others, pip takes a torch with several GB of CUDA.
INSTALL = ("pip install torch==2.13.0", "--index-url https://download.pytorch.org/whl/cpu", "pip install '.[parity]'")


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as e:
        torch_first, cpu_only, parity = INSTALL
        raise InputError(
            f"check-parity needs PyTorch and transformers ({e}): `{torch_first}` first, with `{cpu_only}` on a machine "
            f"without a GPU, then, in a clone, `{parity}` (README.md, Install)"
        ) from None
    transformers.logging.set_verbosity_error()


def _compare(source: "Path | Recording", checkpoint: Path, prompt_file: Path | None, options: dict) -> "Report":
    if isinstance(source, Path):
        _need_torch()
    from oss_model.config import ModelConfig
    from parity.comparison import compare
    from parity.device import computing_on
    from parity.progress import progress_bar
    from parity.prompts import read_prompt

    if prompt_file is not None:
        home = source if isinstance(source, Path) else checkpoint
        vocab = ModelConfig.from_json(home / "config.json").vocab_size
        options["prompt"] = read_prompt(prompt_file, vocab, home / "tokenizer.json")
    with computing_on(options.pop("device")), progress_bar() as progress:
        return compare(source, checkpoint, progress=progress, **options)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("before", type=_REPORT)
@click.argument("after", type=_REPORT)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--json-file", metavar="F", type=_FILE, help="Write that object to F; - is stdout.")
@click.version_option(package_name="convert-oss", message="%(prog)s %(version)s")
def _report_diff(before: Path, after: Path, as_json: bool, json_file: Path | None) -> int:
    """Say what changed between two reports of check-parity --json, from before and after a change of a kernel, say.

    It lists verdicts that changed, weights that differ in one alone, and figures that are twice or half of what they were.

    \b
    Example:
        report-diff before.json after.json

    \b
    Exit status:
        0 nothing is worse, 1 something is, 2 bad input,
        70 a bug, 130 interrupted
    """
    from parity.reports import diff

    raise_all([] if json_file is None else file_faults(json_file))
    sides = diff.read(before), diff.read(after)
    found = diff.changes(*sides)
    verdicts = {"before": sides[0]["verdict"], "after": sides[1]["verdict"]}
    text = json.dumps(verdicts | {"changes": [one._asdict() for one in found]})
    if json_file is not None and str(json_file) != "-":
        json_file.write_text(text + "\n", encoding="utf-8")
    if as_json or str(json_file) == "-":
        click.echo(text)
    else:
        _print(lambda width: diff.table(*sides, width))
    return int(any(one.worse for one in found))


def diff_main(argv: Sequence[str] | None = None) -> int:
    return run_click(_report_diff, "report-diff", argv)


# --- reports ----------------------------------------------------------------------------------------------------


def _misplaced(files: dict[str, Path], record: Path | None) -> list[str]:
    """What is wrong with where the reports and the recording are to go, known before the long part."""
    faults = [] if record is None else place_faults(record)
    taken: dict[Path, str] = {}
    for form, file in files.items():
        faults += file_faults(file)
        other = taken.setdefault(file.absolute(), form)
        if other != form:
            faults.append(f"{file}: expected a file for each report, found --{other} and --{form} here")
    return faults


def _typed(context: click.Context) -> str:
    """The command, by what was given to it."""
    words = ["check-parity"]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            value = context.params[name]
            for one in value if parameter.multiple else [value]:
                words += [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
                words += [] if one is True else [str(one)]
    return shlex.join(words)


def _print(table: Callable[[int | None], str], files: dict[str, Path] | None = None) -> None:
    """A table, on standard error where a report goes to standard output."""
    stream = sys.stderr if files and Path("-") in files.values() else sys.stdout
    click.echo(shown(table(columns(stream)), stream), file=stream)


def _write(report: "Report", files: dict[str, Path], command: str) -> None:
    from parity.reports import card, html, junit

    render = {
        "json": lambda: report.to_json() + "\n",
        "junit": lambda: junit.render(report),
        "html": lambda: html.render(report),
        "card": lambda: card.render(report, command),
    }
    _write_each({form: (file, render[form]) for form, file in files.items()})


def _write_each(files: dict[str, tuple[Path, Callable[[], str]]]) -> None:
    faults, kind = [], InputError
    for file, render in files.values():
        try:
            if str(file) == "-":
                click.echo(render(), nl=False)
                continue
            file.write_text(render(), encoding="utf-8")
            click.echo(f"report {file}", err=True)
        except OSError as e:
            kind = Incomplete if isinstance(system_error(e), Incomplete) else kind
            faults.append(f"{file}: could not be written ({e.strerror}); the comparison itself is done, see above")
    if faults:
        raise kind(*faults)
