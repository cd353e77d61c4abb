"""Networks, and how to build, save and load them: any `nn.Module` from inputs in [0, 1] to logits is a model here."""

from wideberth.models.heads import CosineHead, MahalanobisHead, last_layer
from wideberth.models.layers import Normalize, SmoothReLU, activation
from wideberth.models.libraries import Timm, Torchvision
from wideberth.models.loading import build, load_model, load_weights, save_weights
from wideberth.models.papers import IAATWideResNet, MadryMNIST, SmallCNN
from wideberth.models.resnets import PreActResNet18, WideResNet
from wideberth.models.small import MLP, ConvNet

__all__ = [
    "MLP",
    "ConvNet",
    "CosineHead",
    "IAATWideResNet",
    "MadryMNIST",
    "MahalanobisHead",
    "Normalize",
    "PreActResNet18",
    "SmallCNN",
    "SmoothReLU",
    "Timm",
    "Torchvision",
    "WideResNet",
    "activation",
    "build",
    "last_layer",
    "load_model",
    "load_weights",
    "save_weights",
]
