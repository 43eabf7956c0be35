"""Who may import whom, and what starts without PyTorch and without JAX."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("oss_model", "converter", "parity")
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = {"torch", "transformers", "accelerate", "peft"}


def imports(source: str) -> set[str]:
    """Every module that is imported anywhere in `source`, inside functions too, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def packages(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)}


# These share nothing with what they judge.
JUDGE = {
    "parity/configs.py",
    "parity/equations.py",
    "parity/mistakes/wrong_equations.py",
    "parity/mistakes/edits.py",
    "parity/mistakes/parameters.py",
    *(module for module in MODULES if module.startswith("parity/reference/")),
}


def test_naming_a_mistake_shares_nothing_with_injecting_it():
    """Or the self-test would compare a mistake with itself; only the command line runs it."""
    users = {
        module for module in MODULES if any(n.startswith("parity.injection") for n in imports((ROOT / module).read_text()))
    }
    assert {module for module in users if not module.startswith("parity/injection/")} == {"parity/cli.py"}
    for module in (module for module in MODULES if module.startswith("parity/injection/")):
        named = {name for name in imports((ROOT / module).read_text()) if name.startswith("parity.mistakes.")}
        assert not named & {"parity.mistakes.wrong_equations", "parity.mistakes.wrong_runs", "parity.mistakes.run_catalogue"}


def forbidden(module: str) -> set[str]:
    """The packages that this file may not import, by DESIGN: who stands on whom."""
    if module.startswith("oss_model/"):
        return HEAVY | {"click", "rich", "converter", "parity"}
    if module.startswith("converter/"):
        return HEAVY | {"parity"}
    if module in JUDGE:
        torch = set() if module.startswith("parity/reference/") else HEAVY  # the third witness is neither of the two
        return {"oss_model", "converter", "jax", "flax"} | torch
    return set() if module == "parity/cli.py" else {"converter"}


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    assert not packages((ROOT / module).read_text(encoding="utf-8")) & forbidden(module)


def test_the_map_of_the_house_has_every_file():
    """docs/architecture.md: by its name, or that of its directory; commands and errors are where they are everywhere."""
    said = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    alike = {"__init__.py", "__main__.py", "cli.py", "errors.py"}
    together = ("parity/reference/", "parity/reports/")
    files = [Path(module) for module in MODULES if not module.startswith(together)]
    assert [str(file) for file in files if file.name not in alike and f"`{file.name}`" not in said.replace("/", "`")] == []


def test_the_rules_are_about_files_that_exist():
    assert {"oss_model/layouts.py", "converter/cli.py", "parity/cli.py"} | JUDGE <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("oss_model/params.py", "import torch"),
        ("oss_model/params.py", "import jax, transformers.utils as t"),
        ("oss_model/params.py", "def f():\n    from converter import convert"),
        ("oss_model/synthetic.py", "import click"),
        ("converter/plan.py", "from parity.metrics import relative"),
        ("converter/plan.py", "def f():\n    import torch"),
        ("parity/reference/layer.py", "from oss_model.mxfp4 import decode"),
        ("parity/reference/checkpoint.py", "import importlib\nimportlib.import_module('oss_model.layouts')"),
        ("parity/equations.py", "import torch"),
        ("parity/comparison.py", "import converter.plan"),
    ],
)
def test_a_forbidden_import_is_seen(module, line):
    assert packages(line) & forbidden(module)


def test_parity_uses_only_the_converters_public_names():
    import converter

    used = {name for name in imports((ROOT / "parity/cli.py").read_text(encoding="utf-8")) if name.startswith("converter.")}
    assert used <= {f"converter.{name}" for name in converter.__all__}
    assert used


# --- what starts without what -----------------------------------------------------------------------------------

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " was imported, and may not be")

sys.meta_path.insert(0, Blocker())
"""


def start(code: str, blocked: set[str]) -> subprocess.CompletedProcess:
    """Run `code` in an interpreter in which none of `blocked` can be imported."""
    program = BLOCKER.format(blocked=tuple(sorted(blocked))) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)


def command_line(module: str, *arguments: str) -> str:
    return f"\nsys.argv = {[module, *arguments]!r}\nfrom {module}.cli import main\nmain()\n"


def test_the_blocker_blocks():
    run = start("import torch.nn", HEAVY)
    assert run.returncode == 1
    assert "ImportError: torch was imported, and may not be" in run.stderr
    assert start("import json", HEAVY).returncode == 0


def test_the_whole_of_oss_model_imports_without_pytorch():
    names = [f"oss_model.{path.stem}" for path in sorted((ROOT / "oss_model").glob("*.py")) if path.stem != "__init__"]
    code = f"""
import importlib
import oss_model
print([getattr(oss_model, name).__name__ for name in oss_model.__all__])
for name in {names!r}:
    importlib.import_module(name)
print(sorted(set(sys.modules) & {HEAVY | {"click", "converter", "parity"}!r}))
"""
    run = start(code, HEAVY)
    assert run.returncode == 0, run.stderr
    import oss_model

    assert run.stdout.splitlines() == [repr(oss_model.__all__), "[]"]


def test_the_tables_and_the_shards_need_no_jax():
    code = """
import oss_model.layouts, oss_model.shards
from oss_model import InputError, ModelConfig
print(len(oss_model.layouts.parameters(ModelConfig.gpt_oss_20b())))
"""
    run = start(code, {"jax", "jaxlib", "flax"})
    assert (run.returncode, run.stdout) == (0, "411\n"), run.stderr


@pytest.mark.parametrize("module", ["converter", "parity"])
def test_help_needs_neither_pytorch_nor_jax(module):
    run = start(command_line(module, "--help"), HEAVY | {"jax", "jaxlib", "flax", "orbax", "tensorstore", "numpy"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage:")


@pytest.mark.parametrize(("script", "module"), [("convert-oss", "converter.cli"), ("check-parity", "parity.cli")])
def test_the_console_scripts_are_these_functions(script, module):
    from importlib.metadata import entry_points

    [found] = entry_points(group="console_scripts", name=script)
    assert found.value == f"{module}:main"


def test_unknown_names_are_attribute_errors():
    import oss_model

    with pytest.raises(AttributeError, match="module 'oss_model' has no attribute 'Transfomer'"):
        oss_model.Transfomer  # noqa: B018
    assert sorted(oss_model.__all__) == sorted(oss_model._HOME)


def test_the_packages_are_listed_by_name():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    here = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(path.parts) for path in here}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)


def test_the_base_installation_has_no_pytorch():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {line.split(">")[0].split("[")[0] for line in project["dependencies"]}
    assert not names & HEAVY
    assert {line.split(">")[0].split("=")[0] for line in project["optional-dependencies"]["parity"]} == HEAVY | {"jinja2"}


def test_the_model_can_be_read_in_one_sitting():
    assert len((ROOT / "oss_model/modeling.py").read_text(encoding="utf-8").splitlines()) <= 300


# --- what is never done -----------------------------------------------------------------------------------------

# Code that files of strangers, or names, could make run something else.
NEVER = {
    "pickle": r"\bpickle\b|allow_pickle\s*=\s*True|\bshelve\b|\bmarshal\b|\bdill\b",
    "torch.load": r"torch\.load\b",
    "code from a repository": r"trust_remote_code",
    "a shell": r"shell\s*=\s*True|os\.system\(|os\.popen\(|getoutput\(",
    "evaluation": r"(?<![.\w])(eval|exec)\(",
    "a template without escapes": r"autoescape\s*=\s*False|Template\(",
    "a name that can be guessed": r"\bmktemp\(",
}
SOURCES = [*MODULES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.py"))]


@pytest.mark.parametrize("what", NEVER)
def test_nothing_that_runs_what_it_reads(what):
    assert not [module for module in SOURCES if re.search(NEVER[what], (ROOT / module).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("pickle", "import pickle"),
        ("pickle", "np.load(file, allow_pickle=True)"),
        ("torch.load", "torch.load(path)"),
        ("code from a repository", "from_pretrained(path, trust_remote_code=True)"),
        ("a shell", "subprocess.run(text, shell=True)"),
        ("evaluation", "value = eval(text)"),
        ("a template without escapes", "jinja2.Template(text)"),
        ("a name that can be guessed", "tempfile.mktemp()"),
    ],
)
def test_what_is_never_done_would_be_seen(what, line):
    assert re.search(NEVER[what], line)
