"""A finished checkpoint as a repository of the Hugging Face hub, with a model card that says what it is and was made from."""

import json
from pathlib import Path
from typing import Any

from converter.errors import Incomplete
from converter.manifest import known_files, read_manifest
from converter.store import MANIFEST
from oss_model import hub
from oss_model.errors import InputError, raise_all

CARD = "README.md"
_LIBRARY = {"orbax": "orbax", "openai": "gpt-oss"}  # of the others, transformers
_TITLE = {
    "orbax": "An Orbax checkpoint for JAX and Flax NNX",
    "hf": "MXFP4 safetensors, as transformers and vLLM load them",
    "hf-bf16": "bfloat16 safetensors, as transformers and vLLM load them",
    "openai": "MXFP4 safetensors in OpenAI's layout",
}


def prepare(repository: str, proof: Path | None) -> None:
    """Before anything is converted: make the repository, private, unless it is there.

    Args:
      proof: see `push`.

    Raises:
      InputError: if there is no proof, if the hub cannot be reached, or lets nobody write there.
    """
    faults = []
    if not hub.ID.fullmatch(repository):
        faults.append(f"--push: expected a repository, OWNER/NAME, found {repository!r}")
    if proof is not None and not proof.is_file():
        faults.append(f"--card {proof}: expected the card that check-parity --card wrote, found no file")
    raise_all(faults)
    hub.need(repository)
    from huggingface_hub import HfApi, errors

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
    except Exception as error:
        if not hub.is_hubs(error) and not isinstance(error, errors.HFValidationError | errors.OfflineModeIsEnabled):
            raise
        raise InputError(
            f"--push {repository}: expected a repository that may be written, found that it cannot be ({hub.reason(error)});"
            " `hf auth login` with a token that may write"
        ) from None


def push(directory: Path, repository: str, proof: Path | None = None) -> str:
    """Upload a finished checkpoint in one commit; what is there already is not sent again. Its address.

    Args:
      proof: a verification card (`check-parity --card`), for the end of the model card.

    Raises:
      InputError: if the proof is of another checkpoint.
      Incomplete: if the upload breaks off.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    manifest = read_manifest(directory)
    assert manifest is not None
    proven = None if proof is None else proof.read_text(encoding="utf-8")
    if proven is not None and manifest["self"] not in proven:
        raise InputError(
            f"--card {proof}: expected a card of {directory}, which has {manifest['self']} in it, found one of something else;"
            f" check-parity ... {directory} --card {proof} writes it"
        )
    text = card(repository, manifest, proven)
    files: dict[str, Any] = {name: directory / name for name in sorted(known_files(manifest))}
    files[CARD] = text.encode()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    api = HfApi()
    try:
        with hub.quietly():
            api.create_commit(repository, operations, commit_message="convert-oss")  # tries each file several times
    except Exception as wrapped:
        error = hub.cause(wrapped)
        if not hub.is_hubs(error):
            raise
        raise Incomplete(
            f"--push {repository}: the upload broke off ({hub.reason(error)}); {directory} is whole: run the same command again"
        ) from None
    return f"{api.endpoint}/{repository}"


def card(repository: str, manifest: dict[str, Any], proof: str | None = None) -> str:
    """The model card: Markdown, after metadata in YAML."""
    form, source = manifest.get("form") or {}, manifest["source"]
    to, made_from = form.get("to", "orbax"), source.get("hub")
    about = {"library_name": _LIBRARY.get(to, "transformers"), "tags": ["gpt-oss", "convert-oss", manifest["dtype"]]}
    said = f"a checkpoint in the layout `{source['layout']}`"
    if made_from:
        about["base_model"] = made_from["repository"]
        said = f"`{made_from['repository']}` at `{made_from['commit']}`"
    by, when = manifest["versions"]["convert-oss"], manifest["created"][:10]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in about.items()),  # JSON is YAML
        "---",
        "",
        f"# {repository.partition('/')[2]}",
        "",
        f"{_TITLE[to]}: made by convert-oss {by} on {when} from {said}.",
    ]
    if form.get("quantizer"):
        lost = f"{manifest.get('relative_rmse', 0.0):.4f} of their values is lost (RMSE)"
        lines += ["", f"Experts were quantized to MXFP4 by the rule `{form['quantizer']}`: {lost}."]
    if form.get("merge"):
        lines += ["", "LoRA updates were merged into it."]
    lines += ["", f"`{MANIFEST}` has a hash of every tensor: `verify-oss DIRECTORY` compares them all.", ""]
    return "\n".join([*lines, proof] if proof else lines)
