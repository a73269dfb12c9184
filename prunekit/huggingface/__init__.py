"""Models in folders as Hugging Face's libraries write them: what lies there, its class, its weights and what it is for.

transformers is imported by the functions that need it; a plain install has none.
"""

from prunekit.huggingface.folder import CONFIG, Folder, checkpoints_in
from prunekit.huggingface.loading import AUTO, load_model, new_model, quietly, read_state
from prunekit.huggingface.tasks import HEADS, task_of

__all__ = ["AUTO", "CONFIG", "HEADS", "Folder", "checkpoints_in", "load_model", "new_model", "quietly", "read_state", "task_of"]
