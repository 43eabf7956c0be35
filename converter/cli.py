"""The command line: parse, call, print. Everything heavy is imported where it is used, so that --help is quick."""

import json
import sys

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "mxfp4"]),
    default="bfloat16",
    show_default=True,
    help="How parameters are stored. mxfp4: the experts packed as they came, the rest bfloat16.",
)
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint at DST, once the new one is whole.")
@click.option("--no-verify", is_flag=True, help="Do not read back what was written.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Say more about what was done.")
def _convert_oss(src, dst, dtype, overwrite, no_verify, as_json, quiet, verbose) -> int:
    """Convert the gpt-oss checkpoint SRC to an Orbax checkpoint at DST.

    SRC is a directory of safetensors: Hugging Face MXFP4, Hugging Face bfloat16 or OpenAI original, recognised by
    content. DST is a new or empty directory; nothing appears there before all of it is whole.

    Example:

        convert-oss gpt-oss-20b gpt-oss-20b-orbax
    """
    from converter.errors import Different
    from oss_model.errors import InputError

    def failed(code: int, faults: list[str]) -> int:
        for fault in faults:
            click.echo(f"error: {fault}", err=True)
        if as_json:
            click.echo(json.dumps({"status": "failed", "exit_code": code, "errors": faults}))
        return code

    try:
        import dataclasses

        from converter.conversion import convert
        from converter.progress import progress_bar

        with progress_bar(quiet) as progress:
            result = convert(src, dst, dtype, overwrite=overwrite, verify=not no_verify, progress=progress)
    except InputError as e:
        return failed(2, e.faults)
    except Different as e:
        return failed(1, e.differences)
    except KeyboardInterrupt:
        return failed(130, [f"interrupted; nothing is at {dst}"])
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    elif not quiet:
        checked = ", verified" if result.verified else ""
        click.echo(f"{result.destination}: {result.tensors} tensors, {result.bytes_written:,} bytes{checked}", err=True)
        if verbose:
            rate = result.bytes_written / result.seconds / 1e9
            click.echo(
                f"{result.source_layout} -> {result.dtype}: {result.chunks} chunks in {result.seconds:.1f} s, {rate:.2f} GB/s, "
                f"{result.bytes_read:,} bytes read, peak memory {result.peak_rss_bytes >> 20} MiB",
                err=True,
            )
    return 0


def main(argv: list[str] | None = None) -> int:
    return _run(_convert_oss, "convert-oss", argv)


def _run(command: click.Command, name: str, argv: list[str] | None) -> int:
    """Exit code 2 with `error: ` lines for wrong usage too, as for wrong input."""
    try:
        return command.main(argv, prog_name=name, standalone_mode=False) or 0
    except click.UsageError as e:
        click.echo(f"error: {e.format_message()} (try {name} --help)", err=True)
        return 2
    except click.Abort:
        return 130


if __name__ == "__main__":
    sys.exit(main())
