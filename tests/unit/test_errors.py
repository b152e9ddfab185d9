"""The tree of errors: the drawing is the classes, the words survive a process, nothing is lost."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmopt import errors
from llmopt.errors import LlmoptError

EVERY = (
    LlmoptError("it failed"),
    errors.UsageError("no such thing"),
    errors.UnknownNameError("pass", "fuse-norm", {"merge-qkv": 1, "fuse-norms": 2}, hint="look"),
    errors.SourceNotFoundError(Path("x"), hint="name a folder"),
    errors.OutputExistsError(Path("x")),
    errors.PickleRefusedError(Path("x.bin"), "it is a pickle"),
    errors.RemoteCodeRefusedError(Path("x"), ["a.py", "b.py"]),
    errors.PluginError("mine.py:3", "it has no name", "name it"),
    errors.SourceError(Path("x"), "is {braced}", hint="download it"),
    errors.UnsupportedModelError("x", ["1 x Foo", "1 x Bar"], "change it"),
    errors.FusionError("norm", 3, 2, ["n: why"]),
    errors.NotIncrementalError("node", "it adds tokens"),
    errors.AccuracyError("logits", 0.12345, 0.01, "report it"),
    errors.PassError("fuse-norms", "a cycle"),
    errors.PassError("mine", "a cycle", where="mine.py:3"),
    errors.PassFailedError("mine", "KeyError: 'x'", "mine.py:3"),
    errors.ArtifactError(Path("x"), "has no manifest"),
    errors.BundleError(Path("x"), "is cut short"),
    errors.SignatureError(Path("x"), "is not signed"),
    errors.StorageError(Path("x"), "No space left on device"),
    errors.BackendUnavailableError("tvm", "install it"),
    errors.PackageMissingError("torch", "pip install 'llmopt[cpu]'"),
    errors.NoVariantError("x.llmopt", "cpu: it needs avx2"),
)


def tree(cls: type[LlmoptError], depth: int = 0) -> Iterator[tuple[int, str, int]]:
    """Yield depth, name and exit code of a class of ``llmopt.errors`` and of those below it."""
    yield depth, cls.__name__, cls.exit_code
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def test_the_tree_in_the_docstring_is_that_of_the_classes() -> None:
    drawing = re.findall(
        r"^ {4}([│├└─ ]*)(\w+Error) +(?:exit (\d))?", inspect.getdoc(errors) or "", re.MULTILINE
    )
    codes: list[int] = []
    drawn = []
    for indent, name, code in drawing:
        depth = len(indent) // 4
        codes[depth:] = [int(code) if code else codes[depth - 1]]
        drawn.append((depth, name, codes[depth]))

    assert drawn == list(tree(LlmoptError))


def test_every_class_is_tried_below() -> None:
    assert {type(error).__name__ for error in EVERY} == {name for _, name, _ in tree(LlmoptError)}


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_an_error_reaches_another_process_with_its_words(error: LlmoptError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert repr(other) == repr(error)
        assert vars(other) == vars(error)


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_a_message_is_one_line_with_every_fact(error: LlmoptError) -> None:
    facts = [fact for fact in error.args if isinstance(fact, str)]

    assert "\n" not in str(error)
    assert all(fact in str(error) for fact in facts)
    assert repr(error).startswith(f"{type(error).__name__}(")


def test_messages_say_what_where_and_what_to_do_next() -> None:
    said = [str(error) for error in EVERY]

    assert said[2:] == [
        "unknown pass 'fuse-norm'; did you mean 'fuse-norms'? known: fuse-norms, merge-qkv; look",
        "x: not found; name a folder",
        "x: exists already; pass --force to replace it, or choose another with -o",
        (
            "x.bin: refused, it is a pickle, and unpickling executes code in the file; pass "
            "--trust-pickle if you trust where it came from, or save it as safetensors"
        ),
        (
            "x: refused, its model is code in the folder (a.py, b.py), which would be "
            "executed; read it, then pass --trust-remote-code if you trust it"
        ),
        "plugin mine.py:3: it has no name; name it",
        "x: is {braced}; download it",
        "x: unsupported: 1 x Foo; 1 x Bar; change it",
        (
            "--require norm=all: 2 of 3 fused; n: why; drop the requirement, or run `llmopt "
            "inspect` on the artifact to see the rest"
        ),
        (
            "no cache can be added: 'node': it adds tokens; change the model there, or keep "
            "it as it is with --passes 'default,-add-kv-cache'"
        ),
        "logits: 0.123, allowed 0.01; report it",
        (
            "pass 'fuse-norms' left the program invalid: a cycle; compile without it "
            "(--passes 'default,-fuse-norms') and report it"
        ),
        (
            "pass 'mine' (mine.py:3) left the program invalid: a cycle; correct it there, or "
            "leave it out of --passes"
        ),
        (
            "pass 'mine' failed at mine.py:3: KeyError: 'x'; correct it there, or leave it "
            "out of --passes"
        ),
        "x: has no manifest; compile it again, or update llmopt if it is newer",
        "x: is cut short; get it again from where it came from",
        "x: is not signed; do not use it; ask whoever sent it",
        "x: No space left on device; free space or choose another place with -o",
        "backend 'tvm' cannot run here: install it",
        "this needs the package torch, which is not installed; pip install 'llmopt[cpu]'",
        (
            "x.llmopt: no variant suits this machine: cpu: it needs avx2; bundle one that "
            "does with `llmopt bundle create`"
        ),
    ]
