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
from collections.abc import Callable, Iterator, Sequence
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
    public = _public(Path(str(module.__file__)))
    if not function and wanted not in vars(module) and len(public) > 1:
        raise _several(name, what, wanted, public)
    lone = public[0] if wanted not in vars(module) and len(public) == 1 else wanted
    return module, function_of(module, function or lone, _place(name, what))


def check(name: str, folder: str, what: str, wanted: str, any_name: bool = False) -> None:
    """What can be told of `name` without running a line of it. Raises UserError as `load` or, `any_name`, `load_any`.

    So it does for a file that is no Python, lacks the function, or imports a package that is not installed here; of
    our own files those that it imports count.
    """
    source, function = split(name)
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise _no_file(path, what)
    else:
        if source not in available(folder):
            raise _not_there(name, folder, what, wanted)
        path = _file_of(f"{folder}.{source}")
    place = f"{_place(name, what)} does not load"
    tree = guarded(place, lambda: ast.parse(path.read_bytes(), str(path)))
    if package := next(_absent(tree, folder), None):
        raise UserError(f"{place}: {path} imports {package}, which is not installed here: pip install it")
    bound, public = _bound(tree), _public(path)
    if bound is None or (function or wanted) in bound or (not function and any_name and len(public) == 1):
        return
    if not function and any_name and public:
        raise _several(name, what, wanted, public)
    raise UserError(f"{_place(name, what)}: {_no_function(function or wanted, path, public)}")


def _several(name: str, what: str, wanted: str, public: Sequence[str]) -> UserError:
    problem = f"{len(public)} functions ({', '.join(public)}), wanted one of them named"
    return UserError(f"{_place(name, what)}: {problem}, as in {split(name)[0]}:{public[0]}, or one called {wanted}")


def _absent(tree: ast.Module, folder: str) -> Iterator[str]:
    """The packages that a module, and modules of `folder` that it imports, import at once and that are not there.

    Nothing where it changes the path on which they are looked for.
    """
    if any(isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" for node in ast.walk(tree)):
        return
    for node in tree.body:  # what stands in a `try` or an `if` may be missing
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        for name in names:
            top = name.split(".")[0]
            if top not in sys.modules and importlib.util.find_spec(top) is None:
                yield top
            elif top == folder and (file := _file_of(name)).is_file():
                yield from _absent(ast.parse(file.read_bytes()), folder)


def _file_of(module: str) -> Path:
    """The file of a module of a package of ours."""
    package, _, name = module.rpartition(".")
    return Path(importlib.import_module(package or module).__path__[0]) / f"{name}.py"


def _bound(tree: ast.Module) -> set[str] | None:
    """The names that a module gives a value to, somewhere; None where they cannot all be told without running it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("globals", "vars", "exec", "setattr"):
            return None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return None if "*" in names else names


def module_of(name: str, folder: str, what: str, wanted: str) -> ModuleType:
    """The module that `name` means, imported: one of `folder`, or a file. Raises UserError as `load`."""
    source, place = split(name)[0], _place(name, what)
    if source.endswith(".py"):
        return _module_of_file(Path(source), what)
    if source not in available(folder):
        raise _not_there(name, folder, what, wanted)
    return guarded(f"{place} does not load", partial(importlib.import_module, f"{folder}.{source}"))


def _not_there(name: str, folder: str, what: str, wanted: str) -> UserError:
    source, names = split(name)[0], available(folder, wanted)
    cure = f"a file of your own is given by its path, as in my/{source.rpartition('/')[2]}.py"
    problem = f"not in {folder.replace('.', '/')}/, which has {', '.join(names)}{did_you_mean(source, names)}"
    return UserError(f"{_place(name, what)}: {problem}; {cure}")


def _no_file(path: Path, what: str) -> UserError:
    siblings = [str(other) for other in path.parent.glob("*.py")]
    return UserError(f"{what} {path}: there is no such file{did_you_mean(str(path), siblings)}")


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
        raise _no_file(path, what)
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
        raise UserError(f"{place}: {_no_function(name, path, has)}")
    function = vars(module)[name]
    if not callable(function):
        problem = f"{name} in {_shown(path)} is a {type(function).__name__}"
        raise UserError(f"{place}: {problem}, wanted a function: def {name}(...)")
    return function


def _no_function(name: str, path: Path, has: Sequence[str]) -> str:
    return f"no function {name!r} in {_shown(path)}, it has {', '.join(has) or 'none'}{did_you_mean(name, has)}"


def _defined(path: Path) -> list[str]:
    """The functions and classes at the top of a file, and names set there; none for a file that does not parse."""
    body = _body(path)
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return _functions(path) + classes + [target.id for target in targets if isinstance(target, ast.Name)]


def _functions(path: Path) -> list[str]:
    """The functions at the top of a file, in their order."""
    return [node.name for node in _body(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _public(path: Path) -> list[str]:
    return [one for one in _functions(path) if not one.startswith("_")]


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
