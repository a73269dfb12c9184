"""Which of transformers' classes a folder's model is of: from its config's ``architectures``, or by an Auto class.

Classes are looked up by name in transformers alone; code that lies in the folder or elsewhere is never run.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from prunekit.errors import UsageError, nearest, quoted, theirs
from prunekit.huggingface.folder import CONFIG, Folder
from prunekit.imports import lacking


def transformers() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed, or does not import; says what to install.
    """
    try:
        import transformers as found
    except ModuleNotFoundError as error:
        raise lacking(error) or UsageError(f"transformers cannot be imported: {quoted(error)}") from error
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported: {quoted(error)}") from error
    return found


def model_class(folder: Folder, auto: str | None) -> Any:
    """The class of the folder's model.

    Args:
        auto: name of an Auto class, which then says it; None for ``architectures``.

    Raises:
        UsageError: transformers has no such class, it is no model, or it does not go with the config.
    """
    config = read_config(folder)
    where = folder.path / CONFIG
    if auto is not None:
        table = auto_class(auto)._model_mapping
        if type(config) not in table.keys():  # noqa: SIM118 (membership of the mapping itself loads every class)
            raise UsageError(f"{where}: model_type {folder.config['model_type']} has no {auto}; name another auto, or none")
        classes = _of_table(table, config)
        if not isinstance(classes, list | tuple):
            return classes
        return next((one for one in classes if one.__name__ == folder.architecture), classes[0])
    name = folder.architecture
    if name is None:
        raise UsageError(
            f"{where}: architectures is {folder.config.get('architectures')!r:.80}, which names not one class; "
            "say auto, such as AutoModelForSequenceClassification"
        )
    library = transformers()
    found: Any = _named(library, name)
    if not _is_model(found, library):
        code = " and it comes with code of its own (auto_map), which prunekit never runs" if "auto_map" in folder.config else ""
        raise UsageError(f"{where}: architectures is {name!r:.80}, no model class of transformers {library.__version__}{code}")
    if not isinstance(config, found.config_class):
        raise UsageError(f"{where}: architectures is {name}, which does not go with model_type {folder.config['model_type']}")
    return found


def _is_model(found: Any, library: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, library.PreTrainedModel)


def _of_table(table: Any, config: Any) -> Any:
    with theirs(f"importing transformers' class of {type(config).__name__}"):
        return table[type(config)]


def _named(library: Any, name: str) -> Any:
    """What transformers has under a name, None where it has nothing; its module is imported now.

    Raises:
        UsageError: that module cannot be imported here.
    """
    if name not in _offered(library):
        return None
    with theirs(f"importing {name} of transformers"):
        return getattr(library, name)


@cache
def _offered(library: Any) -> frozenset[str]:
    """The names in transformers, which take it half a second to list."""
    return frozenset(dir(library))


def auto_class(name: str) -> Any:
    """One of transformers' ``AutoModel`` classes.

    Raises:
        UsageError: there is none of that name.
    """
    library = transformers()
    known = [one for one in sorted(_offered(library)) if one.startswith("AutoModel")]
    if name not in known:
        raise UsageError(f"auto is {name!r:.80}, which transformers {library.__version__} does not have; {nearest(name, known)}")
    return getattr(library, name)


def read_config(folder: Folder) -> Any:
    """The folder's config as transformers has it.

    Raises:
        UsageError: its model_type is missing or unknown, or a value of it does not fit.
    """
    library, where = transformers(), folder.path / CONFIG
    kind = folder.config.get("model_type")
    if not isinstance(kind, str):
        raise UsageError(f"{where}: has no model_type, which says what kind of model it is")
    known = library.models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        code = "; it comes with code of its own (auto_map), which prunekit never runs" if "auto_map" in folder.config else ""
        hint = "" if code else f"; {nearest(kind, list(known.keys()))}" if _near(kind, list(known.keys())) else ""
        raise UsageError(f"{where}: model_type {kind!r:.80} is unknown to transformers {library.__version__}{hint}{code}")
    with theirs(f"{where}: reading it with transformers"):
        return library.AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)


def _near(name: str, known: list[str]) -> bool:
    return nearest(name, known).startswith("did")
