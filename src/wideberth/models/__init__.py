"""Networks, and how to build, save and load them: any `nn.Module` from inputs in [0, 1] to logits is a model here."""

from wideberth.models.layers import Normalize, activation
from wideberth.models.libraries import Timm, Torchvision
from wideberth.models.loading import build, load_model, load_weights, save_weights
from wideberth.models.resnets import PreActResNet18, WideResNet
from wideberth.models.small import MLP, ConvNet

__all__ = [
    "MLP",
    "ConvNet",
    "Normalize",
    "PreActResNet18",
    "Timm",
    "Torchvision",
    "WideResNet",
    "activation",
    "build",
    "load_model",
    "load_weights",
    "save_weights",
]
