"""What is said in several files of a release is the same in all of them."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def test_the_version():
    citation = yaml.safe_load(text("CITATION.cff"))
    released = re.search(r"^## (\S+), (\S+)$", text("CHANGELOG.md"), re.M)
    assert (citation["version"], citation["date-released"]) == released.groups()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_torch_that_is_installed_first():
    files = ("scripts/_venv.sh", "scripts/matrix", "README.md", "parity/cli.py", "Dockerfile", ".github/workflows/ci.yml")
    found = {file: set(re.findall(r"torch==([\d.]+)", text(file))) for file in files}
    assert found == {file: {"2.13.0"} for file in files}


def test_the_workflow_runs_every_environment_of_the_matrix():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    every = re.search(r"    every = \{\n(.*?)\n    \}", text("scripts/matrix"), re.S)[1]
    assert jobs["versions"]["strategy"]["matrix"]["name"] == re.findall(r'^ +"(\w+)":', every, re.M)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run", "scripts/matrix ${{ matrix.name }}"]


def test_the_image_has_the_commands_and_no_root():
    image = text("Dockerfile")
    [names] = re.findall(r"for name in (.*?);", image)
    assert names.split() == list(PROJECT["scripts"])
    assert re.findall(r"^(?:USER|CMD) .*", image, re.M) == ["USER convert", 'CMD ["bash"]']
