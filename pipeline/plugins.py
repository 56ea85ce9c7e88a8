"""From a name to the function it means: a module of one of our folders, or a user's own file. The folder is the list.

name                 the function `wanted` of that module of the folder
name:function        another function of it
path/to/file.py      the function `wanted` of a file
path/to/file.py:function
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pipeline.errors import UserError, did_you_mean

Result = TypeVar("Result")

# Lines of installed libraries do not help the user find a mistake in a file of theirs.
_LIBRARIES = ("<frozen", *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def load(name: str, folder: str, what: str, wanted: str) -> Callable:
    """The function that `name` means in `folder`, a package such as "reward_models"; `what` is the word in messages.

    Raises UserError for a name, a file or a function that is not there or is no function, and for a file that does not
    load.
    """
    return function_of(module_of(name, folder, what, wanted), split(name)[1] or wanted, _place(name, what))


def load_any(name: str, folder: str, what: str, wanted: str) -> tuple[ModuleType, Callable]:
    """As `load`, where a function of any name will do if it is the only public one; and its module.

    Raises UserError as `load`, and where there are several and none is called `wanted`.
    """
    module, function = module_of(name, folder, what, wanted), split(name)[1]
    public = [one for one in _functions(Path(str(module.__file__))) if not one.startswith("_")]
    if not function and wanted not in vars(module) and len(public) > 1:
        problem = f"{len(public)} functions ({', '.join(public)}), wanted one of them named"
        raise UserError(f"{_place(name, what)}: {problem}, as in {split(name)[0]}:{public[0]}, or one called {wanted}")
    lone = public[0] if wanted not in vars(module) and len(public) == 1 else wanted
    return module, function_of(module, function or lone, _place(name, what))


def module_of(name: str, folder: str, what: str, wanted: str) -> ModuleType:
    """The module that `name` means, imported: one of `folder`, or a file. Raises UserError as `load`."""
    source, place = split(name)[0], _place(name, what)
    if source.endswith(".py"):
        return _module_of_file(Path(source), what)
    if source not in available(folder):
        names = available(folder, wanted)
        cure = f"a file of your own is given by its path, as in my/{source.rpartition('/')[2]}.py"
        problem = f"not in {folder.replace('.', '/')}/, which has {', '.join(names)}{did_you_mean(source, names)}"
        raise UserError(f"{place}: {problem}; {cure}")
    return guarded(f"{place} does not load", partial(importlib.import_module, f"{folder}.{source}"))


def _place(name: str, what: str) -> str:
    """How messages name a file or a module."""
    source = split(name)[0]
    return f"{what} {source}" if source.endswith(".py") else f"{what} {source!r}"


def split(name: str) -> tuple[str, str]:
    """`source:function` in two; the function is empty where none is named."""
    if name.endswith(".py") or ":" not in name:
        return name, ""
    source, _, function = name.rpartition(":")
    return source, function


def available(folder: str, wanted: str = "") -> list[str]:
    """The public modules of a package, sorted; with `wanted`, those that define that name. None of them is imported."""
    package = importlib.import_module(folder)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    if not wanted:
        return names
    paths = {name: Path(package.__path__[0]) / f"{name}.py" for name in names}
    return [name for name, path in paths.items() if path.exists() and wanted in _defined(path)]


@cache
def constant(folder: str, name: str, wanted: str) -> Any:
    """The literal that a module of a package gives `wanted` at its top, None without one. It is not imported."""
    path = Path(importlib.import_module(folder).__path__[0]) / f"{name}.py"
    if not path.is_file() or wanted not in _defined(path):
        return None
    body = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in body if ast.unparse(node.targets[0]) == wanted)


def guarded(place: str, call: Callable[[], Result]) -> Result:
    """The result of `call()`, which is a user's code: whatever it raises, a UserError says what and where.

    A user's code may raise anything, or call sys.exit, so everything is caught here and nowhere else; nothing is
    swallowed: the UserError is raised from the original.
    """
    try:
        return call()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{place}: {_described(error)}") from error


def _module_of_file(path: Path, what: str) -> ModuleType:
    """The file as a module, loaded once per process under a name that its whole path decides."""
    if not path.is_file():
        siblings = [str(other) for other in path.parent.glob("*.py")]
        raise UserError(f"{what} {path}: there is no such file{did_you_mean(str(path), siblings)}")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"user_file_{path.stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look their own module up
        try:
            guarded(f"{what} {path} does not load", partial(spec.loader.exec_module, module))
        except UserError:
            del sys.modules[name]
            raise
    return sys.modules[name]


def function_of(module: ModuleType, name: str, place: str) -> Callable:
    """The function of that name in a module. Raises UserError where it is not there or is no function."""
    path = Path(str(module.__file__))
    if name not in vars(module):
        has = [other for other in _defined(path) if callable(vars(module).get(other)) and not other.startswith("_")]
        listed = f"it has {', '.join(has) or 'none'}{did_you_mean(name, has)}"
        raise UserError(f"{place}: no function {name!r} in {_shown(path)}, {listed}")
    function = vars(module)[name]
    if not callable(function):
        problem = f"{name} in {_shown(path)} is a {type(function).__name__}"
        raise UserError(f"{place}: {problem}, wanted a function: def {name}(...)")
    return function


def _defined(path: Path) -> list[str]:
    """The functions and classes at the top of a file, and names set there; none for a file that does not parse."""
    body = _body(path)
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return _functions(path) + classes + [target.id for target in targets if isinstance(target, ast.Name)]


def _functions(path: Path) -> list[str]:
    """The functions at the top of a file, in their order."""
    return [node.name for node in _body(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _body(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return []


def _described(error: BaseException) -> str:
    """Type, message and place of an exception, in one line."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{type(error).__name__}: {error.msg} ({_shown(Path(error.filename))}:{error.lineno})"
    message = " ".join(str(error).split())
    shown = f": {message if len(message) <= 300 else message[:297] + '...'}" if message else ""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is `guarded` itself
    frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    where = f" ({_shown(Path(frames[-1].filename))}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{shown}{where}"


def _shown(path: Path) -> str:
    """The path from the working directory, where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
