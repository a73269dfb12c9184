"""The models that the recipes name; users bring theirs by import path."""

from prunekit.models.digits import digits_cnn, digits_mlp, digits_transformer
from prunekit.models.gpt2 import gpt2
from prunekit.models.llama import llama
from prunekit.models.mixtral import mixtral
from prunekit.models.modadd import modadd_transformer
from prunekit.models.resnet9 import resnet9

__all__ = ["digits_cnn", "digits_mlp", "digits_transformer", "gpt2", "llama", "mixtral", "modadd_transformer", "resnet9"]
