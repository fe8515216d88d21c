"""The bundle that is served, and what lmdist-generate makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmdist_export import generate
from support.small_bundles import PLAIN_WORDS, UNTIED, make_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), UNTIED, "whitespace", PLAIN_WORDS)


@pytest.fixture
def generated(bundle: Path, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs lmdist-generate with options of the server, and returns its lines of JSON."""

    def call(*prompts: str, **options: object) -> list[dict[str, Any]]:
        flags: list[str] = []
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                flags += [flag] if value else [flag.replace("--", "--no-", 1)]
            else:
                flags += [part for one in (value if isinstance(value, list) else [value]) for part in (flag, str(one))]
        lines = []
        for number, prompt in enumerate(prompts):
            generate.main([str(bundle), "--prompt", prompt, "--json", *flags])
            lines += [json.loads(line) | {"prompt_number": number} for line in capsys.readouterr().out.splitlines()]
        return lines

    return call
