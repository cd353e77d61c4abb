"""Regularizers: penalties on the shape of the function that the model computes, one value per sample.

A weight means the same at every batch size. Published code that squares the gradient of a batch mean divides by the
batch size once more; the recipes convert its weights. The lines below are the list of what is exported: one for each
class, from which the command line, the documentation and the tests derive.
"""

from wideberth.training.regularizers.base import Regularizer as Regularizer
from wideberth.training.regularizers.curvature import Curvature as Curvature
from wideberth.training.regularizers.effective_margin import EffectiveMargin as EffectiveMargin
from wideberth.training.regularizers.gradient_alignment import GradientAlignment as GradientAlignment
from wideberth.training.regularizers.input_gradient import InputGradient as InputGradient
from wideberth.training.regularizers.jacobian import Jacobian as Jacobian
from wideberth.training.regularizers.local_linearity import LocalLinearity as LocalLinearity
from wideberth.training.regularizers.weight_norm import WeightNorm as WeightNorm
