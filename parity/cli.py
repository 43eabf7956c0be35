"""The command line of check-parity: parse, call, print."""

import json
import sys
import tempfile
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="[SRC]", required=False, type=click.Path(path_type=Path))
@click.argument("checkpoint", metavar="[DST]", required=False, type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Also compare every component of every layer, each fed the reference's input.")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Length of the random prompt. [default: 2.5 windows]")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    metavar="F",
    help="Prompts: a JSON list of token ids, or of such lists; or text, where SRC has a tokenizer.json.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 adds the precision arm: the error in bfloat16 over PyTorch's own. Semantics are always float32.",
)
@click.option("--decode", is_flag=True, help="Also decode the prompt a token at a time on the key-value cache.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random prompt.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), metavar="F", help="Write a report to F.")
def main(source: Path | None, checkpoint: Path | None, json_file: Path | None, prompt_file: Path | None, **options):
    """Prove that DST, an Orbax checkpoint made by convert-oss, is the model in SRC.

    SRC is the safetensors directory DST was made from. The reference is PyTorch: transformers reads SRC, decodes it
    and computes it, in float32. Every weight is compared bit by bit, and the whole model's logits; with --layers,
    every component of every layer.

    With DST alone, SRC is where DST says it came from. With neither, a small checkpoint is made, converted and
    compared: the whole tool, on any machine.

    \b
    Examples:
      check-parity --layers
      check-parity gpt-oss-20b/ gpt-oss-20b-orbax/ --layers --json report.json

    \b
    Exit status: 0 pass, 1 diverged, 2 bad input, 3 incomplete, 130 interrupted.
    """
    from oss_model.errors import InputError
    from oss_model.shards import Checkpoint

    try:
        with tempfile.TemporaryDirectory() as scratch:
            source, checkpoint = _pair(source, checkpoint, Path(scratch))
            Checkpoint(source).shards.close()  # only to name what is wrong with it; the reference reads it by itself
            code = _compare(source, checkpoint, json_file, prompt_file, options)
    except InputError as e:
        for fault in e.faults:
            click.echo(f"error: {fault}", err=True)
        code = 2
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code)


def _pair(source: Path | None, checkpoint: Path | None, scratch: Path) -> tuple[Path, Path]:
    """Both directories: as given, or from DST's manifest, or made small and fresh."""
    from oss_model.errors import InputError

    if source is not None and checkpoint is not None:
        return source, checkpoint
    if source is not None:
        manifest = source / "conversion.json"
        try:
            return Path(json.loads(manifest.read_text(encoding="utf-8"))["source"]["path"]), source
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{manifest}: expected a manifest of convert-oss, found none ({e}); give SRC and DST") from None
    from converter import convert
    from oss_model.config import ModelConfig
    from oss_model.synthetic import write_checkpoint

    click.echo("no SRC and DST: making a small MXFP4 checkpoint and converting it", err=True)
    source = write_checkpoint(scratch / "source", ModelConfig.tiny())
    convert(source, scratch / "checkpoint")
    return source, scratch / "checkpoint"


def _compare(source: Path, checkpoint: Path, json_file: Path | None, prompt_file: Path | None, options: dict) -> int:
    from oss_model.errors import InputError

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(f"{json_file}: expected a file in an existing directory; make {json_file.parent} first")
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as e:
        raise InputError(f"check-parity needs PyTorch and transformers ({e}); pip install 'convert-oss[parity]'") from None
    transformers.logging.set_verbosity_error()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from oss_model.config import ModelConfig
    from parity.comparison import compare
    from parity.prompts import read_prompt

    if prompt_file is not None:
        vocab = ModelConfig.from_json(source / "config.json").vocab_size
        options["prompt"] = read_prompt(prompt_file, vocab, source / "tokenizer.json")
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        report = compare(source, checkpoint, progress=progress, **options)
    click.echo(report.table())
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")
        click.echo(f"report {json_file}", err=True)
    return report.exit_code
