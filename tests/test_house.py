"""The house keeps its rooms: directions of imports, the name `kernels`, light imports, documents that are true."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import the rooms of its own and of every later line; a module with a floor of its own is named.
FLOORS = [
    {"__main__", "cli"},
    {"commands", "bench", "study", "serve"},
    {"arguments"},
    {"doctor", "profiling"},
    {"run", "report"},
    {"evaluate"},
    {"build"},
    {"forecast"},
    {"assembly"},
    {"train", "estimate"},
    {"curriculum"},
    {"engine"},
    {"models", "rewards"},
    {"forward"},
    {"models.base", "prompts", "tiny"},
    {"recipe"},
    {"algorithm"},
    {"parts", "disk"},
    {"text", "errors", "version", "models.registry"},
]


def floor_of(module: str) -> int:
    """The line of the module, else of its room."""
    parts = module.split(".")[1:]
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    return floors[name] if (name := ".".join(parts[:2])) in floors else floors[parts[0]]


def is_module(dotted: str) -> bool:
    place = ROOT.joinpath(*dotted.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def imports_of(path: Path, module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            if path.name == "__init__.py" and node.level:
                base = module.split(".")[: len(module.split(".")) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
            found |= {target, *(f"{target}.{alias.name}" for alias in node.names if is_module(f"{target}.{alias.name}"))}
    return found


def modules() -> list[tuple[Path, str]]:
    paths = sorted((ROOT / "adagrpo").rglob("*.py"))
    dotted = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return list(zip(paths, dotted, strict=True))


def test_imports_point_downwards() -> None:
    for path, module in modules():
        if module == "adagrpo":
            continue
        for target in imports_of(path, module):
            if target.startswith("adagrpo."):
                assert floor_of(target) >= floor_of(module), f"{module} must not import {target}"


def test_a_family_is_known_to_its_own_modules_only() -> None:
    """All others, those of ``models`` included, reach it through the registry: they neither import nor name its classes."""
    from adagrpo.models.registry import FAMILIES

    for family in FAMILIES.values():
        paths = [family.adapter, family.fused, *family.architectures.values()]
        own = {f"adagrpo.models{path.partition(':')[0]}" for path in paths if path}
        names = {path.partition(":")[2] for path in paths if path}
        for path, module in modules():
            if module not in own:
                assert not imports_of(path, module) & own, f"{module} must not import a module of {family.title}"
            if module not in own | {"adagrpo.models.registry"}:
                words = set(re.findall(r"\w+", path.read_text("utf-8")))
                assert not words & names, f"{module} must not name a class of {family.title}"


def test_the_report_knows_nothing_of_runs() -> None:
    for path, module in modules():
        if module.startswith("adagrpo.report"):
            assert not [target for target in imports_of(path, module) if target.startswith("adagrpo.run")]


def test_no_recipe_reaches_below_build() -> None:
    """What trains is handed numbers and parts: a part that read the recipe could not be used, or tested, without one."""
    below = [
        (path, module) for path, module in modules() if module != "adagrpo" and floor_of(module) > floor_of("adagrpo.assembly")
    ]
    rooms = {module.split(".")[1] for _, module in below}
    assert {"train", "estimate", "curriculum", "engine", "forward", "models", "rewards", "prompts", "algorithm"} <= rooms
    for path, module in below:
        if not module.startswith("adagrpo.recipe"):
            assert not [name for name in imports_of(path, module) if name.startswith("adagrpo.recipe")], module


def test_only_ranks_knows_of_other_processes() -> None:
    for path, module in modules():
        if module != "adagrpo.engine.ranks":
            imported = imports_of(path, module)
            assert not [name for name in imported if name.startswith("torch.distributed")], module
            named = [
                ast.unparse(node) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)
            ]
            assert not [name for name in named if name.startswith(("torch.distributed", "dist."))], module


def test_kernels_know_torch_only() -> None:
    for path in (ROOT / "kernels" / "adagrpo_kernels").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts).removesuffix(".__init__")
        for target in imports_of(path, module):
            top = target.split(".")[0]
            assert top in sys.stdlib_module_names or top in {"torch", "triton", "adagrpo_kernels"}, f"{path}: {target}"


def test_everything_fits_on_a_few_pages() -> None:
    """Kernels, which are one function each by nature, may be longer, and take every pointer and stride as an argument."""
    for root in (ROOT / "adagrpo", ROOT / "kernels"):
        for path in root.rglob("*.py"):
            text = path.read_text("utf-8")
            assert len(text.splitlines()) <= 400, path
            kernel = path.parent.name == "_triton"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    assert lines <= (120 if kernel else 60), f"{path}: {node.name} has {lines} lines"
                    assert root.name == "kernels" or arguments(node) <= 10, (
                        f"{path}: {node.name} has {arguments(node)} arguments"
                    )
    assert len((ROOT / "adagrpo" / "train.py").read_text("utf-8").splitlines()) <= 260
    assert len(list((ROOT / "adagrpo").glob("[!_]*.py"))) <= 12


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many it takes, those of ``*args`` and ``**kwargs`` as one each; a method's own object is none."""
    a = function.args
    named = [given.arg for given in (*a.posonlyargs, *a.args)]
    return len(named) - (named[:1] in (["self"], ["cls"])) + len(a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)


def test_nothing_is_assigned_over_a_method() -> None:
    """Studies and benches are passed what they replace; the type checker finds the rest unless it is told to look away."""
    assert not [module for path, module in modules() if "method-assign" in path.read_text("utf-8")]


def test_every_room_is_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    roots = {"adagrpo": ROOT, "adagrpo_kernels": ROOT / "kernels"}
    files = [(path, root) for name, root in roots.items() for path in (root / name).rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(path.parent.relative_to(root).parts) for path, root in files)


def test_kernels_is_a_plain_folder() -> None:
    """`kernels/__init__.py` would shadow the Hub's `kernels` package, which diffusers and transformers import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_is_light() -> None:
    code = (
        "import sys, adagrpo; heavy = {'triton', 'torchao', 'flash_attn', 'pynvml', 'diffusers', 'transformers'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documented_snippet_adds_curriculum_and_fusion_to_a_foreign_loop() -> None:
    import torch

    text = (ROOT / "docs" / "extending.md").read_text("utf-8")
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "CapabilityCurriculum" in s)
    assert len(snippet.strip().splitlines()) <= 15
    trained: list[tuple[str, torch.Tensor]] = []
    prompts = [f"p{i}" for i in range(6)]
    quality = {prompt: 0.1 * i + 0.003 * i * i for i, prompt in enumerate(prompts)}
    steps = iter(range(2))

    def sample(prompt: str, count: int) -> list[str]:
        return [prompt] * count

    def score(images: list[str], prompt: str) -> torch.Tensor:
        return quality[prompt] + 0.01 * torch.arange(float(len(images)))

    scope = {
        "batches": (prompts for _ in steps),
        "sample": sample,
        "score": score,
        "update": lambda prompt, images, advantage: trained.append((prompt, advantage)),
    }
    exec(snippet, scope)
    # The EMA's mean is 0.2775 in both iterations; p3 (0.327) is closer than p2 (0.212).
    assert [prompt for prompt, _ in trained] == ["p3", "p3"]
    for _, advantage in trained:
        assert advantage.shape == (12,) and abs(float(advantage.sum())) < 1e-4 and float(advantage.abs().max()) > 1


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("[!.]*/README.md")),
]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_and_commands_of_the_documents_exist(file: Path) -> None:
    text = file.read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, heading = target.partition("#")
        path = file.parent / name if name else file
        assert path.exists(), target
        assert not heading or heading in headings(path), target
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_recipes_in_the_documents_can_run(file: Path, tmp_path: Path) -> None:
    from adagrpo.recipe.load import read_recipe

    for i, text in enumerate(re.findall(r"```toml\n(.*?)```", file.read_text("utf-8"), re.DOTALL)):
        (tmp_path / f"{i}.toml").write_text(text, "utf-8")
        recipe = read_recipe(tmp_path / f"{i}.toml")
        recipe.check()
        assert not recipe.dropped


def headings(file: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_document_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert not [file.name for file in DOCUMENTS[1:] if f"]({file.relative_to(ROOT).as_posix()})" not in text]


def test_the_readme_is_short_and_its_tour_names_every_room() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100
    tour = re.search(r"```\n(adagrpo/.*?)```", text, re.DOTALL)
    assert tour
    assert not [name for name in re.findall(r"^[\w/.]+", tour[1], re.MULTILINE) if not (ROOT / name).exists()]
    rooms = [f"{path.parent.name}/" for path in (ROOT / "adagrpo").glob("*/__init__.py")]
    modules = [path.name for path in (ROOT / "adagrpo").glob("[!_]*.py")]
    assert not [name for name in rooms + modules if not re.search(rf"\b{re.escape(name)}", tour[1])]


def test_triton_is_imported_only_where_a_kernel_runs() -> None:
    """Its interpreter is chosen by the environment before the first import."""
    names = [module for _, module in modules() if not module.endswith("__main__")]
    check = "importlib.import_module(name)\n    assert 'triton' not in sys.modules, name"
    code = f"import importlib, sys\nfor name in {names!r}:\n    {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
