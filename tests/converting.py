"""What the tests of conversions share that is no fixture: what a directory holds, without times and hashes of the moment."""

import json
from pathlib import Path

TIME_STAMPED = {"_CHECKPOINT_METADATA", "conversion.json"}


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
    manifest = json.loads(found["conversion.json"])
    found["hashes"] = json.dumps([manifest["tensors"], manifest["files"].keys() - TIME_STAMPED], default=sorted).encode()
    return {name: data for name, data in found.items() if name not in TIME_STAMPED}


def tree(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
