"""Inside other people's training loops: transformers' Trainer, Lightning, Accelerate.

``Recording`` says what is to be done; each library's own file does it there. They are imported by name, so that a library that is
not installed is not needed::

    from prunekit.integrations import Recording
    from prunekit.integrations.transformers import RecordingCallback
"""

from prunekit.integrations.recording import Gradual, Recording

__all__ = ["Gradual", "Recording"]
