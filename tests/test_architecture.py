"""The package's structure: one import name per module, dependencies in one direction, few modules at the root."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nvembed_deploy
from tests.readme import ROOT

LIBRARY = ROOT / "nvembed_deploy"
DOORS = (
    ("export.trt", "--help"),
    ("export.to_onnx", "--help"),
    ("export.ray_job", "--help"),
    ("engines.bench", "--help"),
    ("app", "--help"),
    ("nvembed_deploy", "export", "--help"),
    ("nvembed_deploy", "bench", "--help"),
    ("nvembed_deploy", "app", "--help"),
)
ABOVE = {  # what may import a package, of those that stand above the library
    "nvembed_deploy.app": {"nvembed_deploy.app"},
    "nvembed_deploy.export": {"nvembed_deploy.export", "nvembed_deploy.app"},
    "nvembed_deploy.engines": {"nvembed_deploy.engines", "nvembed_deploy.export", "nvembed_deploy.app"},
}
SHARED_SHELVES = ("nvembed_deploy.console", "nvembed_deploy.files.", "nvembed_deploy.sample_texts")
"""What every part of the project uses besides the library's public names: messages, atomic files, Python's texts."""
DEVELOPERS = ("benchmarks", "recipes", "tools", "tests")


def modules() -> dict[str, Path]:
    """Returns the path of every module of the library by name, including those behind links."""
    paths = {}
    for folder, _, names in os.walk(LIBRARY, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                components = path.relative_to(ROOT).with_suffix("").parts
                paths[".".join(components).removesuffix(".__init__")] = path
    return paths


def imports(path: Path, paths: dict[str, Path], *, at_start: bool) -> set[str]:
    """Returns the library's modules that a module imports: all of them, or only those at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(ast.walk(tree))
    if at_start:
        nodes = []
        waiting: list[ast.AST] = [tree]
        while waiting:
            node = waiting.pop()
            is_late = isinstance(node, (ast.FunctionDef, ast.Lambda)) or (
                isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            )
            if not is_late:
                nodes.append(node)
                waiting += ast.iter_child_nodes(node)
    imported = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import would have a second name for a module"
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return imported & paths.keys()


@pytest.mark.parametrize("door", DOORS, ids=" ".join)
def test_every_module_has_one_name(door: tuple[str, ...]) -> None:
    """`python -m export.trt` imports nvembed_deploy.export: no module is loaded a second time as export.something."""
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = {list(door)}\n"
        "try:\n"
        f"    runpy.run_module({door[0]!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert [name for name in loaded if name.partition(".")[0] in ("export", "engines", "app") and "." in name] == []
    assert not {"torch", "onnx", "onnxruntime", "gradio", "ray"} & set(loaded)


def test_imports_have_no_cycles() -> None:
    paths = modules()
    graph = {name: imports(path, paths, at_start=True) - {name} for name, path in paths.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for dependency in sorted(graph[name]):
                visit(dependency, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_dependencies_point_one_way() -> None:
    """app -> export -> engines -> the rest of the library; the table of commands refers to modules by name only."""
    paths = modules()
    for name, path in paths.items():
        for dependency in imports(path, paths, at_start=False):
            for package, importers in ABOVE.items():
                if dependency == package or dependency.startswith(f"{package}."):
                    assert any(name == importer or name.startswith(f"{importer}.") for importer in importers), (
                        f"{name} -> {dependency}"
                    )


def test_the_page_imports_public_names_only() -> None:
    """It shows what a program can build on the library: whatever the page needs, the library offers."""
    for path in (LIBRARY / "app").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("nvembed_deploy") for alias in node.names), path.name
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("nvembed_deploy"):
                module = f"{node.module}."
                names = {alias.name for alias in node.names}
                is_own = module.startswith("nvembed_deploy.app.")
                is_public = node.module == "nvembed_deploy" and names <= set(nvembed_deploy.__all__)
                assert is_own or is_public or module.startswith(SHARED_SHELVES), f"{path.name}: {module}{names}"


def test_the_library_does_not_import_developer_packages() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert str(module).partition(".")[0] not in DEVELOPERS, name


def test_the_package_root_has_few_modules() -> None:
    names = sorted(path.stem for path in LIBRARY.glob("*.py") if not path.stem.startswith("__"))
    assert len(names) <= 12, names


def test_importing_the_library_loads_nothing() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import nvembed_deploy\n"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('nvembed_deploy')))\n"
        "import nvembed_deploy.model.config, nvembed_deploy.bundle.manifest\n"
        "assert not {'torch', 'onnxruntime', 'openvino'} & set(sys.modules)\n"
        "assert all(getattr(nvembed_deploy, name) for name in nvembed_deploy.__all__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not {"numpy", "tokenizers"} & set(ast.literal_eval(done.stdout))
