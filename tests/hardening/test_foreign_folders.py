"""What is not ours is neither removed nor written: foreign folders among the checkpoints, links, another job's output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lmdist.errors import DataError, UsageError
from lmdist.settings import PrepareSettings
from lmdist.storage.atomic import TakenError, atomic_folder, check_output_file, temporary_name, write_atomic
from lmdist.storage.locks import exclusive_lock
from lmdist.text.data_folder import read_meta
from lmdist.text.prepare import prepare
from lmdist.tracking import sync
from lmdist.tracking.failures import is_final
from lmdist.tracking.figures import add_figures
from lmdist.tracking.replay import Replay
from lmdist.tracking.run_folder import check_run_folder, newest_name
from lmdist.training.checkpoints.retain import find_checkpoint, newest_checkpoint, remove_old, remove_unfinished
from lmdist_export import export
from support.jobs import SMALL, small_data, train
from support.small_bundles import edit_json, make_data, make_run

OURS = (".step-000000003.writing-node-0-77", ".step-000000002.removed-node-0-1", ".step-000000007.old-elsewhere-12")
FOREIGN = (".git", ".ssh", ".config", ".step-3.writing-node-77", ".step-000000003", ".x.writing-node-77", "step-old")
FOREIGN += (".newest.writing-8", ".newest.writing-notes", f".step-000000003.writing-node-{10**20}")


def fill(folder: Path) -> Path:
    """Make a folder with a file in it."""
    folder.mkdir(parents=True)
    (folder / "file").write_text("mine")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Return the names below a folder, and what the files hold."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_only_names_of_our_own_form_are_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    checkpoints = run / "checkpoints"
    for name in (*OURS, *FOREIGN):
        fill(checkpoints / name)
    for name in (".newest.writing-77", ".newest.writing-node-0-77"):
        (checkpoints / name).touch()
    (checkpoints / ".step-000000003.writing-node-78").symlink_to(fill(tmp_path / "home"))
    remove_unfinished(checkpoints)
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {*FOREIGN, "newest", "step-000000007", ".step-000000003.writing-node-78"}
    assert all((checkpoints / name / "file").exists() for name in FOREIGN)
    assert content(tmp_path / "home") == {"file": "mine"}


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    checkpoints = make_run(tmp_path) / "checkpoints"
    folder = checkpoints / "step-000000007"
    folder.rename(checkpoints / ".step-000000007.old-elsewhere-12")
    remove_unfinished(checkpoints)
    assert newest_checkpoint(checkpoints) == folder


def test_old_checkpoints_are_removed_only_where_they_can_be_read(tmp_path: Path) -> None:
    checkpoints = make_run(tmp_path) / "checkpoints"
    newest = checkpoints / "step-000000007"
    for step in (5, 6):
        older = Path(shutil.copytree(newest, checkpoints / f"step-{step:09d}"))
        edit_json(older / "manifest.json", progress={"step": step})
    shutil.copytree(newest, checkpoints / "step-999999999")
    fill(checkpoints / "step-000000001")
    (checkpoints / "step-000000002").symlink_to(fill(tmp_path / "home"))
    (checkpoints / ("step-" + "\u0663" * 9)).mkdir()  # digits, though not ours
    remove_old(checkpoints, keep=1)
    steps = {path.name for path in checkpoints.glob("step-0*")}
    assert steps == {"step-000000001", "step-000000002", "step-000000007"}
    assert (checkpoints / "step-999999999").exists()
    assert content(tmp_path / "home") == {"file": "mine"}


def test_checkpoints_that_are_a_link_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    small_data(tmp_path / "data")
    home = fill(tmp_path / "home" / ".ssh").parent
    (tmp_path / "run").mkdir()
    flags = [*SMALL, "--data.folder=data", "--run_folder=run", "--resume=auto", "--training.steps=1"]
    for name, target in (("checkpoints", home), ("samples", home), ("loss.png", home / ".ssh" / "file")):
        (tmp_path / "run" / name).symlink_to(target)
        message = train(1, *flags, cwd=tmp_path, code=65).stderr
        assert f"run/{name} is a link" in message
        assert len(message.splitlines()) == 1
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / ".lock").symlink_to(home / "lock")
    with pytest.raises(DataError, match=r"\.lock is a link"), exclusive_lock(tmp_path / "run" / ".lock", 0):
        pass
    assert content(home) == {".ssh/file": "mine"}


def test_no_reader_follows_a_link_in_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    real = (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(real)
    with pytest.raises(DataError, match="checkpoints is a link"):
        find_checkpoint(run)
    (tmp_path / "by_link").symlink_to(real / "step-000000007")
    assert find_checkpoint(tmp_path / "by_link") == tmp_path / "by_link"  # the user's own word for it


def test_figures_and_points_are_neither_written_nor_read_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, victim = make_run(tmp_path), tmp_path / "victim"
    victim.write_text("mine")
    (run / "metrics.jsonl").symlink_to(victim)
    add_figures(run, 7, {"perplexity": 3.0}, "lmdist-evaluate")
    message = capsys.readouterr().err
    assert "does not get the figures" in message
    assert "metrics.jsonl is a link" in message
    with pytest.raises(DataError, match=r"metrics\.jsonl is a link"):
        sync.load_metadata(run)
    with pytest.raises(DataError, match=r"metrics\.jsonl is a link"):
        Replay(run, {}, live=True).new_lines(ended=True)
    assert victim.read_text() == "mine"
    assert is_final(DataError("a link")), "a link is no server that comes back"


def test_a_lock_that_is_a_link_costs_the_figures_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    (run / "mlflow.json").write_text("{}")
    (run / ".lock").symlink_to(tmp_path)
    add_figures(run, 7, {"perplexity": 3.0}, "lmdist-evaluate")
    assert ".lock is a link" in capsys.readouterr().err
    assert "test/perplexity" in (run / "metrics.jsonl").read_text()


def test_the_newest_checkpoint_is_one_of_ours(tmp_path: Path) -> None:
    assert newest_name(tmp_path / "checkpoints") == ""
    for name in (*FOREIGN, "step-000000010", "step-000000009"):
        fill(tmp_path / "checkpoints" / name)
    assert newest_name(tmp_path / "checkpoints") == "step-000000010"


def test_only_machine_0_needs_to_write_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, as good as a volume that may only be read")
    check_run_folder(tmp_path / "run", writes=False)
    with pytest.raises(UsageError, match="not a folder"):
        check_run_folder(tmp_path / "run", writes=True)


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_what_cannot_hold_a_run_is_found_before_it_is_trained(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(UsageError, match=f"--run_folder: .*{name} is not a folder, and is to be one"):
        check_run_folder(tmp_path, writes=True)


def test_names_in_meta_json_lie_in_the_folder(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    meta = read_meta(data)
    for name in ("../x", "/etc/passwd", "a/b", "a\x1bb"):
        edit_json(data / "meta.json", files={**meta["files"], name: meta["files"]["vocab.txt"]})
        with pytest.raises(DataError, match="names a file outside itself"):
            read_meta(data)


def test_an_output_that_is_a_link_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    export.main([str(run), "-o", str(tmp_path / "bundle"), "--data", "none"])
    (tmp_path / "link").symlink_to("bundle")
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            export.main([str(run), "-o", str(tmp_path / "link"), "--data", "none", *more])
        assert stop.value.code == 64
    assert "link is a link, which would itself be replaced" in capsys.readouterr().err.splitlines()[-1]
    for target in (tmp_path / "link", tmp_path / "dangling"):
        (tmp_path / "dangling").unlink(missing_ok=True)
        (tmp_path / "dangling").symlink_to("nowhere")
        with pytest.raises(UsageError, match="is a link"):
            prepare(PrepareSettings(inputs=["demo"]), target, overwrite=True)
        with pytest.raises(UsageError, match="is a link"):
            check_output_file(target)
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".link*"))


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("sample.txt", temporary_name(Path("sample.txt"), "writing")):
        (tmp_path / name).symlink_to(outside)
    write_atomic(tmp_path / "sample.txt", "ours")
    assert outside.read_text() == "mine"
    assert (tmp_path / "sample.txt").read_text() == "ours"


def test_of_two_writers_of_a_new_folder_the_second_one_loses(tmp_path: Path) -> None:
    def write_while_another_does() -> None:
        with atomic_folder(tmp_path / "news", replace=False) as folder:
            (folder / "second").touch()
            fill(tmp_path / "other").rename(tmp_path / "news")

    with pytest.raises(TakenError, match="another process has written it meanwhile"):
        write_while_another_does()
    assert content(tmp_path) == {"news/file": "mine"}


def at_once(folder: Path, code: str) -> list[tuple[str, int]]:
    """Run two processes of the same code, which begin when both have been started; return their last lines and exit codes."""
    wait = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    job = partial(subprocess.Popen, [sys.executable, "-c", wait + code], cwd=folder, text=True)
    jobs = [job(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    (folder / "go").touch()
    ends = [(job.communicate()[1].rpartition("\n")[0].rpartition("\n")[2], job.returncode) for job in jobs]
    (folder / "go").unlink()
    return ends


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with a text of 50 documents."""
    (tmp_path / "a.txt").write_text("".join(f"the cat said {number} .\n" for number in range(50)))
    return tmp_path


def test_of_two_prepares_one_ends_with_64_and_says_so(text: Path) -> None:
    arguments = ["a.txt", "-o", "data", "--tokenizer", "whitespace", "--min-count", "1", "--workers", "1"]
    ends = at_once(text, f"from lmdist.text.prepare import main; main({arguments})")
    assert sorted(code for _, code in ends) == [0, 64], ends
    assert "data exists" in next(message for message, code in ends if code == 64)
    assert sorted(path.name for path in text.iterdir()) == ["a.txt", "data"]


def test_of_two_jobs_both_train_on_what_one_of_them_has_prepared(text: Path) -> None:
    settings = {"inputs": ["a.txt"], "tokenizer": "whitespace", "min_count": 1, "workers": 1}
    ends = at_once(
        text,
        "from lmdist.settings import DataSettings, PrepareSettings, Recipe; from lmdist.train import prepare_if_absent\n"
        f"recipe = Recipe(data=DataSettings(folder='data'), prepare=PrepareSettings(**{settings}))\n"
        "prepare_if_absent(recipe, [], is_main=True)",
    )
    assert [code for _, code in ends] == [0, 0], ends
    assert sorted(path.name for path in text.iterdir()) == ["a.txt", "data"]


def test_several_writers_may_replace_one_folder(tmp_path: Path) -> None:
    """Each of them leaves its files or another's, never a mixture, and nothing beside them."""
    target = fill(tmp_path / "news")
    code = (
        "import sys; from pathlib import Path; from lmdist.storage.atomic import atomic_folder\n"
        "for number in range(40):\n"
        "    with atomic_folder(Path('news'), replace=True) as folder:\n"
        "        [(folder / name).write_text(sys.argv[1]) for name in 'ab']\n"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(number)], cwd=tmp_path) for number in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert content(target) in ({"a": "0", "b": "0"}, {"a": "1", "b": "1"})
    assert [path.name for path in tmp_path.iterdir()] == ["news"]
