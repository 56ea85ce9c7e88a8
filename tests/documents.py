"""The documents whose commands, settings, links and paths the tests hold true: every Markdown file of ours."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "stages", "reward_models", "ds_configs", "tests")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(found for folder in FOLDERS for found in (ROOT / folder).rglob("*.md")))
}
