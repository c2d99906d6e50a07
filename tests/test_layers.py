"""Imports point down only, room by room, and never in a circle; and what is promised to be light is light.

Read from the source with `ast`, imports inside functions and for type checkers included. Scripts import one another by the
bare name (`from command import ...`), since a script's own folder is where Python looks first: that counts too.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = [
    ("core", ["rlhf.core", "rlhf.types", "rlhf.errors", "rlhf.settings"]),
    ("algorithms", ["rlhf.algorithms"]),
    ("processes", ["rlhf.distributed", "rlhf.layout", "rlhf.lifeline", "rlhf.lifeline_hub"]),
    ("runs", ["rlhf.runs"]),
    ("training", ["rlhf.training"]),
    ("data", ["rlhf.data"]),
    ("models", ["rlhf.models"]),
    ("isolation", ["rlhf.isolation"]),
    ("rewards", ["rlhf.rewards", "rlhf.verifiers"]),
    ("rollout", ["rlhf.rollout"]),
    ("trainers", ["rlhf.trainers"]),
    ("commands", ["rlhf.commands"]),
    ("the package's front", ["rlhf"]),
    ("environments", ["gym_baselines.envs"]),
    ("control", ["gym_baselines"]),
    ("measuring control", ["gym_baselines.measuring"]),
    ("figures of control", ["gym_baselines.figures"]),
    ("commands of control", ["gym_baselines.compare", "gym_baselines.plots", "gym_baselines.__main__"]),
    ("recipes", ["recipes"]),
    ("benchmarks", ["benchmarks"]),
]
"""Lowest first. A module belongs to the longest name it begins with; `rlhf` itself is rlhf/__init__.py alone."""

TORCH_ONLY = ("rlhf.core", "rlhf.types", "rlhf.errors", "rlhf.settings", "rlhf.algorithms")
"""These import torch, the standard library and each other."""

FORBIDDEN = {
    # who: what it must not import, and what to do instead
    "rlhf": ({"gymnasium", "stable_baselines3"}, "environments belong into gym_baselines/"),
    "gym_baselines": ({"transformers", "datasets", "peft"}, "language models belong into rlhf/"),
    "recipes": ({"gym_baselines", "gymnasium"}, "what both worlds need belongs into rlhf/"),
}

FLAT = ("recipes", "benchmarks")
"""Folders whose scripts import one another by their bare names."""


def sources() -> dict[str, Path]:
    """Module name -> file of everything that is laid out in rooms."""
    files = [
        path
        for package in ("rlhf", "gym_baselines", "recipes", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
    ]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


OURS = sources()


def imports_of(module: str, path: Path) -> list[tuple[str, int]]:
    """(imported module, line); `from a import b` counts as a.b if that is a module of ours."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def resolved(name: str) -> str:
        folder = module.partition(".")[0]
        return f"{folder}.{name}" if folder in FLAT and f"{folder}.{name}" in OURS else name

    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(resolved(alias.name), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = resolved(".".join([*parents, *([node.module] if node.module else [])]))
            found += [(f"{base}.{a.name}" if f"{base}.{a.name}" in OURS else base, node.lineno) for a in node.names]
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def room(module: str) -> int | None:
    """The number of the module's room; None for packages that are not ours."""
    matches = [(len(p), number) for number, (_, prefixes) in enumerate(ROOMS) for p in prefixes if within(module, p)]
    return max(matches)[1] if matches else None


def complaints(module: str, imports: list[tuple[str, int]], place: str) -> list[str]:
    """What is wrong with one module's imports, and what to do about it."""
    found = []
    own = room(module)
    if own is not None and ROOMS[own][1] == ["rlhf"] and module != "rlhf":
        found.append(
            f"{place}: {module} is in none of the rooms. Move it into one, or add a room to ROOMS and README.md."
        )
    for imported, line in imports:
        top, other = imported.split(".")[0], room(imported)
        if other is not None and own is not None and other > own:
            found.append(
                f"{place}:{line}: {module} ({ROOMS[own][0]}) imports {imported} ({ROOMS[other][0]}), which lies "
                "above it. Imports go down only: move what both need into the lower room, or pass it in as an argument."
            )
        torch_only = any(within(module, prefix) for prefix in TORCH_ONLY)
        if torch_only and top not in {"torch", "rlhf"} and top not in sys.stdlib_module_names:
            found.append(
                f"{place}:{line}: {module} imports {imported}, but cores and algorithms import torch and the standard "
                "library alone, so that they run anywhere. Convert to tensors in the room above and pass those in."
            )
        names, remedy = FORBIDDEN.get(module.split(".")[0], (set(), ""))
        if top in names:
            found.append(f"{place}:{line}: {module} imports {top}; {remedy}.")
        if top == "accelerate" and module != "rlhf.distributed" and within(module, "rlhf"):
            found.append(
                f"{place}:{line}: {module} imports accelerate, which only rlhf/distributed.py knows: add what you need to "
                "`Distributed` and use that."
            )
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_down_only():
    found = [
        c for name, path in OURS.items() for c in complaints(name, imports_of(name, path), str(path.relative_to(ROOT)))
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_modules_import_one_another_in_a_circle():
    """Not even inside a function, or for a type checker alone."""
    graph = {name: {i for i, _ in imports_of(name, path) if i in OURS and i != name} for name, path in OURS.items()}
    found = circle(graph)
    assert not found, "a circle of imports: " + " -> ".join(found) + ". Move what two of them need into a third."


def test_no_folders_import_one_another_in_a_circle():
    """A folder is one room: what two of its files have in common with another folder goes one way."""

    def folder(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name, path in OURS.items():
        others = {folder(imported) for imported, _ in imports_of(name, path) if imported in OURS}
        graph.setdefault(folder(name), set()).update(others - {folder(name)})
    found = circle(graph)
    assert not found, "a circle of folders: " + " -> ".join(found) + ". Move the file that points back."


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_everything_that_samples_goes_through_the_engine():
    """Of the engine in this process only the class is used, and nobody else samples with a language model; the memory
    plan's dry run has tensors without storage, and so no tokens."""
    for name, path in OURS.items():
        tree = ast.parse(path.read_text())
        taken = {
            a.name
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module == "rlhf.rollout.in_process"
            for a in n.names
        }
        assert taken <= {"InProcessEngine"}, f"{path}: sample through the engine's submit, not through {taken}"
        if name not in ("rlhf.rollout.in_process", "rlhf.trainers.dry_run", "benchmarks.trl_sides"):
            called = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} & {"generate", "invert_cdf"}
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & {"DynamicCache"}
            assert not called | names, f"{path}: sample through a RolloutEngine, not through {called | names}"


def test_there_is_something_to_read():
    assert {"rlhf.core.advantages", "rlhf.algorithms.ppo", "rlhf.training.update", "gym_baselines"} <= OURS.keys()
    imported = {name for name, _ in imports_of("rlhf.algorithms.ppo", OURS["rlhf.algorithms.ppo"])}
    assert {"torch", "rlhf.core.advantages", "rlhf.types"} <= imported
    flat = {name for name, _ in imports_of("recipes.ppo_rlhf", OURS["recipes.ppo_rlhf"])}
    assert "recipes.command" in flat and "rlhf.trainers.config" in flat
    assert "benchmarks.gpu_task" in {name for name, _ in imports_of("benchmarks.gpu", OURS["benchmarks.gpu"])}


def test_every_room_has_modules_and_the_readme_names_it():
    """The README's tree and these rooms are one picture."""
    tree = (ROOT / "README.md").read_text().partition("## The files")[2]
    for _, prefixes in ROOMS:
        for prefix in prefixes:
            assert any(within(module, prefix) for module in OURS), prefix
            name = prefix.rpartition(".")[2]
            assert f"{name}/" in tree or f"{name}.py" in tree, f"README.md, The files: {prefix} is missing"


@pytest.mark.parametrize(
    ("module", "imported", "advice"),
    [
        ("rlhf.core.kl", "rlhf.algorithms.ppo", "Imports go down only"),
        ("rlhf.core.kl", "rlhf.training.update", "Imports go down only"),
        ("rlhf.algorithms.ppo", "rlhf.models.policy", "Imports go down only"),
        ("rlhf.training.update", "rlhf.rollout.in_process", "Imports go down only"),
        ("rlhf.runs.directory", "rlhf.training.update", "Imports go down only"),
        ("rlhf.rollout.scoring", "rlhf.trainers.trainer", "Imports go down only"),
        ("rlhf.trainers.trainer", "rlhf", "Imports go down only"),
        ("rlhf.trainers.trainer", "recipes.sft", "Imports go down only"),
        ("rlhf.core.masking", "numpy", "Convert to tensors"),
        ("rlhf.algorithms.ppo", "transformers", "Convert to tensors"),
        ("rlhf.rollout.scoring", "gymnasium.vector", "gym_baselines/"),
        ("gym_baselines.train", "transformers", "rlhf/"),
        ("rlhf.models.policy", "accelerate.utils", "Distributed"),
        ("gym_baselines.train", "gym_baselines.measuring.measure", "Imports go down only"),
        ("gym_baselines.envs.resets", "gym_baselines.train", "Imports go down only"),
        ("recipes.grpo", "gym_baselines.api", "both worlds"),
    ],
)
def test_an_import_that_points_up_is_named_with_what_to_do(module, imported, advice):
    """The negative control of the tests above."""
    (complaint,) = complaints(module, [(imported, 12)], "some_file.py")
    assert complaint.startswith("some_file.py:12: ") and imported.split(".")[0] in complaint and advice in complaint


def test_a_module_outside_all_rooms_is_named_with_what_to_do():
    (complaint,) = complaints("rlhf.helpers", [], "rlhf/helpers.py")
    assert "none of the rooms" in complaint


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("rlhf.training.update", "rlhf.core.masking"),
        ("rlhf.core.losses", "rlhf.core.kl"),
        ("rlhf.trainers.trainer", "rlhf.rollout.scoring"),
        ("recipes.sft", "rlhf.trainers.trainer"),
        ("recipes.sft", "rlhf"),
        ("gym_baselines.train", "rlhf.training.update"),
        ("rlhf.core.random", "torch"),
        ("rlhf.core.random", "math"),
        ("rlhf.distributed", "accelerate"),
    ],
)
def test_an_import_that_points_down_is_not_complained_about(module, imported):
    assert complaints(module, [(imported, 1)], "some_file.py") == []


def run_python(code: str) -> list[str]:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


PROBE = """
import sys
def loaded(*names): print(*[n for n in names if n in sys.modules] or ["nothing"], sep=",")
import rlhf, rlhf.types, rlhf.algorithms.ppo
import rlhf.core.advantages, rlhf.core.kl, rlhf.core.logprobs, rlhf.core.losses, rlhf.core.masking, rlhf.core.random
loaded("accelerate", "datasets", "gymnasium", "peft", "transformers")
import gym_baselines.train
loaded("datasets", "transformers")
from rlhf import PPOTrainer
print(PPOTrainer.__module__)
"""


def test_cores_load_torch_alone_control_no_language_models_and_public_names_load_on_first_use():
    pytest.importorskip("gymnasium")
    assert run_python(PROBE) == ["nothing", "nothing", "rlhf.trainers.ppo"]


def test_every_public_name_exists():
    import rlhf

    for name in rlhf.__all__:
        assert getattr(rlhf, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'PPOTrianer'.*PPOTrainer"):
        rlhf.PPOTrianer  # noqa: B018
