"""What messages quote of others' errors."""

from __future__ import annotations

from prunekit.errors import quoted


def test_an_import_that_failed_says_what_failed_first() -> None:
    """transformers raises one ModuleNotFoundError from another; only the first of all says that torchvision does not fit."""
    error, between = ImportError("no module 'LlamaConfig'"), ImportError("no module 'LlamaModel'")
    error.__cause__, between.__cause__ = between, RuntimeError("no operator nms")
    assert quoted(error) == "ImportError: no module 'LlamaConfig' (from RuntimeError: no operator nms)"


def test_an_error_that_is_its_own_cause_ends() -> None:
    error = ImportError("no module")
    error.__cause__ = error
    assert quoted(error) == "ImportError: no module"
    other = ImportError("no other")
    error.__cause__, other.__cause__ = other, error
    assert quoted(error) == "ImportError: no module (from ImportError: no other)"


def test_other_errors_say_themselves() -> None:
    error = ValueError("width\n must be even")
    error.__cause__ = KeyError("width")
    assert quoted(error) == "ValueError: width must be even"
    assert quoted(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(quoted(ValueError("x" * 999))) == len("ValueError: ") + 200
