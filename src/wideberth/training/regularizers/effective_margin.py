"""Effective margin regularisation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from wideberth import checks
from wideberth.modes import Mode
from wideberth.randomness import Noise
from wideberth.training.regularizers.base import Regularizer, positive, squared_norm
from wideberth.training.regularizers.jacobian import projected_jacobian, squared_jacobian
from wideberth.training.schedules import Schedule


class EffectiveMargin(Regularizer):
    """Effective margin regularisation (EMR; Liu and Chan 2022): keep the effective weight, the Jacobian J, small.

    Cross-entropy can be lowered by scaling the logits, which widens no margin; the effective margin is the logit
    margin over the norm of the effective weight, so that norm is the penalty.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        estimator: "exact": ||J||_F^2, one backward per class (the paper's version for small networks). "projection":
            K * ||J^T v||^2 for random unit vectors v, an unbiased estimate of the former in one backward per draw
            (Hoffman et al. 2019, without their factor 1/2). "softmax": ||J^T q||^2 with q = softmax(z / temperature),
            detached: one backward, the released large-scale version.
        temperature: of "softmax". Towards 0 the penalty is on the predicted logit alone, towards infinity on the mean
            logit (which cross-entropy does not depend on). The authors use 40 with PGD-AT, 1 with TRADES.
        draws: of "projection".
        mode: of the model, see `Regularizer`.

    What we do differently: the released code squares the gradient of the batch mean, which divides the penalty by B
    once more; ours is the mean over samples. Their lambda 3 at batch size 128 is our weight 3/128.
    """

    def __init__(
        self,
        weight: float | Schedule,
        estimator: Literal["exact", "projection", "softmax"] = "projection",
        temperature: float = 1.0,
        draws: int = 1,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weight, mode)
        checks.choice("estimator", estimator, ("exact", "projection", "softmax"))
        positive("temperature", temperature)
        checks.at_least("draws", draws, 1)
        self.estimator, self.temperature, self.draws = estimator, temperature, draws

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The estimate of each sample's squared effective weight norm, (B,)."""
        logits = model(point)
        if self.estimator == "softmax":
            mixture = (logits / self.temperature).softmax(1).detach()
            return squared_norm((mixture * logits).sum(1), point)
        if self.estimator == "exact":
            return squared_jacobian(logits, point)
        return projected_jacobian(logits, point, noise, self.draws)
