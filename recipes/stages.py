"""Runs the stages of an embedded pipeline. Each writes a directory below the pipeline's; finished ones are reused."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.runs.reporting import say


class Stages:
    """Runs the stages that are not finished yet, and prints which ones it runs or reuses.

    root: the pipeline's directory; must be absent, empty or made by an earlier call. settings: InputError if the
    earlier call had others. overwrite: delete what the earlier call made.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], distributed: Distributed, *, overwrite: bool) -> None:
        self.root = root
        self.distributed = distributed
        mark = root / "pipeline.json"
        if distributed.is_main:
            if overwrite and mark.is_file():
                shutil.rmtree(root)
            if root.exists() and any(root.iterdir()) and not mark.is_file():
                raise InputError(
                    f"output_dir={str(root)!r} holds files that this pipeline did not write. Choose another directory."
                )
            root.mkdir(parents=True, exist_ok=True)
            plain = json.loads(json.dumps(settings))
            saved = json.loads(mark.read_text()) if mark.is_file() else plain
            changed = [
                f"{name}: {saved.get(name)} -> {value}" for name, value in plain.items() if saved.get(name) != value
            ]
            if changed:
                raise InputError(
                    f"output_dir={str(root)!r} was made with other settings ({'; '.join(changed)}). Choose another "
                    "directory, or replace this one with --overwrite."
                )
            mark.write_text(json.dumps(plain) + "\n")
        distributed.barrier()

    def run(self, name: str, folder: str, make: Callable[[Path], Any], on_main: bool = False) -> None:
        """Call `make` with the path of `folder`, unless it exists. `make` must leave it complete or absent.

        on_main: only the main process calls `make`; the others wait.
        """
        path = self.root / folder
        finished = path.exists()
        self.distributed.barrier()  # every process has checked before any creates it
        if finished:
            self._say(f"{name}: reusing {path} (--overwrite starts anew)")
            return
        self._say(f"{name} -> {path}")
        if not on_main or self.distributed.is_main:
            start = time.perf_counter()
            make(path)
            self._say(f"{name}: {time.perf_counter() - start:.0f} s")
        self.distributed.barrier()

    def _say(self, text: str) -> None:
        if self.distributed.is_main:
            say(text)
