"""Names, paths and the messages for wrong ones."""

from __future__ import annotations

import pytest

from pipeline import plugins
from pipeline.errors import UserError
from reward_models import length, rouge

FOLDER = "reward_models"


def load(name: str):
    return plugins.load(name, FOLDER, "reward", "reward")


def message(name: str) -> str:
    with pytest.raises(UserError) as raised:
        load(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_name_is_a_module_of_the_folder():
    assert load("rouge") is rouge.reward
    assert load("length") is length.reward


def test_another_function_of_a_module():
    assert load("rouge:rouge1") is rouge.rouge1
    assert plugins.load("rouge", FOLDER, "reward", "rougeL") is rouge.rougeL


def test_another_folder():
    assert callable(plugins.load("plugins", "pipeline", "room", "load"))


def test_a_file_of_the_user(tmp_path):
    (tmp_path / "brief.py").write_text("def reward(): return 1\ndef other(): return 2\n")
    assert load(f"{tmp_path}/brief.py")() == 1
    assert load(f"{tmp_path}/brief.py:other")() == 2


def test_a_file_is_found_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "brief.py").write_text("def reward(): return 3\n")
    monkeypatch.chdir(tmp_path)
    assert load("my/brief.py")() == 3


def test_a_file_is_loaded_once_and_two_of_one_name_are_two(tmp_path):
    for name, number in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "brief.py").write_text(
            f"calls = []\ndef reward():\n    calls.append({number})\n    return calls\n"
        )
    assert load(f"{tmp_path}/a/brief.py") is load(f"{tmp_path}/a/brief.py")
    assert load(f"{tmp_path}/a/brief.py")() == [1]
    assert load(f"{tmp_path}/b/brief.py")() == [2]


def test_a_file_may_define_dataclasses(tmp_path):
    (tmp_path / "record.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Kept:\n    x: int = 4\ndef reward(): return Kept().x\n"
    )
    assert load(f"{tmp_path}/record.py")() == 4


def test_the_folder_is_the_list(tmp_path, monkeypatch):
    folder = tmp_path / "my_folder"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text("def reward(): return 5\n")
    (folder / "_private.py").write_text("def reward(): return 6\n")
    (folder / "tools.py").write_text("raise RuntimeError('a listing must not import')\n")
    (folder / "broken.py").write_text("def reward(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.available("my_folder") == ["broken", "good", "tools"]
    assert plugins.available("my_folder", "reward") == ["good"]
    assert plugins.load("good", "my_folder", "reward", "reward")() == 5
    with pytest.raises(UserError, match=r"reward 'broken' does not load: SyntaxError: .*my_folder/broken.py:1\)"):
        plugins.load("broken", "my_folder", "reward", "reward")
    with pytest.raises(
        UserError, match=r"reward 'tools' does not load: RuntimeError: a listing .*my_folder/tools.py:1\)"
    ):
        plugins.load("tools", "my_folder", "reward", "reward")


def test_a_wrong_name_lists_the_folder():
    said = message("lenght")
    assert said.startswith("reward 'lenght': not in reward_models/, which has ")
    assert "length" in said and "rouge" in said
    assert said.endswith("; did you mean 'length'?; a file of your own is given by its path, as in my/lenght.py")


def test_a_wrong_function_lists_the_file(tmp_path):
    (tmp_path / "two.py").write_text("def short(): pass\ndef long(): pass\n")
    path = f"{tmp_path}/two.py"
    assert (
        message(f"{path}:shrt")
        == f"reward {path}: no function 'shrt' in {path}, it has short, long; did you mean 'short'?"
    )
    assert message("rouge:rouge3").startswith("reward 'rouge': no function 'rouge3' in ")
    assert "it has reward, released, rouge1, rouge2, rougeL, rougeLsum" in message("rouge:rouge3")


def test_what_is_no_function(tmp_path):
    (tmp_path / "number.py").write_text("reward = 3\n")
    assert message(f"{tmp_path}/number.py").endswith("number.py is a int, wanted a function: def reward(...)")


def test_a_missing_file(tmp_path):
    (tmp_path / "brief.py").write_text("")
    said = message(f"{tmp_path}/breif.py")
    assert said == f"reward {tmp_path}/breif.py: there is no such file; did you mean '{tmp_path}/brief.py'?"
    assert message("no_such_folder/x.py") == "reward no_such_folder/x.py: there is no such file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef reward(:\n", "does not load: SyntaxError: "),
        ("import no_such_library\n", "does not load: ModuleNotFoundError: No module named 'no_such_library' ("),
        ("\n\nraise ValueError('two\\nlines')\n", "does not load: ValueError: two lines ("),
        ("import sys\nsys.exit(0)\n", "does not load: SystemExit: 0 ("),
        ("def score(): pass\ndef _hidden(): pass\n", "no function 'reward' in "),
        ("", "it has none"),
    ],
)
def test_a_file_that_does_not_serve(tmp_path, text, said):
    (tmp_path / "bad.py").write_text(text)
    assert said in message(f"{tmp_path}/bad.py")


def test_the_line_is_named(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("x = 1\n\ndef reward(:\n")
    assert message(f"{tmp_path}/bad.py").endswith(f"({tmp_path}/bad.py:3)")
    (tmp_path / "late.py").write_text(
        "import json\n\njson.loads('{')\n"
    )  # raised inside the library, placed by our line
    monkeypatch.chdir(tmp_path)
    assert message("late.py").endswith(" (late.py:3)")


def test_a_failed_file_can_be_mended(tmp_path):
    (tmp_path / "mended.py").write_text("1 / 0\n")
    message(f"{tmp_path}/mended.py")
    (tmp_path / "mended.py").write_text("def reward():\n    return 'now it works'\n")
    assert load(f"{tmp_path}/mended.py")() == "now it works"


def test_guarded_keeps_the_cause_and_lets_user_errors_pass():
    with pytest.raises(UserError) as raised:
        plugins.guarded("place", lambda: 1 / 0)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert str(raised.value).startswith("place: ZeroDivisionError: division by zero (")

    def ours():
        raise UserError("already one line")

    with pytest.raises(UserError, match=r"^already one line$"):
        plugins.guarded("place", ours)
    assert plugins.guarded("place", lambda: 7) == 7
