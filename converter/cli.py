"""The command lines: parse, call, print. Everything heavy is imported where it is used, so that --help is quick."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
from click_option_group import optgroup

from oss_model import hub
from oss_model.buckets import GsPath, path_of
from oss_model.errors import InputError, file_faults, local_path, place_faults, raise_all
from oss_model.exits import ending, run_click
from oss_model.terminal import shown


class Share(click.ParamType):
    name = "i/n"

    def convert(self, value, param, ctx):
        found = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"expected I/N with I from 1 to N, like 2/3, found {value!r}", param, ctx)
        return int(found[1]), int(found[2])


def _version(command: Callable) -> Callable:
    return click.version_option(package_name="convert-oss", message="%(prog)s %(version)s")(command)


def _hub_options(command: Callable) -> Callable:
    """Of a command whose SRC may be a repository (`oss_model.hub`)."""
    for option in (
        optgroup.option("--subfolder", metavar="DIR", help="A directory in the repository, such as original."),
        optgroup.option("--revision", metavar="REV", help="A branch, tag or commit. [default: main]"),
        optgroup.group("For a repository of the Hugging Face hub"),
    ):
        command = option(command)
    return command


def _shared_options(command: Callable) -> Callable:
    for option in (
        _version,
        optgroup.option("-v", "--verbose", is_flag=True, help="Print more about what was done."),
        optgroup.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary."),
        optgroup.option("--json-file", metavar="F", type=click.Path(), help="Write that object to F; - is stdout."),
        optgroup.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout at the end."),
        optgroup.group("Output"),
    ):
        command = option(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("src", type=click.Path())
@click.argument("destination", metavar="DST", type=click.Path())
@optgroup.group("What is written")
@optgroup.option(
    "--to",
    type=click.Choice(["orbax", "hf", "hf-bf16", "openai", "orbax-lora", "peft"]),
    default="orbax",
    show_default=True,
    help="Format to write: Orbax; safetensors as Hugging Face's MXFP4, its bfloat16 or OpenAI's; LoRA updates, ours or PEFT's.",
)
@optgroup.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "mxfp4"]),
    help="How parameters are stored; in Orbax bfloat16 by default. mxfp4 stores packed experts, and the rest as bfloat16.",
)
@optgroup.option(
    "--quantizer",
    type=click.Choice(["best", "ocp", "ceil"]),
    help="How experts' values become MXFP4, which loses something and is never done without this. best has the smallest error.",
)
@optgroup.option(
    "--like", metavar="SRC", type=click.Path(), help="A packed checkpoint; values that are the same there keep its bytes."
)
@optgroup.option("--merge", metavar="LORA", type=click.Path(), help="LoRA updates to add, ours or PEFT's.")
@optgroup.option(
    "--base", metavar="DIR", type=click.Path(), help="The model that the LoRA updates belong to (--to orbax-lora, peft)."
)
@optgroup.option("--tokenizer", metavar="DIR", type=click.Path(), help="Take the tokenizer and the template from DIR.")
@optgroup.option(
    "--ignore-config-key", metavar="NAME", multiple=True, help="A key of config.json to leave out; may be repeated."
)
@optgroup.option(
    "--push", metavar="REPO", help="Also upload it to the hub's OWNER/NAME, which is made, private, if it does not exist."
)
@optgroup.option(
    "--card", metavar="F", type=click.Path(), help="The card that check-parity wrote, for the model card of --push."
)
@optgroup.group("How it is written")
@optgroup.option("--dry-run", is_flag=True, help="Print what it takes, and then what becomes of each tensor; write nothing.")
@optgroup.option("--overwrite", is_flag=True, help="Replace a finished checkpoint at DST, once the new one is whole.")
@optgroup.option("--no-verify", is_flag=True, help="Do not read back what was written.")
@optgroup.option("--process", type=Share(), default="1/1", metavar="I/N", help="Write share I of N; the last process finishes.")
@optgroup.option("--max-memory", metavar="SIZE", help="The most resident memory to use, all in, like 900M or 2G.")
@_hub_options
@_shared_options
def _convert_oss(
    src,
    destination,
    dry_run,
    overwrite,
    no_verify,
    process,
    max_memory,
    revision,
    subfolder,
    as_json,
    json_file,
    quiet,
    verbose,
    **form,
) -> int:
    """Convert the gpt-oss checkpoint SRC to an Orbax checkpoint at DST, or back.

    SRC is a directory of safetensors (Hugging Face MXFP4, Hugging Face bfloat16 or OpenAI original) or an Orbax checkpoint,
    ours or one that training saved; its form is recognised by content. SRC may also be a repository of the Hugging Face hub,
    OWNER/NAME, which is downloaded to the hub's cache.

    DST is a new or empty directory. The result is written beside it, in DST.partial, and takes its place once all of it is
    whole. Where DST is a mount point, or the directory above it cannot be written, the result is written inside DST, in
    convert-oss.partial, and moved up once it is whole, with the files that complete it last. Run the same command again to
    continue an interrupted conversion. If it is complete, and the source has not changed, the command says so and does nothing.

    \b
    Examples:
        convert-oss openai/gpt-oss-20b gpt-oss-20b-orbax
        convert-oss gpt-oss-20b-packed served --to hf
        convert-oss run/model served --to hf --quantizer best

    \b
    Exit status:
        0 done, 1 wrong when read back, 2 bad input,
        3 incomplete, 70 a bug, 130 interrupted
    """

    output = _Json(as_json, json_file)

    def run() -> int:
        from converter.form import make_form
        from oss_model.memory import parse_size

        repository, proof = form.pop("push"), None if form["card"] is None else Path(form["card"])
        form.pop("card")
        if proof is not None and repository is None:
            raise InputError("--card: expected --push, for whose model card it is, found none")

        def source() -> Path:
            """SRC; a repository is not downloaded before the rest is known to be right."""
            form.update({name: hub.local(form[name]) for name in ("like", "merge", "base", "tokenizer") if form.get(name)})
            return hub.local(src, revision, subfolder, download=not dry_run)

        if form["to"] in ADAPTERS or form["base"]:
            unusable = dry_run or overwrite or process != (1, 1) or max_memory or repository
            return _convert_adapter(source, destination, form, unusable, output, quiet)
        form.pop("base")
        dst = _usable(src, destination, form["to"], overwrite)
        memory = None if max_memory is None else parse_size(max_memory, "--max-memory")
        make_form(**{name: value for name, value in form.items() if name != "tokenizer"})
        if repository is not None and not dry_run:
            from converter import publishing

            publishing.prepare(repository, proof)
        found_at = source()
        if dry_run:
            from converter.preview import describe, preview

            found = preview(found_at, dst, **form, overwrite=overwrite, max_memory=memory)
            if not output.give(dataclasses.asdict(found)):
                click.echo(shown(describe(found), sys.stdout))
            return 0
        from converter.conversion import convert
        from converter.destinations import destination_of
        from converter.progress import progress_bar

        options = {"overwrite": overwrite, "verify": not no_verify, "max_memory": memory, "process": process}
        try:
            with progress_bar(quiet) as progress:
                result = convert(found_at, dst, **form, progress=progress, **options)
        except KeyboardInterrupt:
            kept = destination_of(dst).kept_in()
            where = f" in {kept}" if kept else ""
            raise KeyboardInterrupt(f"what is written is kept{where}: run the same command again to go on") from None
        address = None
        if repository is not None and result.status != "share-written":
            address = publishing.push(dst, repository, proof)
        if not output.give(dataclasses.asdict(result) | ({"pushed": address} if address else {})) and not quiet:
            _say(result, verbose)
            if address:
                click.echo(f"pushed to {address}", err=True)
        return 0

    return output.guard(run, destination)


ADAPTERS = ("orbax-lora", "peft")


def _convert_adapter(
    source: Callable[[], Path], destination: str, form: dict, unusable: object, output: "_Json", quiet: bool
) -> int:
    from converter.adapters import convert_adapter

    to = form["to"]
    if to not in ADAPTERS:
        raise InputError(f"--base: expected --to {' or '.join(ADAPTERS)}, found {to}")
    if unusable or any(value for name, value in form.items() if name not in ("to", "base")):
        raise InputError(f"--to {to}: expected no option but --base, --json and -q, found others; updates are written whole")
    dst = local_path(destination)
    raise_all(place_faults(dst))
    src = source()
    names = convert_adapter(src, dst, to, form["base"])
    found = {"status": "complete", "source": str(src), "destination": destination, "to": to, "modules": names}
    if not output.give(found) and not quiet:
        click.echo(f"{destination}: updates of {len(names)} linear maps", err=True)
    return 0


def _usable(src: str, destination: str, to: str, overwrite: bool) -> Path:
    """DST, by a name of its own (`.` has none). A place that cannot be used is found here, with all that is wrong with SRC."""
    from converter.source import open_checkpoint

    dst = path_of(destination)
    if isinstance(dst, GsPath):
        from converter.destinations import refuse

        refuse(dst, to, overwrite)
        return dst
    if dst.name in ("", ".."):
        dst = Path(os.path.realpath(dst))
    root = f"{dst}: expected a new or empty directory, found the root of the file system; give another name"
    faults = place_faults(dst) if dst.name else [root]
    if os.path.isfile(dst / "config.json") and not hub.is_id(src) and not path_of(src).exists():
        raise InputError(f"{src}: expected a checkpoint, found nothing, and there is one at {dst}: SRC comes first, then DST")
    if faults and not hub.is_id(src):
        try:
            open_checkpoint(src).close()
        except (InputError, OSError) as error:
            faults = [*ending(error)[1], *faults]
    raise_all(faults)
    return dst


def _say(result, verbose: bool) -> None:
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    if result.status == "share-written":
        click.echo(f"{result.destination}: this process's share is written, the last process finishes", err=True)
    else:
        checked = ", verified" if result.verified else ""
        click.echo(f"{result.destination}: {result.status.replace('-', ' ')}, {result.tensors} tensors{checked}", err=True)
    if result.quantization:
        lost = f"{result.quantization['relative_rmse']:.4f} of the values (RMSE)"
        click.echo(f"experts quantized to MXFP4 by {result.quantization['rule']}: lost {lost}", err=True)
        for name, error in result.quantization["tensors"].items() if verbose else ():
            click.echo(f"    {name}: {error:.4f}", err=True)
    if verbose:
        form = result.dtype if result.to == "orbax" else result.to
        click.echo(
            f"{result.source_layout} -> {form}: {result.chunks} chunks, {result.bytes_read:,} bytes read, "
            f"{result.bytes_written:,} written, {result.seconds:.1f} s, peak memory {result.peak_rss_bytes >> 20} MiB",
            err=True,
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dst", type=click.Path())
@click.argument("src", type=click.Path(), required=False)
@_hub_options
@_shared_options
def _verify_oss(dst, src, revision, subfolder, as_json, json_file, quiet, verbose) -> int:
    """Check every byte of the converted checkpoint DST against the hashes it carries.

    If SRC is given, it is decoded anew and compared as well. One line is printed for each difference.

    \b
    Example:
        verify-oss gpt-oss-20b-orbax

    \b
    Exit status:
        0 as it was written, 1 a difference, 2 bad input,
        3 incomplete, 70 a bug, 130 interrupted
    """

    output = _Json(as_json, json_file)

    def run() -> int:
        from converter.audit import verify_checkpoint
        from converter.progress import progress_bar

        with progress_bar(quiet) as progress:
            source = None if src is None else hub.local(src, revision, subfolder)
            found = verify_checkpoint(path_of(dst), source, progress=progress)
        for line in found.differences:
            click.echo(f"error: {line}", err=True)
        if not output.give(dataclasses.asdict(found)) and not quiet and not found.differences:
            rate = f", {found.bytes_checked / found.seconds / 1e9:.2f} GB/s" if verbose else ""
            click.echo(
                f"{found.checkpoint}: {found.tensors} tensors, {found.bytes_checked:,} bytes as they were{rate}", err=True
            )
        return 1 if found.differences else 0

    return output.guard(run)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", type=click.Path())
@_hub_options
@optgroup.group("Output")
@optgroup.option(
    "--json", "json_file", metavar="F", type=click.File("w", lazy=True), help="Write one JSON object to F; - is stdout."
)
@_version
def _inspect_oss(path, revision, subfolder, json_file) -> int:
    """Say what PATH is, and what can be done with it.

    PATH is a directory of safetensors in any layout that is read here, an Orbax checkpoint, ours or one that training saved,
    or LoRA updates, ours or PEFT's; or a repository of the Hugging Face hub, which is downloaded to the hub's cache.

    \b
    Example:
        inspect-oss gpt-oss-20b

    \b
    Exit status:
        0 it is known, 2 bad input, 70 a bug,
        130 interrupted
    """
    from converter.inspection import describe, inspect
    from oss_model.memory import size

    raise_all([] if json_file is None else file_faults(json_file.name))
    found = inspect(hub.local(path, revision, subfolder))
    if json_file is not None:
        json_file.write(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    if json_file is None or json_file.name != "-":
        facts, commands = describe(found, size).split("\n\n")  # of which a line is copied
        click.echo(f"{shown(facts, sys.stdout)}\n\n{commands}")
    return 0


class _Json(NamedTuple):
    """Where one JSON object goes at the end, if it was asked for: standard output, a file, or both."""

    printed: bool
    file: str | None

    def give(self, found: dict) -> bool:
        """Write it; whether standard output has it, and nothing else is to be said there."""
        text = json.dumps(found)
        if self.file not in (None, "-"):
            Path(self.file).write_text(text + "\n", encoding="utf-8")
        if self.printed or self.file == "-":
            click.echo(text)
        return self.printed or self.file == "-"

    def guard(self, run: Callable[[], int], destination: str | None = None) -> int:
        """Run; where that fails, say so in JSON too. The file is to be another than what is written at `destination`."""
        raise_all([] if self.file is None else file_faults(self.file))
        if self.file is not None and destination is not None and os.path.realpath(self.file) == os.path.realpath(destination):
            raise InputError(f"--json-file: expected another place than DST, found {self.file}")
        try:
            return run()
        except (Exception, KeyboardInterrupt) as error:
            code, lines = ending(error)
            self.give({"status": "failed", "exit_code": code, "errors": lines})
            raise


def main(argv: list[str] | None = None) -> int:
    return run_click(_convert_oss, "convert-oss", argv)


def verify_main(argv: list[str] | None = None) -> int:
    return run_click(_verify_oss, "verify-oss", argv)


def inspect_main(argv: list[str] | None = None) -> int:
    return run_click(_inspect_oss, "inspect-oss", argv)


if __name__ == "__main__":
    sys.exit(main())
