"""Models in folders as Hugging Face's libraries write them: what lies there, its class, its weights and what it is for.

transformers is imported by the functions that need it; a plain install has none.
"""

from prunekit.huggingface.adapters import is_adapter
from prunekit.huggingface.folder import CONFIG, Folder, checkpoints_in
from prunekit.huggingface.loading import AUTO, load_model, new_model, quietly
from prunekit.huggingface.series import Series, with_base
from prunekit.huggingface.tasks import HEADS, task_of

__all__ = [
    "AUTO", "CONFIG", "HEADS", "Folder", "Series", "checkpoints_in", "is_adapter", "load_model", "new_model", "quietly",
    "task_of", "with_base",
]  # fmt: skip
