"""Repositories of the Hugging Face hub in place of directories, against a server that speaks its endpoints."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub

from oss_model import hub as hub_of
from oss_model import hub_answers
from oss_model.errors import Incomplete

REPOSITORY = "openai/gpt-oss-20b"


@pytest.fixture(scope="module")
def repository(small, tmp_path_factory) -> dict[str, Path]:
    """What a repository holds: the directory, and others that are not to be downloaded."""
    from oss_model import ModelConfig
    from oss_model.synthetic import write_checkpoint

    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(small, root / "hf")
    for name, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "{{ messages }}"), ("README.md", "# card")):
        (root / "hf" / name).write_text(text)
    cfg = ModelConfig.from_json(small / "config.json")
    return {"": root / "hf", "original/": write_checkpoint(root / "original", cfg, "openai"), "metal/": root / "original"}


@pytest.fixture
def server(repository):
    found = Hub(repository)
    yield found
    found.close()


@pytest.fixture
def run(server, tmp_path):
    """One of the commands, in a process of its own: huggingface_hub reads its environment once."""

    def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        modules = {"convert-oss": "converter", "inspect-oss": "converter", "check-parity": "parity"}
        main = "inspect_main" if arguments[0] == "inspect-oss" else "main"
        code = "import sys\nfrom oss_model import hub; hub.WAIT_SECONDS = 0.01\n"
        code += f"from {modules[str(arguments[0])]}.cli import {main}; sys.exit({main}(sys.argv[1:]))"
        own = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        called = [sys.executable, "-c", code, *map(str, arguments[1:])]
        return subprocess.run(called, env=kept | own | environment, cwd=tmp_path, capture_output=True, text=True)

    return command


def manifest(directory: Path) -> dict:
    return json.loads((directory / "conversion.json").read_text())


def only_line(result: subprocess.CompletedProcess, code: int) -> str:
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.long
def test_a_repository_is_converted_and_noted(run, server, repository, tmp_path):
    result = run("convert-oss", REPOSITORY, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "openai/gpt-oss-20b: downloading 5 files" in result.stderr
    assert set(server.asked) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    assert manifest(tmp_path / "out")["source"]["hub"] == {"repository": REPOSITORY, "commit": COMMIT}
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    again = run("convert-oss", REPOSITORY, tmp_path / "out")
    assert "already complete" in again.stderr
    assert max(server.asked.values()) == 1  # all of it is in the cache
    server.close()
    offline = run("convert-oss", REPOSITORY, tmp_path / "second", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_another_directory_of_it_and_a_commit(run, server, tmp_path):
    result = run("convert-oss", REPOSITORY, tmp_path / "out", "--subfolder", "original", "--revision", COMMIT)
    assert result.returncode == 0, result.stderr
    assert set(server.asked) == {"original/config.json", "original/model.safetensors"}
    noted = manifest(tmp_path / "out")["source"]
    assert noted["hub"] == {"repository": REPOSITORY, "commit": COMMIT, "subfolder": "original"}
    assert noted["layout"] == "openai"


@pytest.mark.long
def test_parity_takes_the_commit_that_was_converted(run, server, tmp_path):
    """From the cache, and from the hub once more where that was emptied."""
    assert run("convert-oss", REPOSITORY, "out").returncode == 0
    shutil.rmtree(tmp_path / "cache")
    result = run("check-parity", "out")
    assert result.returncode == 0, result.stderr
    assert "20/20" in result.stdout
    assert server.asked["model.safetensors"] == 2
    shutil.rmtree(tmp_path / "cache")
    line = only_line(run("check-parity", "out", HF_HUB_OFFLINE="1"), 2)
    assert line.startswith(f"error: {REPOSITORY} at {COMMIT}: ")  # and not that of a manifest that cannot be read
    assert line.endswith("HF_HUB_OFFLINE is set")
    assert run("check-parity", "out").returncode == 0
    assert "20/20" in run("check-parity", REPOSITORY, "out", "--revision", COMMIT, HF_HUB_OFFLINE="1").stdout


@pytest.mark.long
def test_a_dry_run_downloads_nothing(run, server, tmp_path):
    line = only_line(run("convert-oss", REPOSITORY, tmp_path / "out", "--dry-run"), 2)
    assert "expected its files in the hub's cache for a dry run, found 5 missing" in line
    assert not server.asked
    assert run("inspect-oss", REPOSITORY).returncode == 0
    assert run("convert-oss", REPOSITORY, tmp_path / "out", "--dry-run").returncode == 0


def test_nothing_is_downloaded_for_what_is_refused_anyway(run, server, tmp_path):
    (tmp_path / "file").write_text("")
    for more in (["file/out"], ["out", "--quantizer", "best"]):
        assert run("convert-oss", REPOSITORY, *more).returncode == 2
    assert not server.asked


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_a_download_that_breaks_off_goes_on(run, server, tmp_path, fault):
    setattr(server, fault, 4)
    result = run("convert-oss", REPOSITORY, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert getattr(server, fault) == 0
    assert manifest(tmp_path / "out")["source"]["hub"]["commit"] == COMMIT


@pytest.mark.long
@pytest.mark.parametrize("fault", ["busy", "lies"])
def test_one_that_breaks_off_for_good_is_taken_up_again(run, server, tmp_path, fault):
    if fault == "busy":
        server.busy = 10**6
    else:
        server.lies = {"model.safetensors"}
    line = only_line(run("convert-oss", REPOSITORY, tmp_path / "out"), 3)
    assert "the download broke off 5 times" in line
    assert "run the same command again" in line
    assert not (tmp_path / "out").exists()
    server.busy, server.lies = 0, set()
    assert run("convert-oss", REPOSITORY, tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("asked", "environment", "line"),
    [
        (["nobody/nothing"], {}, "expected a directory or a hub repository, found neither"),
        ([REPOSITORY, "--revision", "v9"], {}, "--revision: expected a branch, tag or commit, found no v9"),
        ([REPOSITORY], {"HF_HUB_OFFLINE": "1"}, "found neither, or not all of it; HF_HUB_OFFLINE is set"),
        ([REPOSITORY], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ([REPOSITORY, "--subfolder", "../x"], {}, "--subfolder: expected a directory in the repository"),
        (["nowhere", "--revision", "main"], {}, "--revision: expected SRC to be a hub repository, OWNER/NAME, found nowhere"),
        (["./no/where"], {}, "expected a directory"),
    ],
)
def test_what_cannot_be_had_is_a_line(run, asked, environment, line):
    assert line in only_line(run("convert-oss", asked[0], "out", *asked[1:], **environment), 2)


def test_a_token_is_used_and_written_nowhere(run, server, tmp_path):
    server.token = "hf_secretsecretsecret"
    assert "hf auth login" in only_line(run("convert-oss", REPOSITORY, "out"), 2)
    result = run("convert-oss", REPOSITORY, "out", "-v", HF_TOKEN=server.token)
    assert result.returncode == 0, result.stderr
    assert server.token not in result.stderr + result.stdout
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or server.token.encode() not in path.read_bytes()


# --- the other way ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_export_is_pushed_with_a_card(run, server, small_out, tmp_path):
    form = ["convert-oss", small_out, "out", "--to", "hf", "--quantizer", "best"]
    assert run(*form).returncode == 0
    (tmp_path / "out/.env").write_text("secret")  # not of the conversion
    (tmp_path / "card.md").write_text("# Verification: PASS\n")
    asked = [*form, "--push", "me/served", "--card", "card.md"]
    assert "found one of something else" in only_line(run(*asked), 2)
    (tmp_path / "card.md").write_text(f"{manifest(tmp_path / 'out')['self']}\n# Verification: PASS\n")
    result = run(*asked, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["pushed"] == f"{server.url}/me/served"
    assert "private" in (server.made["me/served"].get("visibility"), *server.made["me/served"])
    files = {path.name: path for path in (tmp_path / "out").iterdir() if path.name != ".env"}
    assert server.pushed.keys() == files.keys() | {"README.md"}
    assert all(server.pushed[name] == path.read_bytes() for name, path in files.items())
    assert server.stored  # a large file went by itself
    text = server.pushed["README.md"].decode()
    assert text.startswith('---\nlibrary_name: "transformers"\ntags: ["gpt-oss", "convert-oss", "mxfp4"]\n---\n\n# served\n')
    assert "quantized to MXFP4 by the rule `best`" in text
    assert text.endswith("# Verification: PASS\n")
    server.pushed = {}
    again = run(*asked)  # complete already: pushed once more, to what is there
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stderr
    assert "README.md" in server.pushed


def test_where_a_checkpoint_came_from_is_in_its_card(run, server):
    assert run("convert-oss", REPOSITORY, "out", "--push", "me/orbax").returncode == 0
    text = server.pushed["README.md"].decode()
    assert f'base_model: "{REPOSITORY}"' in text
    assert f"from `{REPOSITORY}` at `{COMMIT}`" in text


@pytest.mark.long
def test_an_upload_that_breaks_off_is_told_and_taken_up(run, server, small_out, tmp_path):
    server.refused = (403, 10**6)
    asked = ["convert-oss", small_out, "out", "--push", "me/orbax"]
    line = only_line(run(*asked), 3)
    assert "the upload broke off" in line
    assert "out is whole: run the same command again" in line
    server.refused = (503, 2)
    assert run(*asked).returncode == 0
    assert "_METADATA" in server.pushed


@pytest.mark.long
def test_who_may_not_write_is_told_before_anything_is_converted(run, server, small_out, tmp_path):
    server.token = "hf_secretsecretsecret"
    assert "hf auth login" in only_line(run("convert-oss", small_out, "out", "--push", "me/x"), 2)
    assert "cannot be" in only_line(run("convert-oss", small_out, "out", "--push", "a/b--c"), 2)
    assert "cannot be" in only_line(run("convert-oss", small_out, "out", "--push", "a/b", HF_HUB_OFFLINE="1"), 2)
    assert "found 'nonsense'" in only_line(run("convert-oss", small_out, "out", "--push", "nonsense"), 2)
    assert "found no file" in only_line(run("convert-oss", small_out, "out", "--push", "me/x", "--card", "none.md"), 2)
    assert "--card: expected --push" in only_line(run("convert-oss", small_out, "out", "--card", "none.md"), 2)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_line_says_what_it_may_be(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hub_of.InputError, match=r"if it is a repository of the Hugging Face hub, install huggingface_hub"):
        hub_of.local(REPOSITORY)


def test_what_is_a_repository_and_what_is_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/model").mkdir(parents=True)
    assert [text for text in ("openai/gpt-oss-20b", "a-b/c.d", "run/model", "run/typo", "./a/b", "a/b/c", "a", "/a/b", "~/a") if
            hub_of.is_id(text)] == ["openai/gpt-oss-20b", "a-b/c.d"]  # fmt: skip
    assert hub_of.origin(tmp_path) is None


# --- a server that is no hub ------------------------------------------------------------------------------------


@pytest.fixture
def download(server, tmp_path, monkeypatch):
    """`hub.local`, into a cache three directories below `tmp_path`."""
    from huggingface_hub import constants

    for name, value in (server.constants | {"HF_HUB_CACHE": str(tmp_path / "a/b/cache")}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_of, "WAIT_SECONDS", 0.0)
    return lambda: hub_of.local(REPOSITORY)


def outside(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if not path.is_dir() and tmp_path / "a/b/cache" not in path.parents]


def told(kinds: str, status: int = 200, data: bytes | None = None, **headers: str):
    """Where `kinds` begins the kind of an answer: these headers, with - for _, and this content."""
    changed = {name.replace("_", "-"): value for name, value in headers.items()}

    def says(kind, answer):
        if not kind.startswith(kinds):
            return answer
        return status, answer[1] | changed, answer[2] if data is None else data

    return says


INFO = {"id": REPOSITORY, "sha": COMMIT}
LEADS_OUT = "../../../../../stolen"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (told("info", data=b"<html>Log in to the network</html>"), "JSONDecodeError: Expecting value"),
        (told("info", data=b'"\xc3("'), "UnicodeDecodeError"),
        (told("info", data=b"[" * 100_000), "RecursionError"),
        (told("info", data=b"[]"), "TypeError"),
        (told("info", data=b'{"sha": "x"}'), "KeyError: 'id'"),
        (told("info", data=json.dumps(INFO | {"sha": None}).encode()), "must have a revision sha"),
        (told("info", data=json.dumps(INFO | {"sha": LEADS_OUT}).encode()), f"expected a commit, found '{LEADS_OUT}'"),
        (told("info", data=json.dumps(INFO | {"sha": 7}).encode()), "TypeError"),
        (told("tree", data=b'[{"path": "config.json"}]'), "KeyError"),
        (told("tree", data=b'[{"type": "file", "path": 7, "size": 1, "oid": "x"}]'), "is not a string"),
        (told("tree", data=b" " * (hub_answers.LIST_BYTES + 1)), "expected at most 16,777,216 bytes about a repository"),
        (told("tree", data=gzip.compress(bytes(10**8)), Content_Encoding="gzip"), "expected no content-encoding, found 'gzip'"),
        (told("HEAD", ETag=f'"{LEADS_OUT}"'), f"expected another etag, found '\"{LEADS_OUT}\"'"),
        (told("HEAD", X_Linked_ETag="/etc/passwd"), "expected another x-linked-etag, found '/etc/passwd'"),
        (told("HEAD", ETag='".."'), "expected another etag"),
        (told("HEAD", X_Repo_Commit=LEADS_OUT), "expected another x-repo-commit"),
        (told("HEAD", X_Repo_Commit="1" * 40), f"expected a file of the commit {COMMIT}, found '{'1' * 40}'"),
        (told("HEAD", X_Linked_Size="9" * 400), "expected another x-linked-size"),
        (told("GET", 206, Content_Range="bytes 0-5/*"), "expected another content-range"),
        (told("HEAD", 302, Location="http://[::1"), "ValueError: Invalid IPv6 URL"),
    ],
)  # fmt: skip
def test_what_is_no_answer_of_a_hub_is_a_line(server, download, tmp_path, said, found):
    server.says = said
    with pytest.raises(hub_of.InputError) as caught:
        download()
    line = str(caught.value)
    assert line.startswith(f"{REPOSITORY}: expected the answers of a hub, found something else (")
    assert found in line
    assert line.endswith("); is HF_ENDPOINT that of one?")
    assert not outside(tmp_path)
    server.says = lambda kind, answer: answer
    assert len(list(download().iterdir())) == 5  # nothing of it stays


def test_files_that_lie_elsewhere_are_not_downloaded(server, download, tmp_path):
    names = ["../config.json", "/config.json", "a/b.json", f"{LEADS_OUT}.json", "..", "config.json"]
    files = [{"type": "file", "path": name, "size": 1, "oid": "x"} for name in names]
    server.says = told("tree", data=json.dumps(files).encode())
    assert [path.name for path in download().iterdir()] == ["config.json"]
    assert not outside(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("path", [f"/api/models/{REPOSITORY}/tree/main?x", "/elsewhere"])
def test_a_list_of_files_without_end_is_a_line(server, download, path):
    server.says = told("tree", Link=f'<{server.url}{path}>; rel="next"')
    with pytest.raises(hub_of.InputError, match="expected at most 100 pages, of /api/models/, found 'http://127"):
        download()


@pytest.mark.parametrize("headers", [{"Retry_After": "9" * 30}, {"Retry_After": "601"}, {"RateLimit": '"api";r=0;t=100000'}])
def test_nobody_waits_for_hours(server, download, headers):
    server.says = told("HEAD", 429, **headers)
    with pytest.raises(Incomplete, match="the hub lets nobody in for more than 10 minutes; run the same command later"):
        download()


def test_whoever_set_a_client_has_it_back(server, download):
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    made = []

    def make():
        made.append(_http.default_client_factory())
        return made[-1]

    set_client_factory(make)
    try:
        assert download().is_dir()
        assert _http._GLOBAL_CLIENT_FACTORY is make
        assert len(made) == 1  # with what looks at answers
        assert _http.get_session() is made[1]
        assert all(len(hooks) <= 1 for hooks in made[1].event_hooks.values())
    finally:
        set_client_factory(_http.default_client_factory)


def test_who_is_let_in_no_more_has_what_is_in_the_cache(server, download):
    there = download()
    server.token = "hf_secretsecretsecret"
    assert download() == there
    shutil.rmtree(there.parents[1] / "refs")
    with pytest.raises(hub_of.InputError, match="one that is private takes `hf auth login`"):
        download()
