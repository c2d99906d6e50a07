"""Imports point down only, read from the source with `ast`; and what is promised to be light is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    ("cores", ["rlhf.core", "rlhf.types", "rlhf.errors"]),
    ("algorithms", ["rlhf.algorithms"]),
    (
        "updates",
        ["rlhf.update", "rlhf.steppers", "rlhf.compiled", "rlhf.flat_optimizer", "rlhf.distributed", "rlhf.metrics"],
    ),
    ("the language-model parts", ["rlhf"]),  # every other module of rlhf
    ("the loop", ["rlhf.trainer", "rlhf.grpo_trainer"]),
    ("choices", ["recipes", "gym_baselines"]),
]
"""Lowest first; a module belongs to the longest name it begins with."""

TORCH_ONLY = ("rlhf.core", "rlhf.types", "rlhf.errors", "rlhf.algorithms")
"""These import torch, the standard library and each other."""

FORBIDDEN = {
    # who: what it must not import, and what to do instead
    "rlhf": ({"gymnasium", "stable_baselines3"}, "environments belong into gym_baselines/"),
    "gym_baselines": ({"transformers", "datasets", "peft"}, "language models belong into rlhf/"),
}


def sources() -> list[tuple[str, Path]]:
    """(module name, file) of everything that is laid out in layers."""
    files = [path for package in ("rlhf", "gym_baselines", "recipes") for path in (ROOT / package).rglob("*.py")]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in files]


def imports_of(module: str, path: Path) -> list[tuple[str, int]]:
    """(imported module, line), also those inside functions; `from a import b` counts as a.b if that is a module of ours."""
    ours = {name for name, _ in sources()}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [(f"{base}.{a.name}" if f"{base}.{a.name}" in ours else base, node.lineno) for a in node.names]
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def layer(module: str) -> int | None:
    """The number of the module's layer; None for packages that are not ours."""
    matches = [
        (len(prefix), number)
        for number, (_, prefixes) in enumerate(LAYERS)
        for prefix in prefixes
        if within(module, prefix)
    ]
    return max(matches)[1] if matches else None


def complaints(module: str, imports: list[tuple[str, int]], place: str) -> list[str]:
    """What is wrong with one module's imports, and what to do about it."""
    found = []
    own = layer(module)
    for imported, line in imports:
        top, other = imported.split(".")[0], layer(imported)
        if other is not None and own is not None and other > own:
            found.append(
                f"{place}:{line}: {module} ({LAYERS[own][0]}) imports {imported} ({LAYERS[other][0]}), which lies "
                "above it. Imports go down only: move what both need into the lower layer, or pass it in as an argument."
            )
        torch_only = any(within(module, prefix) for prefix in TORCH_ONLY)
        if torch_only and top not in {"torch", "rlhf"} and top not in sys.stdlib_module_names:
            found.append(
                f"{place}:{line}: {module} imports {imported}, but cores and algorithms import torch and the standard "
                "library alone, so that they run anywhere. Convert to tensors in the layer above and pass those in."
            )
        names, remedy = FORBIDDEN.get(module.split(".")[0], (set(), ""))
        if top in names:
            found.append(f"{place}:{line}: {module} imports {top}; {remedy}.")
        if top == "accelerate" and module != "rlhf.distributed":
            found.append(
                f"{place}:{line}: {module} imports accelerate, which only rlhf/distributed.py knows: add what you need to "
                "`Distributed` and use that."
            )
    return found


def test_imports_point_down_only():
    found = [
        c for name, path in sources() for c in complaints(name, imports_of(name, path), str(path.relative_to(ROOT)))
    ]
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_read():
    modules = {name for name, _ in sources()}
    assert {"rlhf.core.advantages", "rlhf.algorithms.ppo", "rlhf.update", "gym_baselines"} <= modules
    imported = {name for name, _ in imports_of("rlhf.algorithms.ppo", ROOT / "rlhf/algorithms/ppo.py")}
    assert {"torch", "rlhf.core.advantages", "rlhf.types"} <= imported


@pytest.mark.parametrize(
    ("module", "imported", "advice"),
    [
        ("rlhf.core.kl", "rlhf.algorithms.ppo", "Imports go down only"),
        ("rlhf.core.kl", "rlhf.update", "Imports go down only"),
        ("rlhf.algorithms.ppo", "rlhf.models", "Imports go down only"),
        ("rlhf.update", "rlhf.generation", "Imports go down only"),
        ("rlhf.rollout", "rlhf.trainer", "Imports go down only"),
        ("rlhf.trainer", "recipes.sft", "Imports go down only"),
        ("rlhf.core.masking", "numpy", "Convert to tensors"),
        ("rlhf.algorithms.ppo", "transformers", "Convert to tensors"),
        ("rlhf.rollout", "gymnasium.vector", "gym_baselines/"),
        ("gym_baselines.train", "transformers", "rlhf/"),
        ("rlhf.models", "accelerate.utils", "Distributed"),
    ],
)
def test_an_import_that_points_up_is_named_with_what_to_do(module, imported, advice):
    """The negative control of the test above."""
    (complaint,) = complaints(module, [(imported, 12)], "some_file.py")
    assert complaint.startswith("some_file.py:12: ") and imported.split(".")[0] in complaint and advice in complaint


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("rlhf.update", "rlhf.core.masking"),
        ("rlhf.core.losses", "rlhf.core.kl"),
        ("rlhf.trainer", "rlhf.rollout"),
        ("recipes.sft", "rlhf.trainer"),
        ("gym_baselines.train", "rlhf.update"),
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
    assert run_python(PROBE) == ["nothing", "nothing", "rlhf.trainer"]


def test_every_public_name_exists():
    import rlhf

    for name in rlhf.__all__:
        assert getattr(rlhf, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'PPOTrianer'.*PPOTrainer"):
        rlhf.PPOTrianer  # noqa: B018
